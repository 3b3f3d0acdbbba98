"""Second order: what users of convex potentials write themselves, and the Hessian, against plain torch.

    python -m benchmarks --suite second-order

A *gradient penalty* takes the map by ``torch.autograd.grad(potential.sum(), x, create_graph=True)``, as code does that
knows nothing of maps, squares it and goes back to the parameters. It is timed against the same step written with the
map, and against plain torch. *logabsdet* is ``log |det dT/dx|`` and its backward pass, against the closed Hessian in
plain torch, compiled and not, and against Jacobians by ``torch.func``. Every step's results are checked against float64
before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.peers import Problem, Step, check
from benchmarks.timing import Times, interleaved
from ilvae_fast import functional
from ilvae_fast.operators.hessian import hessian
from ilvae_fast.operators.operands import prepare

PENALTY = [(2, (64, 64), 1024), (64, (256, 256), 256)]
LOGABSDET = [(2, (64, 64), 256), (8, (64, 64), 256), (32, (64, 64), 128), (64, (128, 128), 64)]
PENALTY_WANTED = 1.5  # at most, by autograd / by the map
LOGABSDET_WANTED = 2.0  # at least, the compiled closed Hessian / ours
TOLERANCE = 2e-3  # of float32 against float64: third derivatives


def _ours(problem: Problem) -> tuple[list[Any], dict[str, Any]]:
    options = {"activations": problem.activations, "inverse_lipschitz": problem.constant}
    return [problem.skip_weight, problem.bias, problem.weights], options


def _penalty(problem: Problem, gradient: Callable[[Tensor], Tensor]) -> Step:
    return lambda: list(torch.autograd.grad(gradient(problem.x).square().sum(), problem.tensors))


def penalty_by_autograd(problem: Problem) -> Step:
    """Ours, in code that takes the gradient of the potential by autograd."""
    operands, options = _ours(problem)

    def gradient(x: Tensor) -> Tensor:
        phi = functional.potential(x, *operands, **options)
        return torch.autograd.grad(phi.sum(), x, create_graph=True)[0]

    return _penalty(problem, gradient)


def penalty_by_the_map(problem: Problem) -> Step:
    """Ours, in code that calls the map."""
    operands, options = _ours(problem)
    return _penalty(problem, lambda x: functional.brenier_map(x, *operands, **options))


def penalty_by_plain_torch(problem: Problem) -> Step:
    """The potential as everybody writes it, twice by autograd."""

    def gradient(x: Tensor) -> Tensor:
        phi = peers.potential(x, problem.skip_weight, problem.bias, problem.weights, problem.constant)
        return torch.autograd.grad(phi.sum(), x, create_graph=True)[0]

    return _penalty(problem, gradient)


def _logabsdet(problem: Problem, jacobian: Callable[..., Tensor]) -> Step:
    def step() -> list[Tensor]:
        value = torch.linalg.slogdet(jacobian(*problem.tensors)).logabsdet
        return [value.detach(), *torch.autograd.grad(value.sum(), problem.tensors)]

    return step


def logabsdet(problem: Problem) -> Step:
    """Ours, as :meth:`ilvae_fast.BrenierMap.logabsdet` has it."""

    def jacobian(x: Tensor, skip_weight: Tensor, bias: Tensor, *weights: Tensor) -> Tensor:
        constant = problem.constant
        return hessian(prepare(x, skip_weight, bias, weights, problem.activations, constant, None, "auto", None, False))

    return _logabsdet(problem, jacobian)


def closed_hessian(constant: Tensor, x: Tensor, skip_weight: Tensor, bias: Tensor, *weights: Tensor) -> Tensor:
    """The Hessian of a softplus potential as an expert writes it in torch; differentiate it once."""
    widths = [w.shape[1] for w in weights]
    *pre, _ = F.linear(x, skip_weight, bias).split([*widths, 1], dim=1)
    skips = skip_weight.split([*widths, 1])
    a = pre[0]
    slopes = [torch.sigmoid(a)]
    for weight, skip in zip(weights[:-1], pre[1:], strict=True):
        a = skip + F.softplus(a) @ weight.mT
        slopes.append(torch.sigmoid(a))
    adjoint = weights[-1].expand(len(x), -1)
    adjoints = [adjoint]
    for k in range(len(pre) - 1, 0, -1):
        adjoint = (adjoint * slopes[k]) @ weights[k - 1]
        adjoints.insert(0, adjoint)
    total = constant * torch.eye(x.shape[1], dtype=x.dtype)
    tangents = skips[0].mT.expand(len(x), -1, -1)
    for k, slope in enumerate(slopes):
        if k:
            tangents = skips[k].mT + (tangents * slopes[k - 1].unsqueeze(1)) @ weights[k - 1].mT
        curvature = adjoints[k] * slope * (1 - slope)
        total = total + (tangents * curvature.unsqueeze(1)) @ tangents.mT
    return total


def logabsdet_closed(problem: Problem) -> Step:
    """The closed Hessian in plain torch."""
    return _logabsdet(problem, lambda *tensors: closed_hessian(problem.constant, *tensors))


def logabsdet_compiled(problem: Problem) -> Step:
    """The closed Hessian under torch.compile."""
    compiled = torch.compile(closed_hessian, fullgraph=True, dynamic=False)
    return _logabsdet(problem, lambda *tensors: compiled(problem.constant, *tensors))


def logabsdet_by_func(problem: Problem) -> Step:
    """``torch.func.hessian`` of the potential as everybody writes it."""

    def jacobian(x: Tensor, skip_weight: Tensor, bias: Tensor, *weights: Tensor) -> Tensor:
        def potential(row: Tensor) -> Tensor:
            return peers.potential(row, skip_weight, bias, weights, problem.constant).squeeze()

        return torch.func.vmap(torch.func.hessian(potential))(x)

    return _logabsdet(problem, jacobian)


Makers = dict[str, Callable[[Problem], Step]]
PENALTY_STEPS: Makers = {
    "by autograd": penalty_by_autograd,
    "by the map": penalty_by_the_map,
    "plain torch": penalty_by_plain_torch,
}
LOGABSDET_STEPS: Makers = {
    "ours": logabsdet,
    "closed, compiled": logabsdet_compiled,
    "closed": logabsdet_closed,
    "torch.func": logabsdet_by_func,
}


def row(shape: tuple[int, tuple[int, ...], int], makers: Makers, truth: str, seconds: float) -> dict[str, Any]:
    """Times of all steps of one problem, after they were checked against float64."""
    problem = Problem(*shape)
    torch.compiler.reset()
    exact = [t.detach() for t in makers[truth](problem.double())()]
    steps = {name: make(problem) for name, make in makers.items()}
    for name, step in steps.items():
        check(name, problem, step, exact, TOLERANCE)
    times: dict[str, Times] = interleaved(steps, seconds)
    first = times[next(iter(makers))]
    return {
        "row": str(problem),
        "milliseconds": {name: t.median * 1e3 for name, t in times.items()},
        "over_ours": {name: t.over(first) for name, t in times.items()},
    }


def measure(console: Console, seconds: float) -> dict[str, Any]:
    """All rows."""
    jobs = [("penalty", shape, PENALTY_STEPS, "plain torch") for shape in PENALTY]
    jobs += [("logabsdet", shape, LOGABSDET_STEPS, "torch.func") for shape in LOGABSDET]
    result: dict[str, Any] = {"penalty": [], "logabsdet": []}
    for kind, shape, makers, truth in track(jobs, "timing", console=console):
        result[kind].append(row(shape, makers, truth, seconds))
    result["missed"] = [
        f"penalty {r['row']}: by autograd / by the map: got {1 / r['over_ours']['by the map']:.2f}, "
        f"wanted at most {PENALTY_WANTED}"
        for r in result["penalty"]
        if 1 / r["over_ours"]["by the map"] > PENALTY_WANTED
    ] + [
        f"logabsdet {r['row']}: compiled closed Hessian / ours: got {r['over_ours']['closed, compiled']:.2f}, "
        f"wanted {LOGABSDET_WANTED}"
        for r in result["logabsdet"]
        if r["over_ours"]["closed, compiled"] < LOGABSDET_WANTED
    ]
    return result


def show(console: Console, result: dict[str, Any]) -> None:
    """One table for each kind."""
    for kind in ("penalty", "logabsdet"):
        table = Table(title=f"{kind}: milliseconds forward and backward")
        names = list(result[kind][0]["milliseconds"])
        for heading in ("d, hidden, N", *names):
            table.add_column(heading, justify="right")
        for entry in result[kind]:
            table.add_row(entry["row"], *(f"{entry['milliseconds'][name]:.3f}" for name in names))
        console.print(table)
