"""Random networks for the CUDA kernels, and what the host executor (tests/executor) makes of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comparison import assert_as_accurate_as_eager
from executor import Program
from ilvae_fast import Activation, reference
from ilvae_fast.operators.activations import encode

DTYPES = {"tf32x3": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # DType of csrc/cuda/dtype.h
SOFT = (Activation("softplus"),) * 5


@dataclass
class Problem:
    """Tensors of one network and batch, rounded to ``dtype``, and cotangents of the map (v) and potential (u)."""

    dtype: torch.dtype
    activations: tuple[Activation, ...]
    named: dict[str, Tensor]
    v: Tensor | None
    u: Tensor | None

    @classmethod
    def random(cls, dtype, rows, width, hidden, activations, *, inputs=None, v=True, u=True, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, scale=1.0):
            return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

        units = sum(hidden) + 1
        named = {
            "x": normal(rows, inputs or width),
            "skip_weight": normal(units, width, scale=width**-0.5),
            "bias": normal(units, scale=0.3),
            "inverse_lipschitz": torch.tensor([0.7]),
        }
        for k, (below, above) in enumerate(itertools.pairwise((*hidden, 1))):
            named[f"weights[{k}]"] = normal(above, below, scale=1.5 / below).abs()
        return cls(dtype, activations, named, normal(rows, width) if v else None, normal(rows) if u else None)

    def to(self, dtype) -> Problem:
        named = {n: t.to(dtype) for n, t in self.named.items()}
        if dtype in (torch.bfloat16, torch.float16):
            named["inverse_lipschitz"] = self.named["inverse_lipschitz"]
        v, u = (None if t is None else t.to(dtype) for t in (self.v, self.u))
        return Problem(dtype, self.activations, named, v, u)

    def weights(self) -> list[Tensor]:
        return [t for n, t in self.named.items() if n.startswith("weights")]

    def row(self, i: int) -> Problem:
        named = {n: t[i : i + 1] if n == "x" else t for n, t in self.named.items()}
        v, u = (None if t is None else t[i : i + 1] for t in (self.v, self.u))
        return Problem(self.dtype, self.activations, named, v, u)

    def shuffled(self, seed: int) -> tuple[Problem, dict[str, tuple[Tensor, ...]]]:
        """The same network with units and coordinates permuted, and the permutation of each axis of each result."""
        generator = torch.Generator().manual_seed(seed)

        def order(*sizes):
            starts = itertools.accumulate((0, *sizes[:-1]))
            return torch.cat([a + torch.randperm(n, generator=generator) for a, n in zip(starts, sizes, strict=True)])

        hidden = [w.shape[1] for w in self.weights()]
        inputs, width = self.named["x"].shape[1], self.named["skip_weight"].shape[1]
        rows, columns = torch.arange(self.named["x"].shape[0]), order(inputs, width - inputs)
        layers = [order(n) for n in hidden]
        output = torch.arange(1)
        starts = itertools.accumulate((0, *hidden))
        units = torch.cat([start + o for start, o in zip(starts, (*layers, output), strict=True)])
        axes = {
            "x": (rows, columns[:inputs]),
            "skip_weight": (units, columns),
            "bias": (units,),
            "inverse_lipschitz": (output,),
        }
        for k, (below, above) in enumerate(itertools.pairwise((*layers, output))):
            axes[f"weights[{k}]"] = (above, below)
        named = {n: t[torch.meshgrid(*axes[n], indexing="ij")] for n, t in self.named.items()}
        v = None if self.v is None else self.v[:, columns]
        orders = {f"grad of {n}": a for n, a in axes.items()} | {"potential": (rows,), "map": (rows, columns)}
        return Problem(self.dtype, self.activations, named, v, self.u), orders

    def plain_in_other_orders(self, count: int) -> dict[str, Tensor]:
        """:meth:`plain`, and ``count`` times the same with sums in other orders, stacked."""
        results = [self.plain()]
        for seed in range(count):
            other, orders = self.shuffled(seed)
            back = {}
            for name, value in other.plain().items():
                back[name] = torch.empty_like(value)
                back[name][torch.meshgrid(*orders[name], indexing="ij")] = value
            results.append(back)
        return {name: torch.stack([r[name] for r in results]) for name in results[0]}

    def absolute_terms(self) -> dict[str, Tensor]:
        """For each gradient, the sum over rows of the absolute contributions."""
        rows = [self.row(i).plain() for i in range(self.named["x"].shape[0])]
        return {n: torch.stack([r[n].abs() for r in rows]).sum(0) for n in rows[0] if n.startswith("grad")}

    def plain(self) -> dict[str, Tensor]:
        """Potential, map and gradients by autograd through the reference."""
        named = {n: t.detach().clone().requires_grad_() for n, t in self.named.items()}
        width = named["skip_weight"].shape[1]
        phi, t = reference.potential_and_map(
            named["x"],
            named["skip_weight"],
            named["bias"],
            [t for n, t in named.items() if n.startswith("weights")],
            activations=self.activations,
            inverse_lipschitz=named["inverse_lipschitz"],
            embedding=None if named["x"].shape[1] == width else width,
        )
        result = {"potential": phi.detach(), "map": t.detach()}
        loss = 0 * phi.sum()
        if self.v is not None:
            loss = loss + (self.v * t).sum()
        if self.u is not None:
            loss = loss + (self.u * phi).sum()
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for (name, t), g in zip(named.items(), gradients, strict=True):
            result[f"grad of {name}"] = torch.zeros_like(t) if g is None else g
        return result


def padded(problem: Problem, streamed: bool = False) -> tuple[int, int]:
    """The narrowest shape that is compiled for a network: see csrc/cuda/fused_shapes.h."""
    hidden = max(t.shape[1] for t in problem.weights())
    width = problem.named["skip_weight"].shape[1]
    n = next(n for n in ((128, 256) if streamed else (32, 64, 128)) if n >= hidden)
    widths = (64, 256) if streamed else (16, 64) if n < 128 else (32, 64, 128)
    return n, next(d for d in widths if d >= width)


def program(
    kind: str, problem: Problem, training: bool, mode: str = "plain", streamed: bool = False, **fault: Any
) -> Program:
    """The kernel for a network, of the map or of the training terms; ``fault`` plants one, see :class:`Program`."""
    n, d = padded(problem, streamed)
    layers = 0 if not training else 1 if streamed else len(problem.weights())
    shape = {"KIND": kind, "WIDTH": n, "INPUT": d, "LAYERS": layers, "STREAMED": int(streamed)}
    return Program("fused", mode, shape, **fault)


@dataclass
class Stacks:
    """The operands of the products that end the training terms with streamed weights (FusedCall, csrc/cuda/fused.h)."""

    x: Tensor
    h: Tensor
    d: Tensor

    @classmethod
    def of(cls, problem: Problem) -> Stacks:
        rows, width = problem.named["x"].shape[0], problem.named["skip_weight"].shape[1]
        hidden = [w.shape[1] for w in problem.weights()]

        def stack(columns):
            return torch.full((2 * rows, -(-columns // 8) * 8), float("nan"), dtype=problem.dtype)

        return cls(stack(width), stack(sum(hidden[:-1])), stack(sum(hidden)))

    def gradients(self, problem: Problem) -> dict[str, Tensor]:
        """The gradients of A, except its last row, and of W_2 .. W_K."""
        width, hidden = problem.named["skip_weight"].shape[1], [w.shape[1] for w in problem.weights()]

        def product(d, z):
            return (d.float().T @ z.float()).to(problem.dtype)

        d = self.d[:, : sum(hidden)].split(hidden, dim=1)
        h = self.h[:, : sum(hidden[:-1])].split(hidden[:-1], dim=1)
        result = {f"weights[{k}]": product(d[k + 1], h[k]) for k in range(len(hidden) - 1)}
        return {"skip_weight": product(self.d[:, : sum(hidden)], self.x[:, :width]), **result}


@dataclass
class Sums:
    """The gradients that the kernels add up over the rows themselves: all of them, or, with streamed weights, what
    :class:`Stacks` does not hold."""

    shapes: dict[str, tuple[int, ...]]
    gradients: Tensor  # one after another
    constant: Tensor
    partial: Tensor  # scratch of the blocks

    @classmethod
    def of(cls, problem: Problem, streamed: bool = False, blocks: int = 2) -> Sums:
        shapes = {n: tuple(t.shape) for n, t in problem.named.items() if n not in ("x", "inverse_lipschitz")}
        if streamed:
            last = f"weights[{len(problem.weights()) - 1}]"
            shapes = {
                "skip_weight": (1, shapes["skip_weight"][1]),
                "bias": shapes["bias"],
                last: shapes[last],
            }
        count, nan = sum(map(math.prod, shapes.values())), float("nan")
        gradients = torch.full((count,), nan, dtype=problem.dtype)
        return cls(shapes, gradients, torch.full((1,), nan), torch.full((blocks, count + 1), nan))

    def by_name(self) -> dict[str, Tensor]:
        parts = self.gradients.split([math.prod(shape) for shape in self.shapes.values()])
        named = {n: t.view(shape) for (n, shape), t in zip(self.shapes.items(), parts, strict=True)}
        return {**named, "inverse_lipschitz": self.constant}


def launch(
    program: Program,
    problem: Problem,
    *,
    potential: Tensor | None = None,
    map: Tensor | None = None,
    grad_x: Tensor | None = None,
    sums: Sums | None = None,
    stacks: Stacks | None = None,
    blocks: int = 2,
    seed: int = 1,
) -> int:
    """Runs :func:`program`: for the map or, given ``sums``, for the training terms. None is not wanted.

    Returns how many matrices had to be packed.
    """
    v, u = (problem.v, problem.u) if sums else (None, None)
    gradients = (sums.gradients, sums.constant, sums.partial) if sums else (None,) * 3
    stacked = (stacks.x, stacks.h, stacks.d) if stacks else (None,) * 3
    return program.fused(*arguments(problem), v, u, potential, map, grad_x, *gradients, *stacked, blocks, seed)


def execute(
    kind: str,
    problem: Problem,
    *,
    blocks: int = 2,
    seed: int = 1,
    mode: str = "plain",
    streamed: bool = False,
    **fault: Any,
) -> dict[str, Tensor]:
    """What the kernels compute: everything that :meth:`Problem.plain` has."""
    x, dtype = problem.named["x"], problem.dtype
    rows, width = len(x), problem.named["skip_weight"].shape[1]
    there, back = (program(kind, problem, training, mode, streamed, **fault) for training in (False, True))
    potential, t, grad_x = (torch.full(s, float("nan"), dtype=dtype) for s in ((rows,), (rows, width), x.shape))
    launch(there, problem, potential=potential, map=t, blocks=blocks, seed=seed)
    sums, stacks = Sums.of(problem, streamed, blocks), Stacks.of(problem) if streamed else None
    launch(back, problem, grad_x=grad_x, sums=sums, stacks=stacks, blocks=blocks, seed=seed)
    gradients = sums.by_name()
    if stacks:
        left = stacks.gradients(problem)
        last_row = gradients["skip_weight"]
        gradients |= {**left, "skip_weight": torch.cat([left["skip_weight"], last_row])}
    return {"potential": potential, "map": t, "grad of x": grad_x, **{f"grad of {n}": g for n, g in gradients.items()}}


def encoded(activations: Sequence[Activation | str]) -> tuple[np.ndarray, np.ndarray]:
    """Codes and parameters of activations, as the executor's programs take them."""
    codes, parameters, _ = encode(activations)
    return np.array(codes, dtype=np.int64), np.array(parameters, dtype=np.float64)


