"""The ways in: prepared operands go to the compiled operators, to their rules, or to plain autograd.

The compiled operators take every call but three kinds. Under a transformation of ``torch.func`` or an open dual level
the call goes through ``rules.py``. DTensors go through ``sharding.py``, which comes back with what each process has.
Under ``use_backend("reference")``, or on a device that they do not know, the call goes through ``plain.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from . import backend, log, native, plain, rules
from .extension import DEVICES, without_operators
from .operands import Operands
from .plain import Static
from .rules import flags
from .sharding import Rows, is_spread
from .transforms import transforms_active

_warned: set[str] = set()  # kinds of devices


def _by_plain_autograd(x: Tensor) -> bool:
    """Whether the reference backend is in force, or x lies on a device without compiled operators, of which we warn."""
    if backend._current == "reference":
        return True
    if x.is_cpu or (kind := x.device.type) in DEVICES:
        return False
    if not is_compiling() and kind not in _warned:
        _warned.add(kind)
        warnings.warn(
            f"x: got a tensor on {x.device}, and {without_operators(kind)}. Maps go by plain autograd there, which is "
            'right, and slower; ilvae_fast.use_backend("reference") chooses that without this warning',
            stacklevel=4,
        )
    return True


@log.watched
def potential_and_map(operands: Operands, want_potential: bool, want_map: bool) -> tuple[Tensor, Tensor]:
    """Return potential (...) and map (..., d); what is not wanted is empty."""
    if type(operands.x) is not Tensor and is_spread(operands.x):
        rows = Rows(operands.x)
        phi, t = potential_and_map(rows.local(operands), want_potential, want_map)
        return rows.spread(phi, ()) if want_potential else phi, rows.spread(t, t.shape[-1:]) if want_map else t
    function: Callable[..., Any]
    if _by_plain_autograd(operands.x):
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
    if type(operands.x) is not Tensor and is_spread(operands.x):
        rows = Rows(operands.x)
        v, u = rows.rows("map_cotangent", map_cotangent), rows.rows("potential_cotangent", potential_cotangent)
        of_x, *rest = training_terms(rows.local(operands), v, u, wanted)
        of_x = None if of_x is None else rows.spread(of_x, of_x.shape[-1:])
        return [of_x, *(None if term is None else rows.summed(term) for term in rest)]
    function: Callable[..., Any]
    if _by_plain_autograd(operands.x):
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
    if type(operands.x) is not Tensor and is_spread(operands.x):
        rows = Rows(operands.x)
        t, along = map_jvp(rows.local(operands), rows.rows("tangent", tangent))
        return rows.spread(t, t.shape[-1:]), rows.spread(along, t.shape[-1:])
    function: Callable[..., Any]
    if _by_plain_autograd(operands.x):
        function = plain.map_jvp
    elif transforms_active():
        function = rules.map_jvp
    else:
        return native.map_jvp(operands, tangent)
    return function(Static(operands.activations, (), operands.route), tangent, *operands.in_order())
