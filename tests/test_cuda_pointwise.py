"""The pointwise kernels of CUDA devices, executed on the host (tests/executor) against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from executor import Program
from ilvae_fast import Activation
from ilvae_fast.operators.activations import encode

TYPES = {
    "float64": (torch.float64, torch.float64, "double", "double", 2),
    "float32": (torch.float32, torch.float32, "float", "float", 4),
    "bfloat16": (torch.float32, torch.bfloat16, "float", "bfloat16", 8),
    "float16": (torch.float32, torch.float16, "float", "float16", 8),
}
CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
ACTIVATIONS = ["softplus", "leaky_relu", "relu", "celu", "smooth_leaky_relu", "identity", "squared_leaky_relu"]


def program(kind: str, vector: bool, mode: str = "plain") -> Program:
    _, _, real, operand, wide = TYPES[kind]
    return Program("pointwise", mode=mode, defines={"REAL": real, "OPERAND": operand, "VECTOR": wide if vector else 1})


class Arrays:
    """Random matrices (rows, columns) of the operand type in rows of ``stride`` elements."""

    def __init__(self, kind: str, rows: int, seed: int = 0):
        self.real, self.operand = TYPES[kind][:2]
        self.rows, self.generator = rows, torch.Generator().manual_seed(seed)

    def matrix(self, stride: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(self.rows, stride, generator=self.generator, dtype=torch.float64)
        return (2 * values).to(dtype or self.operand)

    def empty(self, stride: int) -> Tensor:
        return torch.full((self.rows, stride), float("nan"), dtype=self.operand)

    def vector(self, count: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(count, generator=self.generator, dtype=torch.float64).to(dtype or self.real)


def derivatives(name: str, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s, s', s'' in float64 by autograd."""
    a = a.detach().requires_grad_()
    value = Activation(name)(a)
    (first,) = torch.autograd.grad(value.sum(), a, create_graph=True)
    second = torch.autograd.grad(first.sum(), a)[0] if first.requires_grad else torch.zeros_like(a)
    return value.detach(), first.detach(), second.detach()


def assert_rounded(name: str, ours: Tensor, exact: Tensor, terms: Tensor | float = 0.0) -> None:
    """Equal but for the rounding of the result and a few of the arithmetic, relative to ``terms``."""
    real = torch.float64 if ours.dtype == torch.float64 else torch.float32
    allowed = torch.finfo(ours.dtype).eps * exact.abs() + 64 * torch.finfo(real).eps * (exact.abs() + terms + 1)
    wrong = ~((ours.double() - exact).abs() <= allowed)
    assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong, {ours[wrong][:3]} {exact[wrong][:3]}"


def encoded(*names: str) -> tuple[np.ndarray, np.ndarray]:
    layers = encode([Activation(n) for n in names])
    return np.array(layers[0], dtype=np.int64), np.array(layers[1], dtype=np.float64)


CASES = [(kind, vector) for kind in TYPES for vector in (True, False)]


@pytest.mark.parametrize(("kind", "vector"), CASES)
@pytest.mark.parametrize("tangent", [False, True])
def test_up_and_down(kind, vector, tangent):
    rows, width, stride = 19, 24 if vector else 21, 32
    kernels = program(kind, vector)
    for seed, name in enumerate(ACTIVATIONS):
        arrays = Arrays(kind, rows, seed)
        codes, parameters = encoded(name, "identity")
        sizes = np.array([rows, width, stride, stride])
        bias, a, g = arrays.vector(width), arrays.matrix(stride), arrays.matrix(stride)
        a_tangent, g_tangent = (arrays.matrix(stride), arrays.matrix(stride)) if tangent else (None, None)
        value, first, second = derivatives(name, a[:, :width].double() + bias.double())
        across = 2 if vector else 5
        h, h_tangent = arrays.empty(stride), arrays.empty(stride)
        common = (sizes, codes, parameters, bias, a, a_tangent)
        kernels.up(*common, h, h_tangent, across, 3, seed)
        assert_rounded(name, h[:, :width], value)
        d, d_tangent = arrays.empty(stride), arrays.empty(stride)
        kernels.down(*common, g, g_tangent, d, d_tangent, across, 2, seed)
        g = g[:, :width].double()
        assert_rounded(name, d[:, :width], g * first, g.abs())
        if tangent:
            a_tangent, g_tangent = a_tangent[:, :width].double(), g_tangent[:, :width].double()
            assert_rounded(name, h_tangent[:, :width], first * a_tangent, a_tangent.abs())
            terms = (g_tangent * first).abs() + (g * second * a_tangent).abs()
            assert_rounded(name, d_tangent[:, :width], g_tangent * first + g * second * a_tangent, terms)
        assert h[:, width:].isnan().all()
        assert d[:, width:].isnan().all()


