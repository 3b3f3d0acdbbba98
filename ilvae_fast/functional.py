"""Potential, Brenier map and their derivatives as stateless functions of effective weights.

Arguments common to all functions:

- ``x`` (..., d), or (..., m) with an embedding: float64, float32, bfloat16 or, on GPUs, float16; any strides, any
  leading shape, also empty
- ``skip_weight`` (S+1, d), ``bias`` (S+1,): the skip terms of all layers, S = n_1 + .. + n_K; the last row is that of
  the output
- ``weights``: the effective, non-negative [W_2 (n_2, n_1), .., W_K (n_K, n_{K-1}), w (1, n_K)]
- ``activations``: K + 1 names or :class:`ilvae_fast.Activation`, the output's last
- ``inverse_lipschitz``: L >= 0, a float or a tensor with one element in float32 or float64. A float is checked; a
  tensor is never read back to the host
- ``embedding``: None; an int D, the first m of D coordinates (B the padded identity, never formed); or B (D, m)
- ``route``: "auto", "matmul" or "fused" (see :func:`ilvae_fast.plan`)
- ``recompute``: whether the backward pass recomputes pre-activations and adjoints instead of reading what the forward
  pass saved; None: as :func:`ilvae_fast.plan` says
- ``validate``: also check that all values are finite and weights and L non-negative, which reads them back to the host

Tensors share one dtype (but L) and one device. Results have the dtype of ``x``; for bfloat16 all arithmetic between
the matrix products is in float32. Under ``torch.autocast`` matrix products take operands in the autocast dtype,
everything else is in float32 and results have the autocast dtype, as those of ``torch.nn.Linear``; float64 is left
alone.

Errors are raised before any work and name the argument: ValueError (shapes, dtypes, devices, values, names) and
TypeError. Which derivatives exist under which transformation is in ``docs/derivatives.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ._support.errors import unknown_name
from .operators import dispatch
from .operators.activations import Activation
from .operators.operands import Operands as Operands
from .operators.operands import prepare


class BrenierGradients(NamedTuple):
    """Gradients of ``sum <v, T> + sum u phi``. One that was not asked for, or not of a tensor, is None."""

    x: Tensor | None
    skip_weight: Tensor | None
    bias: Tensor | None
    weights: list[Tensor] | None
    inverse_lipschitz: Tensor | None
    embedding: Tensor | None


# Gradients as the operators ask for them: gradient i by bit i. Those of the weights come last and take all bits there.
_GRADIENT_BITS = {
    "x": 1 << 0,
    "skip_weight": 1 << 1,
    "bias": 1 << 2,
    "inverse_lipschitz": 1 << 3,
    "embedding": 1 << 4,
    "weights": -1 << 5,
}


def potential(
    x: Tensor,
    skip_weight: Tensor,
    bias: Tensor,
    weights: Sequence[Tensor],
    *,
    activations: Sequence[str | Activation],
    inverse_lipschitz: float | Tensor = 1.0,
    embedding: Tensor | int | None = None,
    route: str = "auto",
    recompute: bool | None = None,
    validate: bool = False,
) -> Tensor:
    """Return the convex potential ``phi(B x) = G(B x) + L/2 |B x|^2``, shape (...)."""
    operands = prepare(
        x, skip_weight, bias, weights, activations, inverse_lipschitz, embedding, route, recompute, validate
    )
    return dispatch.potential_and_map(operands, True, False)[0]


def brenier_map(
    x: Tensor,
    skip_weight: Tensor,
    bias: Tensor,
    weights: Sequence[Tensor],
    *,
    activations: Sequence[str | Activation],
    inverse_lipschitz: float | Tensor = 1.0,
    embedding: Tensor | int | None = None,
    route: str = "auto",
    recompute: bool | None = None,
    validate: bool = False,
) -> Tensor:
    """Return the map ``T(B x) = grad G(B x) + L B x``, shape (..., d).

    It is L-inverse Lipschitz (Kinoshita et al., ICML 2023).
    """
    operands = prepare(
        x, skip_weight, bias, weights, activations, inverse_lipschitz, embedding, route, recompute, validate
    )
    return dispatch.potential_and_map(operands, False, True)[1]


def potential_and_map(
    x: Tensor,
    skip_weight: Tensor,
    bias: Tensor,
    weights: Sequence[Tensor],
    *,
    activations: Sequence[str | Activation],
    inverse_lipschitz: float | Tensor = 1.0,
    embedding: Tensor | int | None = None,
    route: str = "auto",
    recompute: bool | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return ``(phi, T)``, shapes (...) and (..., d), for little more than the map alone."""
    operands = prepare(
        x, skip_weight, bias, weights, activations, inverse_lipschitz, embedding, route, recompute, validate
    )
    return dispatch.potential_and_map(operands, True, True)


