"""What gpu_acceptance.sh runs in Python. Needs torch alone; with --device cpu it is a rehearsal on small shapes.

    python -m benchmarks.gpu bench OUT.json        our steps beside their peers, prediction beside measurement
    python -m benchmarks.gpu breakdown OUT.json    time by kernel of the hottest shapes, from the profiler
    python -m benchmarks.gpu target INDEX          a few steps of one shape, for ncu to look at
    python -m benchmarks.gpu summary FOLDER        steps.tsv of a stage as stage.json and on the screen

Like for like: called eagerly beside eager peers, captured in a CUDA graph beside captured peers; the cross of the two
is reported too. Peers are those of benchmarks/peers.py, checked against float64 before they are timed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import ilvae_fast as il
from benchmarks import model, peers
from benchmarks.peers import Problem, Step
from benchmarks.record import provenance
from benchmarks.timing import Times, product, synchronise
from ilvae_fast._support.files import write_atomically

# (width, hidden, batch, latent, precision), most important first; the first MOST_COMPILED also get the compiled peer
Row = tuple[int, tuple[int, ...], int, int | None, str]
SHAPES: list[tuple[int, tuple[int, ...], int, int | None]] = [
    (32, (128, 128), 4096, None),
    (2, (64, 64), 512, None),
    (64, (64, 64), 4096, None),
    (784, (1024, 1024), 65536, 64),
    (64, (256, 256, 256), 65536, None),
    (2, (32, 32), 128, None),
    (64, (128, 128), 4096, None),
    (784, (1024, 1024), 4096, 64),
]
COMPILED: list[Row] = [
    (*SHAPES[0], "float32"),
    (*SHAPES[1], "float32"),
    (*SHAPES[3], "bfloat16"),
    (*SHAPES[0], "bfloat16"),
    (*SHAPES[3], "tf32"),
    (*SHAPES[4], "bfloat16"),
]
ROWS: list[Row] = COMPILED + [
    row for s in SHAPES for p in ("float32", "tf32", "bfloat16") if (row := (*s, p)) not in COMPILED
]
REHEARSAL: list[Row] = [(2, (16, 16), 32, None, "float32"), (8, (12,), 16, 3, "bfloat16"), (2, (16,), 32, None, "tf32")]
HOTTEST: list[Row] = [(*SHAPES[0], "float32"), (*SHAPES[3], "bfloat16"), (*SHAPES[1], "float32")]
TOLERANCE = {"float32": 1e-4, "tf32": 2e-2, "bfloat16": 1e-1}
OURS = "ours"


def rows(device: str) -> list[Row]:
    return ROWS if device == "cuda" else REHEARSAL


def hottest(device: str) -> list[Row]:
    return HOTTEST if device == "cuda" else REHEARSAL[:2]


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def placed(problem: Problem, device: str) -> Problem:
    problem.tensors = [t.detach().to(device).requires_grad_() for t in problem.tensors]
    problem.x, problem.skip_weight, problem.bias, *problem.weights = problem.tensors
    problem.v, problem.constant = problem.v.to(device), problem.constant.to(device)
    return problem


def dtype_of(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def problem_of(row: Row, device: str, batch: int | None = None, double: bool = False) -> Problem:
    width, hidden, rows, latent, precision = row
    dtype = torch.float64 if double else dtype_of(precision)
    return placed(Problem(width, hidden, batch or rows, latent, dtype), device)


def check(name: str, make: Callable[[Problem], Step], row: Row, device: str) -> float:
    """The largest relative error against float64, on at most 2048 rows; refuses to time what is not right."""
    batch = min(row[2], 2048)
    exact = peers.eager(problem_of(row, device, batch, double=True))()
    step = make(problem_of(row, device, batch))
    worst = 0.0
    for ours, truth in zip(step(), exact, strict=True):
        worst = max(worst, float((ours.double() - truth).detach().abs().max() / truth.detach().abs().max()))
    if not worst < TOLERANCE[row[4]]:
        raise RuntimeError(f"{name} is wrong on {row}: relative error {worst:.1e}")
    return worst


def captured(step: Step) -> Callable[[], Any]:
    """The step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def medians(steps: dict[str, Callable[[], Any]], device: str, seconds: float) -> dict[str, dict[str, float]]:
    """Median microseconds of each step, interleaved, from call to end of work; spread: half the quartile distance."""
    repeats: dict[str, int] = {}
    for name, step in steps.items():
        for _ in range(3):
            step()
        synchronise(device)
        start = time.perf_counter()
        step()
        synchronise(device)
        repeats[name] = max(1, min(200, int(0.005 / max(time.perf_counter() - start, 1e-7))))
    times = {name: Times([]) for name in steps}
    end = time.perf_counter() + seconds * len(steps)
    while time.perf_counter() < end or len(next(iter(times.values())).turns) < 5:
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                step()
            synchronise(device)
            times[name].turns.append((time.perf_counter() - start) / repeats[name])
    return {name: {"microseconds": t.median * 1e6, "spread": t.spread} for name, t in times.items()}


