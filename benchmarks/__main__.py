"""Time a training step (map, then all gradients) against every peer: python -m benchmarks [--suite small|full]

Every peer's results are checked against float64 before it is timed. Steps are interleaved, times are medians; ratios
count, absolute times are for reading. Written to benchmarks/results/cpu-SUITE.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import ilvae_fast as il
from benchmarks import peers
from benchmarks.peers import PEERS, Problem, Step
from benchmarks.record import provenance, write

ROWS = [
    Problem(2, (32, 32), 128),
    Problem(2, (64, 64), 512),
    Problem(8, (128, 128), 512),
    Problem(32, (512, 512), 128),
    Problem(64, (256, 256, 256), 512),
    Problem(784, (512, 512), 128),
    Problem(784, (512, 512), 128, latent=10),
    Problem(3072, (1024, 1024), 256, latent=64),
]
OURS: dict[str, Callable[[Problem], Step]] = {"ours": peers.ours, "ours, stateless": peers.ours_stateless}
TURN_SECONDS = 5e-3
SECONDS = {"small": 0.4, "full": 2.0}  # of timing for each row and peer


def check(name: str, problem: Problem, step: Step, exact: list[torch.Tensor]) -> None:
    """Refuse to time what is not right."""
    for ours, truth in zip(step(), exact, strict=True):
        error = float((ours.double() - truth).abs().max() / truth.abs().max())
        if not error < 1e-4:
            raise SystemExit(f"{name} is wrong on {problem}: relative error {error:.1e}")


def interleaved_medians(steps: dict[str, Step], seconds: float) -> dict[str, tuple[float, float]]:
    """Median seconds of each step and the spread (half the distance of the quartiles).

    Steps take turns. A turn repeats its step for some milliseconds and counts as one time, their mean: a step finds the
    caches as its own predecessor left them, as in training, not as another peer did.
    """
    repeats = {}
    for name, step in steps.items():
        for _ in range(3):
            step()
        start = time.perf_counter()
        step()
        repeats[name] = max(1, round(TURN_SECONDS / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds * len(steps)
    while time.perf_counter() < end or len(times[next(iter(times))]) < 10:
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                step()
            times[name].append((time.perf_counter() - start) / repeats[name])
    quartiles = {name: statistics.quantiles(t, n=4) for name, t in times.items()}
    return {name: (q[1], (q[2] - q[0]) / 2) for name, q in quartiles.items()}


def matmul_ceiling() -> float:
    """The best measured rate of a float32 product, in flop/s."""
    best = 0.0
    for n in (512, 1024, 2048):
        a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
        for _ in range(8):
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def measure(problem: Problem, seconds: float, ceiling: float) -> dict[str, Any]:
    """One row: medians of all steps, ratio of the best peer to ours, distance to the arithmetic floor."""
    candidates = {**OURS, **PEERS, **({"expert, injected": peers.expert} if problem.latent else {})}
    torch.compiler.reset()
    steps = {name: make(problem) for name, make in candidates.items()}
    exact = [t.detach() for t in peers.eager(problem.double())()]
    for name, step in steps.items():
        check(name, problem, step, exact)
    times = interleaved_medians(steps, seconds)
    plan = il.plan(problem.batch, problem.width, problem.hidden, embedding_features=problem.latent, dtype=problem.dtype)
    flops = plan.map_flops + plan.training_flops
    best = min(PEERS, key=lambda name: times[name][0])
    return {
        "row": str(problem),
        "milliseconds": {name: median * 1e3 for name, (median, _) in times.items()},
        "spread": {name: spread / median for name, (median, spread) in times.items()},
        "best_peer": best,
        "ratio": times[best][0] / times["ours"][0],
        "ratio_stateless": times[best][0] / times["ours, stateless"][0],
        "flops": flops,
        "fraction_of_matmul_ceiling": flops / times["ours"][0] / ceiling,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=SECONDS, default="small", help="small: a quick look; full: steady medians")
    arguments = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    ceiling = matmul_ceiling()
    rows = [measure(p, SECONDS[arguments.suite], ceiling) for p in track(ROWS, "timing", console=console)]

    names = [*OURS, *PEERS, "expert, injected"]
    table = Table(title=f"milliseconds for map and all gradients, float32; matmul ceiling {ceiling / 1e9:.0f} GF/s")
    for heading in ("d, hidden, N", *names, "best peer / ours", "of ceiling"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [f"{row['milliseconds'][n]:.3f}" if n in row["milliseconds"] else "" for n in names]
        table.add_row(row["row"], *cells, f"{row['ratio']:.2f}", f"{row['fraction_of_matmul_ceiling']:.0%}")
    console.print(table)
    mean = statistics.geometric_mean([row["ratio"] for row in rows])
    console.print(f"geometric mean of best peer / ours: {mean:.2f}")
    result = {**provenance(), "matmul_ceiling": ceiling, "geometric_mean": mean, "rows": rows}
    console.print("written:", str(write(f"cpu-{arguments.suite}", result)))


if __name__ == "__main__":
    main()
