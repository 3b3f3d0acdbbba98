"""Memory of a training step, by row and implementation: python -m benchmarks.memory

Every figure comes from a process of its own (Linux): the growth of the resident set to its peak within one step, after
a step on one row has loaded the code and free memory went back to the system; and the bytes kept from forward to
backward besides inputs, parameters and weights.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ilvae_fast as il
from benchmarks import peers
from benchmarks.peers import Problem, Step
from benchmarks.record import provenance, write
from benchmarks.suite import ROWS
from ilvae_fast import functional

IMPLEMENTATIONS: dict[str, Callable[[Problem], Step]] = {
    "ours": peers.ours,
    "ours, recompute": partial(peers.ours, recompute=True),
    "ours, matmul": partial(peers.ours, route="matmul"),
    "eager double backward": peers.eager,
    "closed form": peers.closed_form,
}
# The map alone under no_grad: beyond its output, memory is to be flat in the number of rows
FORWARD = [Problem(64, (256, 256, 256), n) for n in (4096, 65536)]


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def _peak(run: Any) -> int:
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    result = run()
    peak = _status("VmHWM")
    del result
    return peak - before


def _kept(problem: Problem, run: Any) -> int:
    own = {t.untyped_storage().data_ptr() for t in (*problem.tensors, problem.constant, problem.v)}
    storages: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(storages.values())


def one(row: int, name: str) -> dict[str, int]:
    """Of one implementation, in this process."""
    problem = ROWS[row].problem()
    make = IMPLEMENTATIONS[name]
    make(replace(problem, batch=1))()
    step = make(problem)
    peak = _peak(step)
    return {"peak": peak, "kept": _kept(problem, step)}


def one_forward(index: int) -> dict[str, int]:
    problem = FORWARD[index]

    def run(p: Problem) -> torch.Tensor:
        with torch.no_grad():
            operands = (p.x, p.skip_weight, p.bias, p.weights)
            return functional.brenier_map(*operands, activations=p.activations, inverse_lipschitz=p.constant)

    run(replace(problem, batch=1))
    return {"peak": _peak(lambda: run(problem)), "output": problem.batch * problem.width * problem.dtype.itemsize}


def _child(*arguments: str) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(one(int(sys.argv[1]), sys.argv[2])))
        return
    if len(sys.argv) == 2:
        print(json.dumps(one_forward(int(sys.argv[1]))))
        return
    rows, forward = [], []
    print(f"{'MiB, peak (kept)':28s}" + "".join(f"{name:>24s}" for name in IMPLEMENTATIONS))
    for k, row in enumerate(ROWS):
        problem = row.problem()
        plan = il.plan(problem.batch, problem.width, problem.hidden, embedding_features=problem.latent)
        figures = {name: _child(str(k), name) for name in IMPLEMENTATIONS}
        rows.append({"row": str(problem), "route": plan.route, "recompute": plan.recompute, "bytes": figures})
        cells = (f"{f['peak'] / 2**20:.2f} ({f['kept'] / 2**20:.2f})" for f in figures.values())
        print(f"{problem!s:28s}" + "".join(f"{cell:>24s}" for cell in cells))
    for k, problem in enumerate(FORWARD):
        figure = _child(str(k))
        forward.append({"row": str(problem), **figure})
        beyond = (figure["peak"] - figure["output"]) / 2**20
        print(f"map under no_grad, {problem}: {beyond:.2f} MiB beyond its output")
    print("written:", write("memory", {**provenance(), "rows": rows, "forward": forward}))


if __name__ == "__main__":
    main()