def brenier_map_vjp(
    x: Tensor,
    skip_weight: Tensor,
    bias: Tensor,
    weights: Sequence[Tensor],
    *,
    activations: Sequence[str | Activation],
    map_cotangent: Tensor | None = None,
    potential_cotangent: Tensor | None = None,
    inverse_lipschitz: float | Tensor = 1.0,
    embedding: Tensor | int | None = None,
    wrt: Sequence[str] = BrenierGradients._fields,
    route: str = "auto",
    validate: bool = False,
) -> BrenierGradients:
    """Return the training terms: the gradients of ``sum <map_cotangent, T> + sum potential_cotangent phi``.

    Args:
        map_cotangent: v (..., d), or None, which saves the tangent sweep.
        potential_cotangent: u (...), or None. At least one of the two is needed.
        wrt: names of the arguments whose gradients are wanted; the others are not computed.

    Returns:
        Gradients in the shapes and dtypes of their arguments.
    """
    if map_cotangent is None and potential_cotangent is None:
        raise ValueError("map_cotangent and potential_cotangent: got neither, wanted at least one")
    wanted = 0
    for name in wrt:
        if name not in _GRADIENT_BITS:
            raise unknown_name("wrt", name, BrenierGradients._fields)
        wanted |= _GRADIENT_BITS[name]
    operands = prepare(x, skip_weight, bias, weights, activations, inverse_lipschitz, embedding, route, None, validate)
    if not isinstance(inverse_lipschitz, Tensor):
        wanted &= ~_GRADIENT_BITS["inverse_lipschitz"]
    if operands.embedding is None:
        wanted &= ~_GRADIENT_BITS["embedding"]
    wanted &= (1 << 5 + len(weights)) - 1
    gx, ga, gb, gl, ge, *gw = dispatch.training_terms(operands, map_cotangent, potential_cotangent, wanted)
    if gl is not None and isinstance(inverse_lipschitz, Tensor) and inverse_lipschitz.dim() == 0:
        gl = gl.reshape(())
    # where the weights' gradients are wanted none of them is None, which the type of the list cannot say
    return BrenierGradients(gx, ga, gb, gw if "weights" in wrt else None, gl, ge)  # type: ignore[arg-type]


def brenier_map_jvp(
    x: Tensor,
    tangent: Tensor,
    skip_weight: Tensor,
    bias: Tensor,
    weights: Sequence[Tensor],
    *,
    activations: Sequence[str | Activation],
    inverse_lipschitz: float | Tensor = 1.0,
    embedding: Tensor | int | None = None,
    route: str = "auto",
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return ``(T, T')``, both (..., d): the map and its derivative along ``tangent`` (the shape of ``x``).

    Without an embedding ``dT/dx`` is symmetric, so this is the vector-Jacobian product too.
    """
    operands = prepare(x, skip_weight, bias, weights, activations, inverse_lipschitz, embedding, route, None, validate)
    return dispatch.map_jvp(operands, tangent)
