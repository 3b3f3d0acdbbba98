"""The inverse of a Brenier map, against batched L-BFGS on the same fused kernels.

    python -m benchmarks --suite inverse

Maps as they are initialised, and fitted to one that sends the normal distribution to 16 clusters, where the Jacobian
falls to L between its ridges. To 1e-10 in float64, and to 1e-5 in float32. The peer is what one writes for the minimum
of phi(x) - <x, y>: all rows at once, memory 10, steps halved until the value falls. It calls our potential and map, and
so has the same kernels. Before it is timed, each step's |T(x) - y| is looked at in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import ilvae_fast as il
from benchmarks.timing import interleaved

SHAPES = [(2, (64, 64), 1024), (16, (128, 128), 1024), (64, (128, 128), 1024), (784, (512, 512), 128)]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
WANTED = 1.0  # at least, the peer / ours
CONSTANT = 0.1
_MEMORY = 10
_STEPS = 1000
_HALVINGS = 30


def fitted(d: int, hidden: tuple[int, ...], steps: int) -> il.BrenierMap:
    """A map fitted to the gradient of a smoothed maximum of 16 affine functions."""
    torch.manual_seed(0)
    layer = il.BrenierMap(d, hidden, inverse_lipschitz=CONSTANT)
    centres = 6 * torch.randn(16, d) / d**0.5
    offsets = 2 * centres.square().sum(1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    for _ in range(steps):
        x = torch.randn(512, d)
        target = torch.softmax(4 * x @ centres.T - offsets, -1) @ centres + CONSTANT * x
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    return layer


@torch.no_grad()
def lbfgs(layer: il.BrenierMap, y: Tensor, tolerance: float) -> Tensor:
    """x with ``|T(x) - y| <= tolerance (1 + |y|)``, by L-BFGS (Nocedal & Wright, algorithm 7.4)."""
    wanted = tolerance * (1 + y.norm(dim=-1, keepdim=True))
    rounding = 1e-13 if y.dtype == torch.float64 else 1e-6

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(-1, keepdim=True)

    def look(x: Tensor) -> tuple[Tensor, Tensor]:
        phi, t = layer.potential_and_map(x)
        return phi.unsqueeze(-1) - dot(x, y), t - y

    x = y
    value, slope = look(x)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(_STEPS):
        if bool((slope.norm(dim=-1, keepdim=True) <= wanted).all()):
            return x
        direction, along = slope, []
        for step, change, inverse in reversed(pairs):
            along.append(inverse * dot(step, direction))
            direction = direction - along[-1] * change
        if pairs:
            step, change, inverse = pairs[-1]
            direction = direction * torch.where(inverse > 0, dot(step, change) / dot(change, change), 1.0)
        for (step, change, inverse), a in zip(pairs, reversed(along), strict=True):
            direction = direction + (a - inverse * dot(change, direction)) * step
        promised, length = dot(slope, direction), torch.ones_like(value)
        for _ in range(_HALVINGS):
            there = x - length * direction
            new_value, new_slope = look(there)
            long = ~(new_value <= value - 1e-4 * length * promised + rounding * (1 + value.abs()))
            if not long.any():
                break
            length = torch.where(long, length / 2, length)
        step, change = there - x, new_slope - slope
        product = dot(step, change)
        pairs = [*pairs[1 - _MEMORY :], (step, change, torch.where(product > 0, 1 / product, 0.0))]
        x, value, slope = there, new_value, new_slope
    raise SystemExit(f"L-BFGS: |T(x) - y| is not down to {tolerance:g} after {_STEPS} steps")


STEPS: dict[str, Callable[[il.BrenierMap, Tensor, float], Tensor]] = {
    "ours": lambda layer, y, tolerance: layer.inverse(y, tolerance=tolerance),
    "L-BFGS": lbfgs,
}


def row(layer: il.BrenierMap, kind: str, rows: int, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """Times of both on values that the map takes at normal x, after their results were checked."""
    exact, tolerance = copy.deepcopy(layer).double(), TOLERANCES[dtype]
    layer = copy.deepcopy(layer).to(dtype)
    x = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        y = layer(x)
        for method, invert in STEPS.items():
            wanted = y.double()
            error = (exact(invert(layer, y, tolerance).double()) - wanted).norm(dim=-1) / (1 + wanted.norm(dim=-1))
            # the peer of float32 looks at values of float32, whose rounding is beside the point here
            if not float(error.max()) <= (2 * tolerance if dtype == torch.float32 else 1.01 * tolerance):
                raise SystemExit(f"{method}: |T(x) - y| is {float(error.max()):.3g}, wanted {tolerance:g}")
        steps: dict[str, Callable[[], Any]] = {name: partial(f, layer, y, tolerance) for name, f in STEPS.items()}
        times = interleaved(steps, seconds)
    return {
        "row": f"{layer.in_features}, {'x'.join(map(str, layer.hidden_features))}, {rows}, {kind}",
        "dtype": str(dtype).removeprefix("torch."),
        "tolerance": tolerance,
        "milliseconds": {method: t.median * 1e3 for method, t in times.items()},
        "ratio": times["L-BFGS"].over(times["ours"]),
    }


def measure(console: Console, seconds: float) -> dict[str, Any]:
    """All rows."""
    result: dict[str, Any] = {"rows": []}
    jobs = [(*shape, name) for shape in SHAPES for name in ("fresh", "fitted")]
    for d, hidden, rows, name in track(jobs, "timing", console=console):
        torch.manual_seed(0)
        fresh = il.BrenierMap(d, hidden, inverse_lipschitz=CONSTANT)
        layer = fresh if name == "fresh" else fitted(d, hidden, 200 if d > 100 else 600)
        result["rows"] += [row(layer, name, rows, dtype, seconds) for dtype in TOLERANCES]
    result["missed"] = [
        f"inverse {r['row']}, {r['dtype']}: L-BFGS / ours: got {r['ratio']:.2f}, wanted {WANTED}"
        for r in result["rows"]
        if r["ratio"] < WANTED
    ]
    return result


def show(console: Console, result: dict[str, Any]) -> None:
    """One table."""
    table = Table(title="inverse: milliseconds")
    for heading in ("d, hidden, N, map", "dtype", "to", *STEPS, "L-BFGS / ours"):
        table.add_column(heading, justify="right")
    for entry in result["rows"]:
        times = (f"{entry['milliseconds'][name]:.1f}" for name in STEPS)
        table.add_row(entry["row"], entry["dtype"], f"{entry['tolerance']:g}", *times, f"{entry['ratio']:.2f}")
    console.print(table)
