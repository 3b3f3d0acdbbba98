"""Parametrisations that keep a weight non-negative, and their inverses.

To add one, add a row to ``_TABLE``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from ._errors import unknown_name


class _Kind(NamedTuple):
    effective: Callable[[Tensor, float], Tensor]
    raw: Callable[[Tensor, float], Tensor]  # a raw value of a positive effective one
    has_parameter: bool = False


_TABLE = {
    # threshold 40: exact in float64 too (exp(-40) < 2^-53), where the default of 20 errs by 2e-9
    "softplus": _Kind(lambda r, _: F.softplus(r, 1.0, 40.0), lambda e, _: e + (-(-e).expm1()).log()),
    "exp": _Kind(lambda r, _: r.exp(), lambda e, _: e.log()),
    "clamp": _Kind(lambda r, p: r.clamp(min=p), lambda e, p: e.clamp(min=p), has_parameter=True),
    "abs": _Kind(lambda r, _: r.abs(), lambda e, _: e),
    "square": _Kind(lambda r, _: r.square(), lambda e, _: e.sqrt()),
    "none": _Kind(lambda r, _: r, lambda e, _: e),
}


@dataclass(frozen=True)
class NonNegative:
    """How a raw weight becomes a non-negative one.

    Args:
        name: ``softplus``, ``exp``, ``clamp`` (from below, at ``parameter``), ``abs``, ``square``, or ``none``: the
            user promises that the raw weights are non-negative.
        parameter: the lower bound of ``clamp``, >= 0, 0 by default; the others have none.

    Raises:
        ValueError: unknown name (the nearest one is named) or a parameter outside its range.
    """

    name: str
    parameter: float | None = None

    def __post_init__(self) -> None:
        if self.name not in _TABLE:
            raise unknown_name("nonneg", self.name, _TABLE)
        if self.parameter is not None and not _TABLE[self.name].has_parameter:
            raise ValueError(f"nonneg {self.name!r}: got parameter {self.parameter!r}, wanted none")
        if self.parameter is not None and not (math.isfinite(self.parameter) and self.parameter >= 0):
            raise ValueError(f"nonneg {self.name!r}: got minimum {self.parameter!r}, wanted a finite one >= 0")

    def __call__(self, raw: Tensor) -> Tensor:
        """The effective weight of ``raw`` (any shape), differentiable."""
        return _TABLE[self.name].effective(raw, self.parameter or 0.0)

    def raw(self, effective: Tensor) -> Tensor:
        """A raw weight whose effective value is ``effective`` (> 0; ``clamp`` raises it to its minimum)."""
        return _TABLE[self.name].raw(effective, self.parameter or 0.0)


def as_nonnegative(value: str | NonNegative, argument: str = "nonneg") -> NonNegative:
    """A bare name (default parameter) or a :class:`NonNegative`."""
    if isinstance(value, NonNegative):
        return value
    if isinstance(value, str):
        if value not in _TABLE:
            raise unknown_name(argument, value, _TABLE)
        return NonNegative(value)
    raise TypeError(f"{argument}: got {type(value).__name__}, wanted a name or il.NonNegative")