def arguments(problem: Problem) -> tuple:
    """The first arguments of programs/fused.cpp: sizes, activations, x and parameters."""
    named, weights = problem.named, problem.weights()
    rows, inputs = named["x"].shape
    sizes = [len(weights), named["skip_weight"].shape[1], inputs, rows]
    sizes += [CODES[problem.dtype]] * 2 + [CODES[torch.float32]] + [w.shape[1] for w in weights]
    return (
        np.array(sizes),
        *encoded(problem.activations),
        named["x"],
        named["skip_weight"],
        named["bias"],
        torch.cat([w.reshape(-1) for w in weights]),
        named["inverse_lipschitz"].float(),
    )


def check(kind: str, problem: Problem, ours: dict[str, Tensor]) -> None:
    exact = problem.to(torch.float64).plain()
    if kind == "tf32":  # eager PyTorch has no products of 11-bit operands on the CPU
        for name, value in ours.items():
            scale = exact[name].abs().max() + 1e-30
            error = float((value.double() - exact[name]).abs().max() / scale)
            assert error <= 4 * 2**-11, f"{name}: relative error {error:.3g}"
        return
    # on few rows the error of a single computation varies a lot
    eager = problem.plain_in_other_orders(0 if len(problem.named["x"]) > 32 else 31)
    terms = problem.to(torch.float64).absolute_terms()
    terms.pop("grad of x", None)
    for name, value in ours.items():
        assert_as_accurate_as_eager(name, value, eager[name].to(value.dtype), exact[name], terms.get(name))
