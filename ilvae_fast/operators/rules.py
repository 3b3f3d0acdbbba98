"""Autograd functions of the operators with rules for every transformation of PyTorch.

First-order autograd of the operators is C++ (``csrc/torch/autograd.cpp``). A C++ autograd function has no rules for
``torch.func`` and forward mode, and no derivatives of higher order; those are here. A derivative that is made of maps,
training terms and Jacobian-vector products is computed by these operators, which have rules themselves. The others
differentiate the plain functions of ``plain.py``. Both hold to any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import backend, native, plain
from .activations import decode
from .operands import Operands
from .plain import Static
from .reference import embed
from .transforms import along, forward_modes_nested, living, transforms_active, transposed_pull_back


def _differentiable(
    name: str,
    compiled: Callable[..., tuple[Tensor, ...]],
    plain_function: Callable[..., tuple[Tensor, ...]],
    rowwise: Callable[[Static], int],
    gradients: Callable[..., Sequence[Tensor | None] | None] = lambda *_: None,
    derivatives: Callable[..., tuple[Tensor, ...] | None] = lambda *_: None,
) -> Callable[..., Any]:
    """Return a function whose value is that of ``compiled`` and whose derivatives are those of ``plain_function``.

    Args:
        rowwise: of a Static; how many leading tensors have one row per row of the result. Where vmap batches only
            these, the batch joins their leading dimensions and the compiled operator runs.
        gradients: of (static, tensors, needed, cotangents): the backward pass by operators, None where it is not made
            of them.
        derivatives: of (static, tensors, tangents): the results' tangents, likewise.
    """

    class Rules(torch.autograd.Function):
        @staticmethod
        def forward(static: Static, *tensors: Tensor | None) -> tuple[Tensor, ...]:
            return compiled(static, *tensors)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.static = inputs[0]
            ctx.dtypes = [t.dtype for t in output]
            ctx.set_materialize_grads(False)  # which zeros are zeros, tells what need not be computed
            ctx.save_for_backward(*inputs[1:])
            ctx.save_for_forward(*inputs[1:])

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
            needed, saved = ctx.needs_input_grad[1:], living(ctx.saved_tensors)
            terms = gradients(ctx.static, saved, needed, cotangents)
            if terms is None:
                terms = plain.gradients(plain_function, ctx.static, saved, needed, cotangents)
            return (None, *terms)

        @staticmethod
        def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
            pushed = derivatives(ctx.static, ctx.saved_tensors, tangents)
            if pushed is None:
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
        if is_compiling() or forward_modes_nested():
            return plain_function(static, *tensors)
        # without a transformation, the operators' own autograd functions are the shorter way
        return (Rules.apply if transforms_active() else compiled)(static, *tensors)

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


def _embed(x: Tensor, tensors: Sequence[Any]) -> Tensor:
    """``B x``, for the operands ``tensors``."""
    _, skip_weight, _, _, embedding, *_ = tensors
    width = skip_weight.shape[-1]
    return embed(x, width if embedding is None and x.shape[-1] != width else embedding)


def _pull(y: Tensor, tensors: Sequence[Any]) -> Tensor:
    """``B^T y``, for the operands ``tensors``."""
    x, *_, embedding = tensors[:5]
    return y[..., : x.shape[-1]] if embedding is None else y @ embedding


def _map(static: Static, tensors: Sequence[Any]) -> Tensor:
    return potential_and_map(static._replace(wanted=(False, True)), *tensors)[0]


def _only_x(wanted: Sequence[bool]) -> bool:
    return wanted[0] and not any(wanted[1:])


def _gradients_of_values(
    static: Static, tensors: Sequence[Any], needed: Sequence[bool], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of potential and map are the training terms."""
    given = iter(cotangents)
    u, v = (next(given) if w else None for w in static.wanted)
    if u is None and v is None:
        return [None] * len(tensors)
    return plain.spread(training_terms(static._replace(wanted=tuple(needed)), v, u, *tensors), needed)


