"""The operators by plain autograd on :mod:`ilvae_fast.reference`, differentiable any number of times.

They take the arguments of the autograd functions in ``rules.py``: what is no tensor in a :class:`Static`, then tensors
in the order of their gradients, x, skip_weight, bias, inverse_lipschitz, embedding, weights... They return only what
``Static.wanted`` asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from . import log, reference
from .activations import EncodedActivations
from .operands import result_dtype
from .transforms import Function, pull_back


class Static(NamedTuple):
    """What a call has besides tensors."""

    activations: EncodedActivations
    wanted: tuple[bool, ...]  # potential_and_map: (potential, map); training_terms: the gradients, in tensor order
    route: int = 0


def potential_and_map(static: Static, *tensors: Any) -> tuple[Tensor, ...]:
    """Return potential (...) and map (..., d), or the one that is wanted."""
    log.plain("potential_and_map", tensors[0])
    return _potential_and_map(static, *tensors)


def _potential_and_map(static: Static, *tensors: Any) -> tuple[Tensor, ...]:
    x, skip_weight, bias, inverse_lipschitz, embedding, *weights = tensors
    width, dtype = skip_weight.shape[-1], result_dtype(x)
    options: dict[str, Any] = {
        "activations": static.activations.layers,
        "inverse_lipschitz": inverse_lipschitz,
        "embedding": width if embedding is None and x.shape[-1] != width else embedding,
    }
    want_potential, want_map = static.wanted
    if not want_map:
        return (reference.potential(x, skip_weight, bias, weights, **options).to(dtype),)
    both = reference.potential_and_map(x, skip_weight, bias, weights, **options)
    return tuple(value.to(dtype) for value in (both if want_potential else both[1:]))


def training_terms(
    static: Static, map_cotangent: Tensor | None, potential_cotangent: Tensor | None, *tensors: Tensor | None
) -> tuple[Tensor, ...]:
    """Return the wanted gradients of ``sum <v, T> + sum u phi``."""
    assert tensors[0] is not None
    log.plain("training_terms", tensors[0])
    cotangents = [c for c in (potential_cotangent, map_cotangent) if c is not None]
    outputs = Static(static.activations, (potential_cotangent is not None, map_cotangent is not None))
    function, arguments = of_some(_potential_and_map, outputs, tensors, static.wanted)
    values, pull = pull_back(function, arguments, tensors)
    return pull(tuple(c.to(v.dtype) for c, v in zip(cotangents, values, strict=True)))


def map_jvp(static: Static, tangent: Tensor, x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the map (..., d) and its derivative along ``tangent``.

    ``dT/dy`` is a Hessian, hence symmetric: what pulls a cotangent back pushes a tangent forward. Forward mode itself
    nests in no dual level, and leaves zeros in compiled backward passes that Inductor cannot read.
    """
    log.plain("map_jvp", x)
    skip_weight, bias, constant, embedding, *weights = tensors
    assert skip_weight is not None
    width = skip_weight.shape[-1]
    into = width if embedding is None and x.shape[-1] != width else embedding
    y, v = reference.embed(x, into), reference.embed(tangent, into)
    outputs = Static(static.activations, (False, True))

    def function(y: Tensor) -> tuple[Tensor, ...]:
        return _potential_and_map(outputs, y, skip_weight, bias, constant, None, *weights)

    (value,), pull = pull_back(function, [y], [v, *tensors])
    (derivative,) = pull((v.to(value.dtype),))
    return value, derivative.to(value.dtype)


def of_some(
    function: Callable[..., tuple[Tensor, ...]],
    static: Static,
    tensors: Sequence[Any],
    chosen: Sequence[bool],
) -> tuple[Function, list[Tensor]]:
    """Return ``function`` of its chosen tensors alone, and those tensors, of which none is None."""
    index = [i for i, is_chosen in enumerate(chosen) if is_chosen]

    def restricted(*some: Tensor) -> tuple[Tensor, ...]:
        everything = list(tensors)
        for i, tensor in zip(index, some, strict=True):
            everything[i] = tensor
        return function(static, *everything)

    return restricted, [tensors[i] for i in index]


def gradients(
    function: Callable[..., tuple[Tensor, ...]],
    static: Static,
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return the vector-Jacobian product of ``function`` with respect to the needed tensors; None for the others.

    A cotangent that is None is zero.
    """
    restricted, arguments = of_some(function, static, tensors, needed)
    values, pull = pull_back(restricted, arguments, tensors)
    given = (v.new_zeros(()).expand(v.shape) if c is None else c for c, v in zip(cotangents, values, strict=True))
    return spread(pull(tuple(given)), needed)


def spread(terms: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Return the next term where one is wanted and None elsewhere."""
    remaining = iter(terms)
    return [next(remaining) if w else None for w in wanted]
