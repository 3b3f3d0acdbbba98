"""Time a training step (map, then all gradients) against every peer: python -m benchmarks [--suite small|full] ...

--suite second-order times gradient penalties and log determinants instead (``second_order.py``), --suite inverse the
inverse (``inverse.py``).
Every peer's results are checked against float64 before it is timed. Steps take turns; times are medians over the turns,
ratios medians over the rounds. Ratios count, absolute times are for reading. Written to benchmarks/results/, named
after device, instruction set of the CPU, dtype if another than float32, and suite: ratios depend on them all, and
--check compares with the committed file of that name.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import ilvae_fast as il
from benchmarks import inverse, peers, plots, second_order
from benchmarks.peers import PEERS, Problem, Step, check
from benchmarks.record import RESULTS, provenance, write
from benchmarks.suite import FORWARD, FORWARD_ROWS, GEOMETRIC_MEAN, ROWS, Lidvae, Row
from benchmarks.timing import Times, copy_ceiling, interleaved, matmul_ceiling, product
from ilvae_fast import functional

SECONDS = {"small": 0.4, "full": 1.0}  # of timing for each row and step
OTHERS: dict[str, Any] = {"second-order": second_order, "inverse": inverse}  # suites with rows of their own
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
BASELINE_SLACK = 0.85  # a ratio may fall to this part of the committed one
# A row during which a matrix product ran at less than this part of its speed during the best row was measured while
# others kept the machine busy. It is measured again, until so many seconds after the start.
CALM = 0.9
PATIENCE = {"small": 0.0, "full": 480.0}


def timed(problem: Problem, chosen: list[str], seconds: float, **others: Step) -> dict[str, Times]:
    """Times of ours and the chosen peers, which are checked, and of others, which are not."""
    candidates: dict[str, Any] = {"ours": peers.ours}
    if not problem.raw:
        candidates["ours, stateless"] = peers.ours_stateless
    candidates |= {name: PEERS[name] for name in chosen}
    if problem.latent:
        candidates["expert, injected"] = peers.expert
    torch.compiler.reset()
    steps = {name: make(problem) for name, make in candidates.items()}
    exact = [t.detach() for t in peers.eager(problem.double())()]
    for name, step in steps.items():
        check(name, problem, step, exact)
    return interleaved(steps | others, seconds, problem.device)


def milliseconds(times: dict[str, Times]) -> dict[str, float]:
    """Medians of the steps."""
    return {name: t.median * 1e3 for name, t in times.items()}


def measure(row: Row, chosen: list[str], seconds: float, **options: Any) -> dict[str, Any]:
    """One row: medians of all steps, ratios of the best peer to ours."""
    problem = row.problem(**options)
    times = timed(problem, chosen, seconds, product=product(problem.dtype, problem.device))
    product_time, ours = times.pop("product"), times["ours"]
    best = min(chosen, key=lambda name: times[name].over(ours))
    # with raw weights: the peers that are ever best
    fast = [name for name in chosen if "eager" not in name and name != "closed form"] or chosen
    module = timed(row.problem(**options, raw=True), fast, seconds / 2)
    result = {
        "row": str(problem),
        "milliseconds": milliseconds(times),
        "spread": {name: t.spread for name, t in times.items()},
        "product_milliseconds": product_time.median * 1e3,
        "module_milliseconds": milliseconds(module),
        "best_peer": best,
        "ratio": times[best].over(ours),
        "ratio_stateless": min(times[name].over(times["ours, stateless"]) for name in chosen),
        "ratio_module": min(module[name].over(module["ours"]) for name in fast),
        "flops": problem.flops(),
        "bytes": problem.bytes(),
        "wanted": row.best_peer,
    }
    if row.expert:
        result["ratio_expert"] = times["expert, injected"].over(ours)
    return result


def lidvae(seconds: float) -> dict[str, Any]:
    """The decoder people run today against ours, module and raw weights on both sides."""
    pair = Lidvae()
    pair.check()
    times = interleaved({**pair.steps, "product": product(torch.float32, "cpu")}, seconds)
    product_time = times.pop("product")
    return {
        "row": str(pair),
        "milliseconds": milliseconds(times),
        "product_milliseconds": product_time.median * 1e3,
        "ratio": times["LIDVAE module"].over(times["ours"]),
        "wanted": pair.wanted,
    }


def forward(shape: tuple[int, tuple[int, ...]], batch: int, seconds: float, **options: Any) -> dict[str, Any]:
    """The map alone under no_grad: ours, and the compiled closed form."""
    problem = Problem(*shape, batch, **options)
    tensors = (problem.x, problem.skip_weight, problem.bias, problem.weights)
    arguments: dict[str, Any] = {"activations": problem.activations, "inverse_lipschitz": problem.constant}
    torch.compiler.reset()
    closed = torch.compile(peers.closed_form_map, fullgraph=True, dynamic=False)
    with torch.no_grad():
        steps = {
            "ours": lambda: functional.brenier_map(*tensors, **arguments),
            "closed form, compiled": lambda: closed(*tensors) + problem.constant * problem.x,
        }
        times = interleaved(steps, seconds, problem.device)
    return {
        "row": str(problem),
        "milliseconds": milliseconds(times),
        "ratio": times["closed form, compiled"].over(times["ours"]),
        "flops": problem.flops() / 3,
    }


def again_when_calm(
    results: list[dict[str, Any]], measurements: list[Callable[[], dict[str, Any]]], end: float
) -> None:
    """Repeat in place what was measured on a busy machine, the worst first, until ``time.perf_counter()`` is `end`.

    Whether it was busy says the matrix product timed in the same rounds. The ratios are not looked at.
    """
    while time.perf_counter() < end:
        slow = [r["product_milliseconds"] for r in results]
        worst = max(range(len(slow)), key=slow.__getitem__)
        if CALM * slow[worst] <= min(slow):
            break
        repeated = measurements[worst]()
        if repeated["product_milliseconds"] < slow[worst]:
            results[worst] = repeated


def failures(result: dict[str, Any], baseline: dict[str, Any] | None) -> list[str]:
    """What ``--check`` has to say: ratios below what is wanted, or well below the committed ones."""
    found = []

    def at_least(name: str, value: float, wanted: float) -> None:
        if value < wanted:
            found.append(f"{name}: got {value:.2f}, wanted {wanted:.2f}")

    for row, wish in zip(result["rows"], ROWS, strict=True):
        at_least(f"{row['row']}: best peer / ours", row["ratio"], wish.best_peer)
        at_least(f"{row['row']}: best peer / module, raw weights", row["ratio_module"], 1.0)
        if wish.expert:
            at_least(f"{row['row']}: expert / ours", row["ratio_expert"], wish.expert)
        if wish.stateless:
            at_least(f"{row['row']}: best peer / stateless pair", row["ratio_stateless"], wish.stateless)
    at_least(result["lidvae"]["row"], result["lidvae"]["ratio"], result["lidvae"]["wanted"])
    at_least("geometric mean of best peer / ours", result["geometric_mean"], GEOMETRIC_MEAN)
    if baseline:
        before = {row["row"]: row["ratio"] for row in baseline["rows"]}
        for row in result["rows"]:
            if row["row"] in before:
                at_least(f"{row['row']}: committed ratio", row["ratio"], BASELINE_SLACK * before[row["row"]])
    return found


def show(console: Console, result: dict[str, Any]) -> None:
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["milliseconds"]))
    ceilings = f"{result['matmul_ceiling'] / 1e9:.0f} GF/s matmul, {result['copy_ceiling'] / 1e9:.0f} GB/s copy"
    title = f"milliseconds for map and all gradients, {result['dtype']}; measured ceilings {ceilings}"
    table = Table(title=title)
    for heading in ("d, hidden, N", *names, "peer / ours", "raw weights", "Mflop", "MB", "of ceiling"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        cells = [f"{row['milliseconds'][n]:.3f}" if n in row["milliseconds"] else "" for n in names]
        ratios = (f"{row['ratio']:.2f}", f"{row['ratio_module']:.2f}")
        work = (f"{row['flops'] / 1e6:.0f}", f"{row['bytes'] / 1e6:.1f}", f"{row['fraction_of_matmul_ceiling']:.0%}")
        table.add_row(row["row"], *cells, *ratios, *work)
    console.print(table)
    others = Table(title="milliseconds: the decoder people run today; the map alone under no_grad")
    for heading in ("what", "ours", "theirs", "theirs / ours"):
        others.add_column(heading, justify="right")
    for row in [*([result["lidvae"]] if "lidvae" in result else []), *result["forward"]]:
        ours, theirs = row["milliseconds"].values()
        others.add_row(row["row"], f"{ours:.4f}", f"{theirs:.4f}", f"{row['ratio']:.2f}")
    console.print(others)
    console.print(f"geometric mean of best peer / ours: {result['geometric_mean']:.2f}")


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    suites = (*SECONDS, *OTHERS)
    words = "small: a quick look; full: steady medians; others: benchmarks/second_order.py, benchmarks/inverse.py"
    parser.add_argument("--suite", choices=suites, default="small", help=words)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--peers", nargs="+", choices=PEERS, metavar="PEER", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--plot", action="store_true", help="draw a roofline and a bar chart beside the result")
    parser.add_argument("--check", action="store_true", help="exit 1 if a wanted or committed ratio is missed (CPU)")
    arguments = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console = Console(width=220)

    dtype, device = DTYPES[arguments.dtype], arguments.device
    if arguments.suite in OTHERS:
        if (arguments.device, arguments.dtype) != ("cpu", "float32"):
            parser.error(f"--suite {arguments.suite} is timed on the CPU, in dtypes of its own")
        other = OTHERS[arguments.suite]
        path = arguments.json or RESULTS / f"cpu-{il.build_info()['cpu']}-{arguments.suite}.json"
        measured_others = {**provenance(), **other.measure(console, SECONDS["full"])}
        other.show(console, measured_others)
        finish(console, path, measured_others, arguments.check)
        return
    chosen = arguments.peers or [
        name for name in PEERS if "JAX" not in name or (device == "cpu" and importlib.util.find_spec("jax"))
    ]
    if dtype == torch.bfloat16:
        chosen = [name for name in chosen if "JAX" not in name]
    seconds, options = SECONDS[arguments.suite], {"dtype": dtype, "device": device}
    place = device if device == "cuda" else f"cpu-{il.build_info()['cpu']}"
    name = "-".join([place, *([] if dtype == torch.float32 else [arguments.dtype]), arguments.suite])
    path = arguments.json or RESULTS / f"{name}.json"
    committed = RESULTS / f"{name}.json"
    baseline = json.loads(committed.read_text()) if arguments.check and committed.exists() else None

    result: dict[str, Any] = {**provenance(), "dtype": arguments.dtype, "device": device}
    result["matmul_ceiling"], result["copy_ceiling"] = 0.0, copy_ceiling(device)
    measurements: list[Callable[[], dict[str, Any]]] = [
        partial(measure, row, chosen, seconds, **options) for row in ROWS
    ]
    if device == "cpu" and dtype == torch.float32:
        measurements.append(partial(lidvae, seconds))
    with Progress(console=console) as progress:
        task = progress.add_task("timing", total=len(measurements) + len(FORWARD) * len(FORWARD_ROWS) + 1)

        def done(value: Any) -> Any:
            progress.advance(task)
            return value

        measured = []
        for measurement in measurements:
            # the best of all: on a shared machine one alone may fall into a slow time
            result["matmul_ceiling"] = max(result["matmul_ceiling"], matmul_ceiling(dtype, device))
            measured.append(done(measurement()))
        progress.update(task, description="again, what was timed on a busy machine")
        again_when_calm(measured, measurements, start + PATIENCE[arguments.suite])
        progress.update(task, advance=1, description="timing")
        result["rows"] = measured[: len(ROWS)]
        if len(measured) > len(ROWS):
            result["lidvae"] = measured[-1]
        for entry in result["rows"]:
            rate = entry["flops"] / (entry["milliseconds"]["ours"] * 1e-3)
            entry["fraction_of_matmul_ceiling"] = rate / result["matmul_ceiling"]
        result["forward"] = [done(forward(s, n, seconds, **options)) for s in FORWARD for n in FORWARD_ROWS]
    result["geometric_mean"] = statistics.geometric_mean([row["ratio"] for row in result["rows"]])
    result["missed"] = failures(result, baseline) if "lidvae" in result else []
    show(console, result)
    if arguments.plot:
        for picture in plots.draw(result, path.with_suffix("")):
            console.print("drawn:", str(picture))
    finish(console, path, result, arguments.check)


def finish(console: Console, path: Path, result: dict[str, Any], check: bool) -> None:
    """Write a result, and say what it missed."""
    console.print("written:", str(write(path, result)))
    for line in result["missed"]:
        console.print(f"missed: {line}")
    if check and result["missed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