def _derivatives_of_values(
    static: Static, tensors: Sequence[Any], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, ...] | None:
    """Along x alone: ``phi' = <T, B x'>`` and ``T' = J B x'`` with ``J = dT/dy``."""
    tangent, *others = tangents
    if tangent is None or any(t is not None for t in others):
        return None
    want_potential, want_map = static.wanted
    if not want_map:
        return ((_map(static, tensors) * _embed(tangent, tensors)).sum(-1),)
    there, map_tangent = map_jvp(static, tangent, *tensors)
    return ((there * _embed(tangent, tensors)).sum(-1), map_tangent) if want_potential else (map_tangent,)


def _gradients_of_terms(
    static: Static, tensors: Sequence[Any], needed: Sequence[bool], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None] | None:
    """Of the gradient in x alone, ``B^T (J v + u T)``: those of ``<v, J B c> + <u B c, T>``.

    The second product is that of a map and its cotangent ``u B c``. So code that takes a map by autograd of its
    potential trains by the operators alone. The gradients of the first in x and weights are third derivatives of the
    potential, for which there is no operator.
    """
    c, *others = plain.spread(cotangents, static.wanted)
    if c is None or any(t is not None for t in others):
        return None
    v, u, *operands = tensors
    needs_v, needs_u, *needs = needed
    terms: list[Tensor | None] = [None] * len(tensors)
    if v is not None and needs_v:
        terms[0] = map_jvp(static, c, *operands)[1]
    if v is not None and any(needs):
        of_v = static._replace(wanted=(True, *(False for _ in others)))
        whole = (v, None, *operands), (False, False, *needs)
        terms[2:] = plain.gradients(plain.training_terms, of_v, *whole, [c])[2:]
    if u is not None:
        direction = _embed(c, operands)
        there = _map(static, operands) if needs_u or needs[4] else None
        if there is not None and needs_u:
            terms[1] = (there * direction).sum(-1)
        if any(needs):
            of_u = training_terms(static._replace(wanted=tuple(needs)), u.unsqueeze(-1) * direction, None, *operands)
            more = plain.spread(of_u, needs)
            if there is not None and (of_embedding := more[4]) is not None:
                outer = (u.unsqueeze(-1) * there).reshape(-1, there.shape[-1]).mT @ c.reshape(-1, c.shape[-1])
                more[4] = of_embedding + outer.to(of_embedding.dtype)
            pairs = zip(terms[2:], more, strict=True)
            terms[2:] = [b if a is None else a if b is None else a + b for a, b in pairs]
    return terms


def _derivatives_of_terms(
    static: Static, tensors: Sequence[Any], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, ...] | None:
    """Along the cotangents, in which all terms are linear; along x where the only term is ``u B^T T``."""
    v, u, *operands = tensors
    v_tangent, u_tangent, x_tangent, *others = tangents
    if any(t is not None for t in others):
        return None
    if x_tangent is None:
        return training_terms(static, v_tangent, u_tangent, *operands)
    if v is not None or not _only_x(static.wanted):
        return None
    there, map_tangent = map_jvp(static, x_tangent, *operands)
    total = u.unsqueeze(-1) * map_tangent
    if u_tangent is not None:
        total = total + u_tangent.unsqueeze(-1) * there
    return (_pull(total, operands),)


def _gradients_of_jvp(
    static: Static, tensors: Sequence[Any], needed: Sequence[bool], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None] | None:
    """Those of the map are training terms, and so is that of its tangent in the tangent alone, ``B^T J c``."""
    needs_tangent, *needs = needed
    of_map, of_tangent = cotangents
    if of_tangent is not None and any(needs):
        return None
    _, *operands = tensors
    terms: list[Tensor | None] = [None] * len(tensors)
    if of_tangent is not None and needs_tangent:
        only_x = (True, *(False for _ in needs[1:]))
        (terms[0],) = training_terms(static._replace(wanted=only_x), of_tangent, None, *operands)
    if of_map is not None and any(needs):
        of_operands = training_terms(static._replace(wanted=tuple(needs)), of_map, None, *operands)
        terms[1:] = plain.spread(of_operands, needs)
    return terms