@pytest.mark.parametrize(("kind", "vector"), CASES)
@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("with_u", [False, True])
@pytest.mark.parametrize("complete", [0, 1])
def test_turn(kind, vector, tangent, with_u, complete):
    rows, width = 21, 40 if vector else 37
    stride = width + 8
    arrays = Arrays(kind, rows)
    codes, parameters = encoded("softplus", "smooth_leaky_relu")
    sizes = np.array([rows, width, stride, stride])
    bias, weight, output_bias = arrays.vector(width), arrays.vector(width).abs() / width, arrays.vector(1)
    a, a_tangent = arrays.matrix(stride), arrays.matrix(stride) if tangent else None
    u = arrays.vector(rows) if with_u else None
    before, before_tangent = (None if t is None else t.clone().double() for t in (a, a_tangent))
    potential = torch.full((rows,), float("nan"), dtype=arrays.real)
    h, h_tangent, d, d_tangent = (arrays.empty(stride) for _ in range(4))
    program(kind, vector).turn(
        sizes,
        codes,
        parameters,
        bias,
        a,
        a_tangent,
        weight,
        output_bias,
        u,
        potential,
        h,
        h_tangent,
        d,
        d_tangent,
        complete,
        2,
        7,
    )
    value, first, second = derivatives("softplus", before[:, :width] + bias.double())
    w = weight.double()
    o = before[:, width]
    if not complete:
        o = o + value @ w + output_bias.double()
        assert_rounded("o", a[:, width], o)
    s, s1, s2 = derivatives("smooth_leaky_relu", o)
    assert_rounded("G", potential, s)
    assert_rounded("h", h[:, :width], value)
    multiplier = u.double() if with_u else torch.full((rows,), 0.0 if tangent else 1.0, dtype=torch.float64)
    if tangent:
        o_tangent = before_tangent[:, width] + (first * before_tangent[:, :width]) @ w
        assert_rounded("o'", a_tangent[:, width], o_tangent)
        d_out, d_out_tangent = s1, s2 * o_tangent + multiplier * s1
        assert_rounded("D'_out", d_tangent[:, width], d_out_tangent)
        exact = d_out_tangent[:, None] * w * first + d_out[:, None] * w * second * before_tangent[:, :width]
        assert_rounded("D'", d_tangent[:, :width], exact)
        assert_rounded("h'", h_tangent[:, :width], first * before_tangent[:, :width])
    else:
        d_out = multiplier * s1
    assert_rounded("D_out", d[:, width], d_out)
    assert_rounded("D", d[:, :width], d_out[:, None] * w * first)


@pytest.mark.parametrize("kind", ["float64", "float32"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_map", [False, True])
def test_quadratic(kind, dtype, of_map):
    rows, width, blocks = 37, 45, 3
    arrays = Arrays(kind, rows)
    real = arrays.real
    dtype = dtype or real
    x, y = arrays.matrix(width, dtype), arrays.matrix(width, dtype)
    v, u = (None, None) if of_map else (arrays.matrix(width, dtype), arrays.vector(rows, dtype))
    before, constant, potential = y.clone().double(), arrays.vector(1), arrays.vector(rows)
    phi = torch.full((rows,), float("nan"), dtype=dtype)
    gradient, partial = (torch.full((n,), float("nan"), dtype=real) for n in (1, blocks))
    types = [CODES[dtype]] * 5
    program(kind, False).quadratic(
        np.array([rows, width, *types]),
        constant,
        x,
        y,
        v,
        u,
        float(of_map),
        potential,
        phi,
        None if of_map else gradient,
        partial,
        blocks,
        3,
    )
    exact = x.double()
    square = exact.square().sum(1)
    assert_rounded("phi", phi, potential.double() + constant.double() * square / 2)
    if of_map:
        assert_rounded("T", y, before + constant.double() * exact)
    else:
        assert_rounded("grad_x", y, before + constant.double() * (v.double() + u.double()[:, None] * exact))
        expected = ((v.double() * exact).sum() + (u.double() * square).sum() / 2).reshape(1)
        assert_rounded("grad_L", gradient, expected, (v.double() * exact).abs().sum())
