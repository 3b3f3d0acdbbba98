"""Activations of the potential: names, parameters and their value in plain torch operations.

The compiled kernels have the same functions, with first and second derivative, in ``csrc/core/activations.h``. To add
an activation, add a row to ``_TABLE`` here and a struct with the same code there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from .._support.errors import unknown_name
from .transforms import pull_back


class _Kind(NamedTuple):
    code: int  # the value of ilvae::ActivationKind
    default: float
    allowed: Callable[[float], bool]
    wanted: str  # words for `allowed`
    value: Callable[[Tensor, float], Tensor]
    monotone: bool = True
    smooth: bool = True  # continuously differentiable
    derivatives: Callable[[Tensor, float], tuple[Tensor, Tensor, Tensor]] | None = None  # s, s', s'', faster


def _softplus(a: Tensor, beta: float) -> Tensor:
    # Two halves, whose derivatives of every order keep their relative accuracy. F.softplus alone, or logsigmoid, has
    # s (1 - s) for its second also in the tail where s rounds to 1; logaddexp and clamp + log1p have wrong or NaN
    # second derivatives at 0.
    t = a * beta
    return torch.where(t > 0, t + F.softplus(-t, 1.0, 40.0), F.softplus(t, 1.0, 40.0)) / beta


def _softplus_derivatives(a: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    t = a * beta
    first = torch.sigmoid(t)
    return _softplus(a, beta), first, beta * first * torch.sigmoid(-t)  # 1 - first is rounding where first is nearly 1


def _celu(a: Tensor, alpha: float) -> Tensor:
    # F.celu differentiates with a 1 / alpha that is rounded to float32 even in float64. The derivative of expm1 is its
    # value plus 1, which is rounded away in the tail.
    t = a.clamp(max=0) / alpha
    tail = t < -1
    below = torch.where(tail, torch.where(tail, t, 0.0).exp() - 1, torch.where(tail, 0.0, t).expm1())
    return torch.where(a >= 0, a, alpha * below)


def _celu_derivatives(a: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    below = a < 0
    power = (torch.where(below, a, 0.0) / alpha).exp()
    return _celu(a, alpha), torch.where(below, power, 1.0), torch.where(below, power / alpha, 0.0)


def _leaky_relu_derivatives(a: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    return F.leaky_relu(a, slope), torch.where(a > 0, torch.ones_like(a), slope), torch.zeros_like(a)


def _smooth_leaky_relu_derivatives(a: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    value, first, second = _softplus_derivatives(a, 1.0)
    return slope * a + (1 - slope) * value, slope + (1 - slope) * first, (1 - slope) * second


def _squared_leaky_relu_derivatives(a: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    value, first, _ = _leaky_relu_derivatives(a, slope)
    return value.square(), 2 * value * first, 2 * first.square()


_TABLE = {
    "softplus": _Kind(0, 1.0, lambda p: p > 0, "beta > 0", _softplus, derivatives=_softplus_derivatives),
    "leaky_relu": _Kind(
        1,
        0.2,
        lambda p: 0 <= p <= 1,
        "0 <= slope <= 1",
        F.leaky_relu,
        smooth=False,
        derivatives=_leaky_relu_derivatives,
    ),
    "relu": _Kind(
        2,
        0.0,
        lambda p: p == 0,
        "no parameter",
        lambda a, _: F.relu(a),
        smooth=False,
        derivatives=_leaky_relu_derivatives,
    ),
    "celu": _Kind(3, 1.0, lambda p: p > 0, "alpha > 0", _celu, derivatives=_celu_derivatives),
    "smooth_leaky_relu": _Kind(
        4,
        0.2,
        lambda p: 0 <= p <= 1,
        "0 <= slope <= 1",
        lambda a, p: p * a + (1 - p) * _softplus(a, 1.0),
        derivatives=_smooth_leaky_relu_derivatives,
    ),
    "identity": _Kind(
        5,
        0.0,
        lambda p: p == 0,
        "no parameter",
        lambda a, _: a,
        derivatives=lambda a, _: (a, torch.ones_like(a), torch.zeros_like(a)),
    ),
    "squared_leaky_relu": _Kind(
        6,
        0.2,
        lambda p: 0 <= p <= 1,
        "0 <= slope <= 1",
        lambda a, p: F.leaky_relu(a, p).square(),
        monotone=False,
        derivatives=_squared_leaky_relu_derivatives,
    ),
}


@dataclass(frozen=True)
class Activation:
    """A convex activation and its parameter.

    Args:
        name: ``softplus`` (parameter beta > 0), ``leaky_relu`` (0 <= slope <= 1), ``relu``, ``celu`` (alpha > 0),
            ``smooth_leaky_relu`` (slope; ``slope * x + (1 - slope) * softplus(x)``), ``identity``, and for the first
            layer also ``squared_leaky_relu`` (slope; ``leaky_relu(x) ** 2``, convex but not monotone: the choice of
            LIDVAE, Wang et al., NeurIPS 2021).
        parameter: beta, slope or alpha; by default 1 for softplus and celu, 0.2 for the slopes.

    Raises:
        ValueError: unknown name (the nearest one is named) or a parameter outside its range.

    At kinks the derivatives are those of torch's autograd. Where an activation has a kink (``leaky_relu``, ``relu``),
    the map, a gradient, jumps: the inverse-Lipschitz bound holds, differentiability does not, and the map is no
    bijection. With piecewise linear activations in all hidden layers but the first, all curvature comes from that one.
    """

    name: str
    parameter: float | None = None

    def __post_init__(self) -> None:
        if self.name not in _TABLE:
            raise unknown_name("activation", self.name, _TABLE)
        kind = _TABLE[self.name]
        parameter = kind.default if self.parameter is None else float(self.parameter)
        if not (math.isfinite(parameter) and kind.allowed(parameter)):
            raise ValueError(f"activation {self.name!r}: got parameter {self.parameter!r}, wanted {kind.wanted}")
        object.__setattr__(self, "parameter", parameter)

    @property
    def code(self) -> int:
        """The number the compiled kernels know this activation by."""
        return _TABLE[self.name].code

    def __str__(self) -> str:
        return f"il.Activation({self.name!r}, {self.parameter:g})"

    @property
    def monotone(self) -> bool:
        """Whether the function is non-decreasing, as every layer but the first needs."""
        return _TABLE[self.name].monotone

    @property
    def smooth(self) -> bool:
        """Whether the derivative is continuous, as the map is then."""
        return _TABLE[self.name].smooth

    def __call__(self, a: Tensor) -> Tensor:
        """The value at ``a`` (any shape), in plain torch operations that differentiate any number of times."""
        assert self.parameter is not None
        return _TABLE[self.name].value(a, self.parameter)

    def derivatives(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``s, s', s''`` at ``a`` (any shape), each differentiable any number of times."""
        assert self.parameter is not None
        if (known := _TABLE[self.name].derivatives) is not None:
            return known(a, self.parameter)

        def slope(a: Tensor) -> tuple[Tensor, ...]:
            _, pull = pull_back(lambda a: (self(a),), (a,))
            return pull((torch.ones_like(a),))  # of a pointwise function: its derivative

        (first,), pull = pull_back(slope, (a,))
        (second,) = pull((torch.ones_like(a),))
        return self(a), first, second