def ceilings(device: str) -> dict[str, float]:
    """Measured rates of large products (flop/s) by precision, and of a copy (bytes/s, read and written)."""
    n = 8192 if device == "cuda" else 256
    found = {}
    for precision in model.PRECISIONS:
        step = product(dtype_of(precision), device, n)
        with matmul_precision(precision):
            t = medians({"mm": step}, device, 0.3)["mm"]["microseconds"]
        found[precision] = 2 * n**3 / t * 1e6
    source = torch.empty(2**28 if device == "cuda" else 2**20, device=device)
    target = torch.empty_like(source)
    t = medians({"copy": lambda: target.copy_(source)}, device, 0.3)["copy"]["microseconds"]
    return {**found, "copy": 2 * source.nbytes / t * 1e6}


def saved_bytes(make: Callable[[Problem], Step], row: Row, device: str) -> int:
    """What autograd keeps from forward to backward, besides the inputs."""
    problem = problem_of(row, device)
    inputs = {t.untyped_storage().data_ptr() for t in [*problem.tensors, problem.v, problem.constant]}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in inputs:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        make(problem)()
    return sum(kept.values())


def kernels_of(step: Step, device: str) -> dict[str, dict[str, float]]:
    """Launches and microseconds by kernel of one step."""
    from torch.profiler import ProfilerActivity, profile

    step()
    synchronise(device)
    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if device == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=kinds) as profiler:
        step()
        synchronise(device)
    found: dict[str, dict[str, float]] = {}
    for event in profiler.events():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device == (device == "cuda"):
            entry = found.setdefault(event.name, {"launches": 0, "microseconds": 0.0})
            entry["launches"] += 1
            entry["microseconds"] += event.self_device_time_total if on_device else event.self_cpu_time_total
    return found


def measure(row: Row, device: str, compiled: bool, ceiling: dict[str, float], seconds: float) -> dict[str, Any]:
    width, hidden, batch, latent, precision = row
    made: dict[str, Callable[[Problem], Step]] = {OURS: peers.ours}
    made |= {"ours, stateless": peers.ours_stateless, "eager double backward": peers.eager}
    made["closed form"] = peers.closed_form
    if compiled:
        made["closed form, compiled"] = peers.closed_form_compiled
    if latent:
        made["expert, injected"] = peers.expert
    with matmul_precision(precision):
        errors = {name: check(name, make, row, device) for name, make in made.items()}
        torch.compiler.reset()
        steps = {name: make(problem_of(row, device)) for name, make in made.items()}
        eager_times = medians(dict(steps), device, seconds)
        graphs = {name: captured(step) for name, step in steps.items()} if device == "cuda" else {}
        graph_times = medians(dict(graphs), device, seconds) if graphs else {}
        plan = functools.partial(il.plan, batch, width, hidden, embedding_features=latent, dtype=dtype_of(precision))
        route = plan(device=device).route
        saved = {name: saved_bytes(made[name], row, device) for name in (OURS, "eager double backward")}
    network = model.Network(width, hidden, batch, latent)
    gpu = model.gpu_of(torch.cuda.get_device_name()) if device == "cuda" else model.GPUS["H100"]
    predicted = sum(model.seconds(network, precision, gpu, route)) * 1e6 if gpu else None
    least = plan(recompute=False)
    flops = least.map_flops + least.training_flops
    peer_names = [n for n in made if n not in (OURS, "ours, stateless", "expert, injected")]
    peer = "best peer" if compiled else "best eager peer"

    def best(times: dict[str, dict[str, float]]) -> float | None:
        return min(times[n]["microseconds"] for n in peer_names) if times else None

    ours_eager = eager_times[OURS]["microseconds"]
    ours_graph = graph_times[OURS]["microseconds"] if graph_times else None
    best_eager, best_graph = best(eager_times), best(graph_times)
    of_device = ours_graph or ours_eager
    return {
        "row": f"{network} {precision}",
        "route": route,
        "called": eager_times,
        "captured": graph_times,
        "errors": errors,
        "ratios": {
            "eager double backward / ours, both called": eager_times["eager double backward"]["microseconds"]
            / ours_eager,
            f"{peer} / ours, both called": best_eager / ours_eager if best_eager else None,
            f"{peer} / ours, both captured": best_graph / ours_graph if best_graph and ours_graph else None,
            f"{peer} captured / ours called": best_graph / ours_eager if best_graph else None,
            f"{peer} called / ours captured": best_eager / ours_graph if best_eager and ours_graph else None,
        },
        "predicted_microseconds": predicted,
        "flops": flops,
        "fraction_of_matmul_ceiling": flops / of_device * 1e6 / ceiling[precision],
        "saved_bytes": saved,
    }


def add_kernels(measured: dict[str, Any], row: Row, device: str) -> None:
    """The kernels of our step; refuses a row that was not what its plan said."""
    with matmul_precision(row[4]):
        kernels = kernels_of(peers.ours(problem_of(row, device)), device)
    if device != "cuda":
        return
    measured["kernels"] = kernels
    fused = any(part in name for name in kernels for part in ("tile_kernel", "streamed_kernel"))
    if not kernels or fused != (measured["route"] == "fused"):
        raise RuntimeError(f"planned route {measured['route']}, but the kernels were {sorted(kernels) or 'not seen'}")


