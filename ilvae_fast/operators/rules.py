"""Autograd functions of the operators with rules for every transformation of PyTorch.

First-order autograd of the operators is C++ (``csrc/torch/autograd.cpp``). A C++ autograd function has no rules for
``torch.func`` and forward mode, and no derivatives of higher order; those are here. All of them differentiate the plain
functions of ``plain.py``, so they hold to any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import native, plain
from .activations import decode
from .operands import Operands
from .plain import Static
from .transforms import along, forward_modes_nested, living, transposed_pull_back


def _differentiable(
    name: str,
    compiled: Callable[..., tuple[Tensor, ...]],
    plain_function: Callable[..., tuple[Tensor, ...]],
    rowwise: Callable[[Static], int],
    first_order: Callable[..., Sequence[Tensor | None]] | None = None,
) -> Callable[..., Any]:
    """Return a function whose value is that of ``compiled`` and whose derivatives are those of ``plain_function``.

    Args:
        rowwise: of a Static; how many leading tensors have one row per row of the result. Where vmap batches only
            these, the batch joins their leading dimensions and the compiled operator runs.
        first_order: replaces the backward pass.
    """

    class Rules(torch.autograd.Function):
        @staticmethod
        def forward(static: Static, *tensors: Tensor | None) -> tuple[Tensor, ...]:
            return compiled(static, *tensors)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.static = inputs[0]
            ctx.dtypes = [t.dtype for t in output]
            ctx.save_for_backward(*inputs[1:])
            ctx.save_for_forward(*inputs[1:])

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
            needed, saved = ctx.needs_input_grad[1:], living(ctx.saved_tensors)
            if first_order is not None:
                return (None, *first_order(ctx.static, saved, needed, cotangents))
            return (None, *plain.gradients(plain_function, ctx.static, saved, needed, cotangents))

        @staticmethod
        def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
            moving = [t is not None for t in tangents]
            function, primals = plain.of_some(plain_function, ctx.static, ctx.saved_tensors, moving)
            push = along if torch._C._are_functorch_transforms_active() else transposed_pull_back
            pushed = push(function, primals, [t for t in tangents if t is not None])[1]
            return tuple(t.to(dtype) for t, dtype in zip(pushed, ctx.dtypes, strict=True))

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], static: Static, *tensors: Tensor | None) -> Any:
            dims = in_dims[1:]
            rows = rowwise(static)
            if rows and all(d is None for d in dims[rows:]):
                leading = [
                    t if t is None else t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
                    for t, d in zip(tensors[:rows], dims[:rows], strict=True)
                ]
                return Rules.apply(static, *leading, *tensors[rows:]), 0
            batched = [t for t, d in zip(tensors, dims, strict=True) if d is not None]
            function, _ = plain.of_some(plain_function, static, tensors, [d is not None for d in dims])
            return torch.vmap(function, tuple(d for d in dims if d is not None))(*batched), 0

    def function(static: Static, *tensors: Tensor | None) -> Any:
        # compiled regions cannot trace functions with rules, and nested forward modes lose their tangents
        whole = plain_function if is_compiling() or forward_modes_nested() else Rules.apply
        return whole(static, *tensors)

    Rules.__name__ = Rules.__qualname__ = name
    return function


def _operands(static: Static, tensors: Sequence[Any]) -> Operands:
    x, skip_weight, bias, constant, embedding, *weights = tensors
    return Operands(x, skip_weight, bias, weights, constant, embedding, static.activations, static.route, None)


def _compiled_potential_and_map(static: Static, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    results = native.potential_and_map(_operands(static, tensors), *static.wanted)
    return tuple(r for r, w in zip(results, static.wanted, strict=True) if w)


def _compiled_training_terms(
    static: Static, map_cotangent: Tensor | None, potential_cotangent: Tensor | None, *tensors: Tensor | None
) -> tuple[Tensor, ...]:
    wanted = sum(1 << i for i, flag in enumerate(static.wanted) if flag)
    terms = native.training_terms(_operands(static, tensors), map_cotangent, potential_cotangent, wanted)
    return tuple(t for t, w in zip(terms, static.wanted, strict=True) if w)


def _compiled_map_jvp(static: Static, tangent: Tensor, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    return native.map_jvp(_operands(static, tensors), tangent)


def _first_order(
    static: Static, tensors: Sequence[Tensor | None], needed: Sequence[bool], cotangents: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the gradients of potential and map: the training terms, which are differentiable themselves."""
    given = iter(cotangents)
    u, v = (next(given) if w else None for w in static.wanted)
    return plain.spread(training_terms(Static(static.activations, tuple(needed), static.route), v, u, *tensors), needed)


training_terms = _differentiable(
    "TrainingTerms",
    _compiled_training_terms,
    plain.training_terms,
    lambda static: 3 if static.wanted[0] and not any(static.wanted[1:]) else 0,
)
potential_and_map = _differentiable(
    "PotentialAndMap", _compiled_potential_and_map, plain.potential_and_map, lambda _: 1, _first_order
)
map_jvp = _differentiable("MapJvp", _compiled_map_jvp, plain.map_jvp, lambda _: 2)


def flags(bits: int, count: int) -> tuple[bool, ...]:
    """Return ``count`` bits, the lowest first, as the operators take their wanted gradients."""
    return tuple(bool(bits >> i & 1) for i in range(count))


# Double backward of the C++ autograd functions: operators that csrc/torch/autograd.cpp calls

_library = torch.library.Library("ilvae_fast", "IMPL")


def _training_terms_backward(
    x: Tensor,
    skip_weight: Tensor,
    bias: Tensor,
    weights: list[Tensor],
    inverse_lipschitz: Tensor,
    embedding: Tensor | None,
    activations: list[int],
    parameters: list[float],
    product_dtype: torch.dtype | None,
    route: int,
    cotangents: list[Tensor],
    map_cotangent: Tensor | None,
    potential_cotangent: Tensor | None,
    wanted: int,
    needed: int,
) -> list[Tensor]:
    static = Static(decode(activations, parameters), flags(wanted, 5 + len(weights)))
    tensors = (map_cotangent, potential_cotangent, x, skip_weight, bias, inverse_lipschitz, embedding, *weights)
    return _or_empty(plain.gradients(plain.training_terms, static, tensors, flags(needed, len(tensors)), cotangents), x)


def _map_jvp_backward(
    x: Tensor,
    skip_weight: Tensor,
    bias: Tensor,
    weights: list[Tensor],
    inverse_lipschitz: Tensor,
    embedding: Tensor | None,
    activations: list[int],
    parameters: list[float],
    product_dtype: torch.dtype | None,
    route: int,
    cotangents: list[Tensor],
    tangent: Tensor,
    needed: int,
) -> list[Tensor]:
    static = Static(decode(activations, parameters), ())
    tensors = (tangent, x, skip_weight, bias, inverse_lipschitz, embedding, *weights)
    return _or_empty(plain.gradients(plain.map_jvp, static, tensors, flags(needed, len(tensors)), cotangents), x)


def _or_empty(gradients: Sequence[Tensor | None], x: Tensor) -> list[Tensor]:
    return [x.new_empty(0) if g is None else g for g in gradients]


_library.impl("training_terms_backward", _training_terms_backward, "CompositeImplicitAutograd")
_library.impl("map_jvp_backward", _map_jvp_backward, "CompositeImplicitAutograd")