class EncodedActivations(NamedTuple):
    """Activations of all layers as the operators take them: one code and one parameter per layer, output last."""

    codes: list[int]
    parameters: list[float]
    layers: tuple[Activation, ...]


def as_activation(value: str | Activation, argument: str = "activation") -> Activation:
    """A bare name (default parameter) or an :class:`Activation`."""
    if isinstance(value, Activation):
        return value
    if isinstance(value, str):
        if value not in _TABLE:
            raise unknown_name(argument, value, _TABLE)
        return Activation(value)
    raise TypeError(f"{argument}: got {type(value).__name__}, wanted a name or il.Activation")


_encoded: dict[tuple[str | Activation, ...], EncodedActivations] = {}


def encode(activations: Sequence[str | Activation]) -> EncodedActivations:
    """Check the K+1 activations of a potential (hidden layers, then the output) and encode them for the operators."""
    key = tuple(activations)
    if not is_compiling() and (kept := _encoded.get(key)):
        return kept
    layers = tuple(as_activation(value, f"activations[{i}]") for i, value in enumerate(key))
    if len(layers) < 2:
        raise ValueError(
            f"activations: got {len(layers)}, wanted one for each hidden layer and one for the output (at least 2)"
        )
    for i, layer in enumerate(layers[1:], 1):
        if not layer.monotone:
            raise ValueError(
                f"activations[{i}]: got {layer.name!r}, wanted a non-decreasing one: "
                "only the first layer may be merely convex"
            )
    result = EncodedActivations([a.code for a in layers], [float(a.parameter or 0.0) for a in layers], layers)
    if not is_compiling():
        if len(_encoded) >= 1024:  # parameters that change in every step would pile up
            _encoded.clear()
        _encoded[key] = result
    return result


def decode(codes: Sequence[int], parameters: Sequence[float]) -> EncodedActivations:
    """The inverse of :func:`encode`."""
    names = {kind.code: name for name, kind in _TABLE.items()}
    return encode([Activation(names[code], parameter) for code, parameter in zip(codes, parameters, strict=True)])
