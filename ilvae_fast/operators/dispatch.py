"""The ways in: prepared operands go to the compiled operators, to their rules, or to plain autograd.

The compiled operators take every call but two kinds. Under a transformation of ``torch.func`` or an open dual level the
call goes through ``rules.py``, and under ``use_backend("reference")`` through ``plain.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import backend, log, native, plain, rules
from .operands import Operands
from .plain import Static
from .rules import flags
from .transforms import transforms_active


@log.watched
def potential_and_map(operands: Operands, want_potential: bool, want_map: bool) -> tuple[Tensor, Tensor]:
    """Return potential (...) and map (..., d); what is not wanted is empty."""
    function: Callable[..., Any]
    if backend._current == "reference":
        function = plain.potential_and_map
    elif transforms_active():
        function = rules.potential_and_map
    else:
        return native.potential_and_map(operands, want_potential, want_map)
    wanted = (want_potential, want_map)
    results = iter(function(Static(operands.activations, wanted, operands.route), *operands.in_order()))
    phi, t = (next(results) if w else operands.x.new_empty(0) for w in wanted)
    return phi, t


@log.watched
def training_terms(
    operands: Operands, map_cotangent: Tensor | None, potential_cotangent: Tensor | None, wanted: int
) -> list[Tensor | None]:
    """Return the gradients in tensor order; bit i of ``wanted`` asks for gradient i, and the others are None."""
    function: Callable[..., Any]
    if backend._current == "reference":
        function = plain.training_terms
    elif transforms_active():
        function = rules.training_terms
    else:
        terms = native.training_terms(operands, map_cotangent, potential_cotangent, wanted)
        return [term if wanted >> i & 1 else None for i, term in enumerate(terms)]
    chosen = flags(wanted, 5 + len(operands.weights))
    static = Static(operands.activations, chosen, operands.route)
    return plain.spread(function(static, map_cotangent, potential_cotangent, *operands.in_order()), chosen)


@log.watched
def map_jvp(operands: Operands, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """Return the map (..., d) and its derivative along ``tangent``."""
    function: Callable[..., Any]
    if backend._current == "reference":
        function = plain.map_jvp
    elif transforms_active():
        function = rules.map_jvp
    else:
        return native.map_jvp(operands, tangent)
    return function(Static(operands.activations, (), operands.route), tangent, *operands.in_order())