def bench(out: Path, device: str, seconds: float) -> int:
    end = time.perf_counter() + seconds
    result: dict[str, Any] = {**_about(device), "ceilings": ceilings(device), "rows": [], "failed": [], "cut_off": []}
    print("measured ceilings:", {k: f"{v:.3g}" for k, v in result["ceilings"].items()}, flush=True)
    if device == "cpu":
        torch.compile = functools.partial(torch.compile, backend="eager")

    def attempt(name: str, reserve: float, work: Callable[[], None]) -> None:
        if time.perf_counter() > end - reserve * (device == "cuda"):
            result["cut_off"].append(name)
            return
        try:
            work()
        except Exception as error:  # one shape that fails must not cost the others
            result["failed"].append({"row": name, "error": f"{type(error).__name__}: {error}"})
            print(f"FAILED {name}: {error}", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
        write_atomically(out, json.dumps(result, indent=1) + "\n")

    def time_row(row: Row, compiled: bool) -> None:
        measured = measure(row, device, compiled, result["ceilings"], 0.25 if device == "cuda" else 0.01)
        result["rows"].append(measured)
        timed.append((row, measured))
        _print(measured)

    timed: list[tuple[Row, dict[str, Any]]] = []
    for i, row in enumerate(rows(device)):
        attempt(f"{model.Network(*row[:4])} {row[4]}", 60, functools.partial(time_row, row, i < len(COMPILED)))
    # last: what a profiler leaves behind may slow every launch after it
    for row, measured in timed:
        attempt(f"kernels of {measured['row']}", 5, functools.partial(add_kernels, measured, row, device))
    for name in result["cut_off"]:
        print("CUT OFF", name)
    write_atomically(out, json.dumps(result, indent=1) + "\n")
    return 1 if result["failed"] else 0


def _print(row: dict[str, Any]) -> None:
    def line(times: dict[str, dict[str, float]]) -> str:
        return ", ".join(f"{name} {t['microseconds']:.0f}" for name, t in times.items())

    print(f"{row['row']} ({row['route']} route), microseconds")
    print(f"  called:   {line(row['called'])}")
    if row["captured"]:
        print(f"  captured: {line(row['captured'])}")
    predicted = row["predicted_microseconds"]
    if predicted is not None:
        print(f"  predicted (model, on the device alone): {predicted:.0f}")
    print("  " + ", ".join(f"{name}: {r:.2f}" for name, r in row["ratios"].items() if r is not None))
    print(f"  {row['fraction_of_matmul_ceiling']:.0%} of the measured matmul ceiling", flush=True)


def breakdown(out: Path, device: str) -> int:
    result: dict[str, Any] = {**_about(device), "rows": []}
    for row in hottest(device):
        with matmul_precision(row[4]):
            kernels = kernels_of(peers.ours(problem_of(row, device)), device)
        ordered = dict(sorted(kernels.items(), key=lambda item: -item[1]["microseconds"])[:20])
        result["rows"].append({"row": f"{model.Network(*row[:4])} {row[4]}", "kernels": ordered})
        print(result["rows"][-1]["row"])
        for name, entry in ordered.items():
            print(f"  {entry['microseconds']:10.1f} us {entry['launches']:4.0f} x {name[:120]}")
    write_atomically(out, json.dumps(result, indent=1) + "\n")
    return 0


def target(index: int, device: str) -> int:
    row = hottest(device)[index]
    with matmul_precision(row[4]):
        step = peers.ours(problem_of(row, device))
        for _ in range(3):
            step()
        synchronise(device)
    return 0


def _about(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else "none: a rehearsal on the CPU"
    return {**provenance(), "device": name, "rehearsal": device != "cuda"}


def summary(folder: Path) -> int:
    """Exit status 1 if a step failed; what was cut off is named and is no failure."""
    steps = []
    for line in (folder / "steps.tsv").read_text().splitlines():
        name, status, seconds, command = line.split("\t", 3)
        steps.append({"step": name, "status": status, "seconds": int(seconds), "command": command})
    write_atomically(folder / "stage.json", json.dumps({**provenance(), "steps": steps}, indent=1) + "\n")
    print(f"\n{folder.name}: logs and JSON in {folder}")
    for step in steps:
        print(f"  {step['status']:<10s} {step['seconds']:4d} s  {step['step']}")
    return int(any(step["status"] == "failed" for step in steps))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["bench", "breakdown", "target", "summary"])
    parser.add_argument("where", help="a file or folder, or an index")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=450.0)
    a = parser.parse_args()
    if a.what == "bench":
        return bench(Path(a.where), a.device, a.seconds)
    if a.what == "breakdown":
        return breakdown(Path(a.where), a.device)
    if a.what == "target":
        return target(int(a.where), a.device)
    return summary(Path(a.where))


if __name__ == "__main__":
    sys.exit(main())
