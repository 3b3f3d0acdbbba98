"""The fused CUDA kernels, executed on the host (tests/executor) against float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from cases import FIRST, LATER
from comparison import assert_as_accurate_as_eager
from executor import Program
from ilvae_fast import Activation, reference
from ilvae_fast.operators.activations import encode

DTYPES = {"tf32x3": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


@dataclass
class Problem:
    """Tensors of one network and batch, rounded to ``dtype``; v and u may be None."""

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
        """The same network with units and coordinates in another order, and the order, by axis, of each result."""
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
        """:meth:`plain` and ``count`` times the same from sums in other orders, stacked."""
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
        """For each gradient the sum over rows of the absolute values of what a row contributes."""
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


def program(kind: str, problem: Problem, training: bool, mode: str = "plain", streamed: bool = False) -> Program:
    n, d = padded(problem, streamed)
    layers = 0 if not training else 1 if streamed else len(problem.weights())
    shape = {"KIND": kind, "WIDTH": n, "INPUT": d, "LAYERS": layers, "STREAMED": int(streamed)}
    return Program("fused", mode=mode, defines=shape)


@dataclass
class Stacks:
    """What the sweep with streamed weights leaves to products, as csrc/cuda/fused.h has it (FusedCall)."""

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
        """Of A, but for its last row, and of W_2 .. W_K, as matrix products in float32 or 16 bits have them."""
        width, hidden = problem.named["skip_weight"].shape[1], [w.shape[1] for w in problem.weights()]

        def product(d, z):
            return (d.float().T @ z.float()).to(problem.dtype)

        d = self.d[:, : sum(hidden)].split(hidden, dim=1)
        h = self.h[:, : sum(hidden[:-1])].split(hidden[:-1], dim=1)
        result = {f"weights[{k}]": product(d[k + 1], h[k]) for k in range(len(hidden) - 1)}
        return {"skip_weight": product(self.d[:, : sum(hidden)], self.x[:, :width]), **result}


def execute(
    kind: str, problem: Problem, *, blocks: int = 2, seed: int = 1, mode: str = "plain", streamed: bool = False
) -> dict[str, Tensor]:
    """What the kernels compute: everything that :meth:`Problem.plain` has."""
    named, dtype = problem.named, problem.dtype
    rows, inputs = named["x"].shape
    width = named["skip_weight"].shape[1]
    nan = float("nan")
    result = {"potential": torch.full((rows,), nan, dtype=dtype), "map": torch.full((rows, width), nan, dtype=dtype)}
    grad_x = torch.full((rows, inputs), nan, dtype=dtype)
    sizes = {n: t.numel() for n, t in named.items() if n not in ("x", "inverse_lipschitz")}
    stacks = Stacks.of(problem) if streamed else None
    if streamed:  # the rest is left to products
        last = f"weights[{len(problem.weights()) - 1}]"
        sizes = {"skip_weight": width, "bias": sizes["bias"], last: sizes[last]}
    gradients = torch.full((sum(sizes.values()),), nan, dtype=dtype)
    grad_constant = torch.full((1,), nan)
    partial = torch.full((blocks, len(gradients) + 1), nan)
    operands = arguments(problem)
    program(kind, problem, False, mode, streamed).fused(
        *operands, None, None, result["potential"], result["map"], *[None] * 7, blocks, seed
    )
    program(kind, problem, True, mode, streamed).fused(
        *operands, problem.v, problem.u, None, None, grad_x, gradients, grad_constant, partial,
        *([stacks.x, stacks.h, stacks.d] if stacks else [None] * 3), blocks, seed,
    )  # fmt: skip
    result["grad of x"] = grad_x
    parts = dict(zip(sizes, gradients.split(list(sizes.values())), strict=True))
    if stacks:
        left = stacks.gradients(problem)
        parts["skip_weight"] = torch.cat([left.pop("skip_weight").view(-1), parts["skip_weight"]])
        parts |= left
    for name, part in parts.items():
        result[f"grad of {name}"] = part.reshape(named[name].shape)
    result["grad of inverse_lipschitz"] = grad_constant
    return result


def arguments(problem: Problem) -> tuple:
    """The first arguments of the executor's program: sizes, activations, x and parameters."""
    named, weights = problem.named, problem.weights()
    codes, parameters, _ = encode(problem.activations)
    rows, inputs = named["x"].shape
    sizes = [len(weights), named["skip_weight"].shape[1], inputs, rows]
    sizes += [CODES[problem.dtype]] * 2 + [CODES[torch.float32]] + [w.shape[1] for w in weights]
    return (
        np.array(sizes),
        np.array(codes, dtype=np.int64),
        np.array(parameters, dtype=np.float64),
        named["x"],
        named["skip_weight"],
        named["bias"],
        torch.cat([w.reshape(-1) for w in weights]),
        named["inverse_lipschitz"].float(),
    )


