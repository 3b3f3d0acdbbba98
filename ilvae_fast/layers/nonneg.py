"""Parametrisations that keep a weight non-negative, and their inverses.

To add one, append a row to ``_TABLE``. Saved states know a parametrisation by its place there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .._support.errors import unknown_name
from ..operators import backend
from ..operators.softplus import plain_softplus, softplus


class _Kind(NamedTuple):
    effective: Callable[[Tensor, float], Tensor]
    raw: Callable[[Tensor, float], Tensor]  # a raw value of a positive effective one
    has_parameter: bool = False
    together: Callable[[Sequence[Tensor]], list[Tensor]] | None = None  # the effective weights of many in one operator


_TABLE = {
    "softplus": _Kind(lambda r, _: plain_softplus(r), lambda e, _: e + (-(-e).expm1()).log(), together=softplus),
    "exp": _Kind(lambda r, _: r.exp(), lambda e, _: e.log()),
    "clamp": _Kind(lambda r, p: r.clamp(min=p), lambda e, p: e.clamp(min=p), has_parameter=True),
    "abs": _Kind(lambda r, _: r.abs(), lambda e, _: e),
    "square": _Kind(lambda r, _: r * r, lambda e, _: e.sqrt()),
    "none": _Kind(lambda r, _: r, lambda e, _: e),
}


@dataclass(frozen=True)
class NonNegative:
    """How a raw weight becomes a non-negative one.

    Args:
        name: ``softplus``, ``exp``, ``clamp`` (from below, at ``parameter``), ``abs``, ``square``, or ``none``: the
            user promises that the raw weights are non-negative.
        parameter: the lower bound of ``clamp``, >= 0, 0 by default; the others have none.

    Code that initialises or decays all parameters of a model does so to the raw weights, and effective weights are
    about one over a layer's width. ``square`` and ``abs`` map 0 to 0: weight decay shrinks the map towards ``L x``, and
    small raw weights (``xavier_normal_``) leave a map that is flatter than a fresh one, but learns. ``softplus`` and
    ``exp`` map 0 to 0.69 and 1: weight decay makes the map steeper at first, and ``xavier_normal_`` takes the largest
    singular value of the Jacobian of ``BrenierDecoder(10, 784)`` up a hundredfold and more. Use one of the former, of
    which ``abs`` is the default, or call ``reset_parameters()`` of the map or decoder after such an initialisation.

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

    def __str__(self) -> str:
        return repr(self.name) if self.parameter is None else f"il.NonNegative({self.name!r}, {self.parameter:g})"

    @property
    def code(self) -> int:
        """The number by which saved states know this parametrisation."""
        return list(_TABLE).index(self.name)

    def __call__(self, raw: Tensor) -> Tensor:
        """Return the effective weight of ``raw`` (any shape), differentiable."""
        return self.of_all([raw])[0]

    def of_all(self, raws: Sequence[Tensor]) -> list[Tensor]:
        """Return the effective weights of several raw ones, which is faster than one after the other."""
        kind = _TABLE[self.name]
        if kind.together is not None and backend._current == "native":
            return kind.together(raws)
        return [kind.effective(raw, self.parameter or 0.0) for raw in raws]

    def raw(self, effective: Tensor) -> Tensor:
        """Return a raw weight of the ``effective`` one, which is > 0. ``clamp`` raises it to its minimum."""
        return _TABLE[self.name].raw(effective, self.parameter or 0.0)


def as_nonnegative(value: str | NonNegative, argument: str = "nonneg") -> NonNegative:
    """Return a :class:`NonNegative` from itself or from a bare name, which takes the default parameter.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if isinstance(value, NonNegative):
        return value
    if isinstance(value, str):
        if value not in _TABLE:
            raise unknown_name(argument, value, _TABLE)
        return NonNegative(value)
    raise TypeError(f"{argument}: got {type(value).__name__}, wanted a name or il.NonNegative")


def of_code(code: int, parameter: float) -> NonNegative:
    """Return the parametrisation of a code: the inverse of :attr:`NonNegative.code`."""
    name = dict(enumerate(_TABLE))[code]
    return NonNegative(name, parameter if _TABLE[name].has_parameter else None)