def _derivatives_of_jvp(
    static: Static, tensors: Sequence[Any], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, ...] | None:
    """Along the tangent alone, in which the result is linear."""
    tangent, *others = tangents
    if tangent is None or any(t is not None for t in others):
        return None
    _, *operands = tensors
    there, map_tangent = map_jvp(static, tangent, *operands)
    return torch.zeros_like(there), map_tangent


potential_and_map = _differentiable(
    "PotentialAndMap",
    _compiled_potential_and_map,
    plain.potential_and_map,
    lambda _: 1,
    _gradients_of_values,
    _derivatives_of_values,
)
training_terms = _differentiable(
    "TrainingTerms",
    _compiled_training_terms,
    plain.training_terms,
    lambda static: 3 if _only_x(static.wanted) else 0,
    _gradients_of_terms,
    _derivatives_of_terms,
)
map_jvp = _differentiable(
    "MapJvp", _compiled_map_jvp, plain.map_jvp, lambda _: 2, _gradients_of_jvp, _derivatives_of_jvp
)


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
    static = Static(decode(activations, parameters), flags(wanted, 5 + len(weights)), route)
    tensors = (map_cotangent, potential_cotangent, x, skip_weight, bias, inverse_lipschitz, embedding, *weights)
    _check_bits("wanted", wanted, tensors[2:])
    _check_second_order(tensors, len(weights), needed, cotangents, sum(static.wanted))
    call = static, tensors, flags(needed, len(tensors)), cotangents
    return _or_empty(_gradients_of_terms(*call) or plain.gradients(plain.training_terms, *call), x)


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
    static = Static(decode(activations, parameters), (), route)
    tensors = (tangent, x, skip_weight, bias, inverse_lipschitz, embedding, *weights)
    _check_second_order(tensors, len(weights), needed, cotangents, 2)
    call = static, tensors, flags(needed, len(tensors)), cotangents
    return _or_empty(_gradients_of_jvp(*call) or plain.gradients(plain.map_jvp, *call), x)


def _check_bits(name: str, bits: int, tensors: Sequence[Tensor | None]) -> None:
    there = sum(1 << i for i, tensor in enumerate(tensors) if tensor is not None)
    if bits < 0 or bits & ~there:
        raise ValueError(f"{name}: got {bits}, wanted bits of the {len(tensors)} tensors that are there, {there:b}")


def _check_second_order(
    tensors: Sequence[Tensor | None], layers: int, needed: int, cotangents: Sequence[Tensor], count: int
) -> None:
    """Refuse calls that only a program makes that is not autograd's."""
    x, skip_weight, *_ = tensors[-5 - layers :]
    for name, tensor in (("x", x), ("skip_weight", skip_weight)):
        if tensor is None or not tensor.shape:
            raise ValueError(f"{name}: got a tensor without dimensions, wanted one with a last dimension")
    for k, weight in enumerate(tensors[-layers:] if layers else ()):
        if weight is None or weight.dim() != 2:
            raise ValueError(f"weights[{k}]: got {None if weight is None else tuple(weight.shape)}, wanted a matrix")
    _check_bits("needed", needed, tensors)
    if len(cotangents) != count:
        raise ValueError(f"cotangents: got {len(cotangents)}, wanted {count}, one for each result")


def _or_empty(gradients: Sequence[Tensor | None], x: Tensor) -> list[Tensor]:
    return [x.new_empty(0) if g is None else g for g in gradients]


if backend.absent is None:
    _library.impl("training_terms_backward", _training_terms_backward, "CompositeImplicitAutograd")
    _library.impl("map_jvp_backward", _map_jvp_backward, "CompositeImplicitAutograd")