def check(kind: str, problem: Problem, ours: dict[str, Tensor]) -> None:
    exact = problem.to(torch.float64).plain()
    if kind == "tf32":  # as float32 with operands of 11 bits: eager has no such thing on the CPU
        for name, value in ours.items():
            scale = exact[name].abs().max() + 1e-30
            error = float((value.double() - exact[name]).abs().max() / scale)
            assert error <= 4 * 2**-11, f"{name}: relative error {error:.3g}"
        return
    # on few rows the error of a single computation is a matter of luck
    eager = problem.plain_in_other_orders(0 if len(problem.named["x"]) > 32 else 31)
    terms = problem.to(torch.float64).absolute_terms()
    terms.pop("grad of x", None)
    for name, value in ours.items():
        assert_as_accurate_as_eager(name, value, eager[name].to(value.dtype), exact[name], terms.get(name))


SOFT = (Activation("softplus"),) * 5
SHAPES = [  # rows, width, hidden, input
    (37, 2, (32, 32), None),
    (70, 3, (20, 32), None),
    (1, 13, (17,), None),
    (33, 16, (64,), 5),
    (40, 33, (50, 64, 7), None),
    (19, 64, (32, 20, 9, 31), 60),
    (35, 16, (64, 64, 64, 64), None),
]
WIDE = [(21, 32, (128, 128), None), (35, 64, (100, 128), 40), (33, 100, (128,), None)]


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_networks(kind, shape):
    rows, width, hidden, inputs = shape
    problem = Problem.random(DTYPES[kind], rows, width, hidden, SOFT[: len(hidden) + 1], inputs=inputs)
    check(kind, problem, execute(kind, problem))


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_wide_networks(kind, shape):
    rows, width, hidden, inputs = shape
    problem = Problem.random(DTYPES[kind], rows, width, hidden, SOFT[: len(hidden) + 1], inputs=inputs, seed=1)
    check(kind, problem, execute(kind, problem))


@pytest.mark.parametrize("kind", ["tf32x3", "bfloat16"])
@pytest.mark.parametrize("name", FIRST)
def test_activations(kind, name):
    later = name if name in LATER else "celu"
    activations = (Activation(name), Activation(later), Activation("softplus", 2.0))
    problem = Problem.random(DTYPES[kind], 45, 5, (32, 24), activations, seed=3)
    check(kind, problem, execute(kind, problem))


@pytest.mark.parametrize("v", [True, False])
@pytest.mark.parametrize("u", [True, False])
def test_absent_cotangents(v, u):
    if v or u:
        problem = Problem.random(torch.float32, 34, 4, (32, 16), SOFT[:3], v=v, u=u)
        check("tf32x3", problem, execute("tf32x3", problem))


@pytest.mark.parametrize("blocks", [1, 3, 8])
@pytest.mark.parametrize("kind", ["tf32x3", "float16"])
def test_any_number_of_blocks(kind, blocks):
    problem = Problem.random(DTYPES[kind], 150, 4, (32, 32), SOFT[:3])
    check(kind, problem, execute(kind, problem, blocks=blocks))


@pytest.mark.parametrize("kind", DTYPES)
def test_the_same_bits_in_every_order(kind):
    problem = Problem.random(DTYPES[kind], 75, 6, (32, 30), SOFT[:3])
    first = execute(kind, problem, seed=0)
    for seed in range(1, 5):
        for name, value in execute(kind, problem, seed=seed).items():
            assert torch.equal(value, first[name]), f"{name} with seed {seed}"


@pytest.mark.parametrize("mode", ["races", "memory"])
@pytest.mark.parametrize(("kind", "hidden"), [("tf32x3", (32, 20, 32)), ("bfloat16", (40, 64))])
def test_no_races_and_no_stray_accesses(kind, hidden, mode):
    problem = Problem.random(DTYPES[kind], 75, 7, hidden, SOFT[: len(hidden) + 1], inputs=5)
    check(kind, problem, execute(kind, problem, seed=2, mode=mode))


def test_the_common_way_in_three_passes_of_tf32():
    """Without the flush of the accumulator every 16 columns tensor cores lose two digits: see csrc/cuda/fused.cuh."""
    problem = Problem.random(torch.float32, 64, 64, (128, 128), SOFT[:3], seed=5)
    ours, exact = execute("tf32x3", problem), problem.to(torch.float64).plain()
    for name in ("map", "grad of x", "grad of skip_weight", "grad of weights[0]"):
        error = (ours[name].double() - exact[name]).norm() / exact[name].norm()
        assert error < 8e-7, f"{name}: {float(error):.3g}"


def test_weights_of_many_blocks():
    """Rows for more blocks than the eight warps of the reduction, most of which add more than one part."""
    problem = Problem.random(torch.float32, 700, 2, (32,), SOFT[:2])
    check("tf32x3", problem, execute("tf32x3", problem, blocks=20))
