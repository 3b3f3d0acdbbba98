"""Floating-point operations of the operators, for ``torch.utils.flop_counter.FlopCounterMode``.

Counted are matrix products, as :func:`ilvae_fast.plan` counts them and that mode does for torch's own operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import backend
from .extension import _C

Shape = Sequence[int]


def _of_map(x: Shape, skip_weight: Shape, weights: Sequence[Shape], embedding: Shape | None) -> int:
    """Up and down through all layers."""
    widths = [weight[1] for weight in weights]
    shape = (math.prod(x[:-1]), x[-1], skip_weight[1], widths, embedding is not None)
    return int(_C.plan(*shape, 4, 4, 0, None, 0, False).map_flops)


def _potential_and_map(unit: int, want_potential: bool, want_map: bool, *_: Any) -> int:
    return unit if want_map else unit // 2


def _training_terms(
    unit: int, map_cotangent: Shape | None, potential_cotangent: Shape | None, saved: Sequence[Shape], wanted: int
) -> int:
    """What was not saved, tangents up and down where there is a map cotangent, and the products of the weights."""
    of_weights = wanted & ~0b11101  # of any but x, bias, L and embedding
    return unit * ((not saved) + (map_cotangent is not None) + bool(of_weights))


def _map_jvp(unit: int, tangent: Shape) -> int:
    return 2 * unit


def _register(operator: Any, count: Callable[..., int]) -> None:
    @register_flop_formula(operator)
    def formula(
        x: Shape, skip_weight: Shape, bias: Shape, weights: Sequence[Shape], constant: Shape, embedding: Shape | None,
        activations: Any, parameters: Any, product_dtype: Any, route: int, *own: Any, out_shape: Any, **named: Any,
    ) -> int:  # fmt: skip
        return count(_of_map(x, skip_weight, weights, embedding), *own, **named)


if backend.absent is None:
    _register(torch.ops.ilvae_fast.potential_and_map, _potential_and_map)
    _register(torch.ops.ilvae_fast.training_terms, _training_terms)
    _register(torch.ops.ilvae_fast.map_jvp, _map_jvp)
