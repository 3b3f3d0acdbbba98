"""The compiled operators at operands, whose order (csrc/torch/operators.h) nothing else knows but ``flops.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import has_torch_function

from . import backend, closed_form
from . import flops as flops
from .activations import decode
from .extension import _C
from .operands import Operands
from .reference import embed


def _operator(name: str) -> Callable[..., Any]:
    """Return the operator as a function of arguments by position that is called as directly as the call allows.

    ``torch.ops`` interprets the schema in each call, which takes as long as a small network does. The extension's own
    function enters the same dispatcher without that. Compiled regions and ``__torch_function__`` know operators by
    ``torch.ops`` alone.
    """
    direct = getattr(_C, name)
    if backend.absent is not None:
        return direct  # which says so
    operator = getattr(torch.ops.ilvae_fast, name).default

    def call(*arguments: Any) -> Any:
        weights = arguments[3]
        if is_compiling() or has_torch_function(arguments) or has_torch_function(weights):
            if torch.onnx.is_in_onnx_export():
                return _without_operators(name, *arguments)
            return operator(*arguments)
        try:
            return direct(*arguments)
        except TypeError:
            return operator(*arguments)  # whose error names the argument

    return call


def _without_operators(name: str, *arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return what potential_and_map does, in operations that ONNX knows."""
    if name != "potential_and_map":
        raise RuntimeError(f"torch.onnx.export: got the operator {name}, wanted potentials and maps alone")
    x, skip_weight, bias, weights, constant, embedding, codes, parameters, *_ = arguments
    y = embed(x, skip_weight.shape[-1] if embedding is None and x.shape[-1] != skip_weight.shape[-1] else embedding)
    constant = constant.to(y.dtype)
    return *closed_form.potential_and_map(decode(codes, parameters).layers, y, skip_weight, bias, weights, constant), []


_potential_and_map = _operator("potential_and_map")
_training_terms = _operator("training_terms")
_map_jvp = _operator("map_jvp")


def potential_and_map(operands: Operands, want_potential: bool, want_map: bool) -> tuple[Tensor, Tensor]:
    """Return potential (...) and map (..., d); what is not wanted is empty."""
    x, skip_weight, bias, weights, constant, embedding, (codes, parameters, _), route, recompute = operands
    return _potential_and_map(
        x,
        skip_weight,
        bias,
        weights,
        constant,
        embedding,
        codes,
        parameters,
        None,  # product_dtype
        route,
        want_potential,
        want_map,
        False,  # save
        recompute,
        None,  # saved_dtype
    )[:2]


def training_terms(
    operands: Operands, map_cotangent: Tensor | None, potential_cotangent: Tensor | None, wanted: int
) -> list[Tensor]:
    """Return the gradients in order; bit i of ``wanted`` asks for gradient i, and the others are empty."""
    saved: list[Tensor] = []
    return _training_terms(*_in_schema_order(operands), map_cotangent, potential_cotangent, saved, wanted)


def map_jvp(operands: Operands, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """Return the map (..., d) and its derivative along ``tangent``."""
    return _map_jvp(*_in_schema_order(operands), tangent)


def _in_schema_order(operands: Operands) -> tuple[Any, ...]:
    """Return the arguments that every operator takes first. potential_and_map spells them out, for speed."""
    x, skip_weight, bias, weights, constant, embedding, (codes, parameters, _), route, _ = operands
    product_dtype = None
    return x, skip_weight, bias, weights, constant, embedding, codes, parameters, product_dtype, route


def softplus(raws: Sequence[Tensor]) -> list[Tensor]:
    """Return the softplus of each tensor."""
    return _C.softplus(raws)
