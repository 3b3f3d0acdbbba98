"""Potential, Brenier map and their derivatives as stateless functions of effective weights.

Arguments common to all functions:

    x (..., d), or (..., m) with an embedding: float64, float32, bfloat16 or, on GPUs, float16; any strides, any leading
        shape, also empty
    skip_weight (S+1, d), bias (S+1,): the skip terms of all layers, S = n_1 + .. + n_K; the last row is the output's
    weights: the effective, non-negative [W_2 (n_2, n_1), .., W_K (n_K, n_{K-1}), w (1, n_K)]
    activations: K + 1 names or :class:`ilvae_fast.Activation`, the output's last
    inverse_lipschitz: L >= 0, a float or a tensor with one element in float32 or float64. A float is checked; a tensor
        is never read back to the host.
    embedding: None; an int D, the first m of D coordinates (B the padded identity, never formed); or B (D, m)
    route: "auto", "matmul" or "fused" (see :func:`ilvae_fast.plan`)
    recompute: whether the backward pass recomputes pre-activations and adjoints instead of reading what the forward
        pass saved; None: as :func:`ilvae_fast.plan` says
    validate: also check that all values are finite and weights and L non-negative, which reads them back to the host

Tensors share one dtype (but L) and one device. Results have the dtype of ``x``; for bfloat16 all arithmetic between
the matrix products is in float32. Under ``torch.autocast`` matrix products take operands in the autocast dtype,
everything else is in float32 and results have the autocast dtype, as those of ``torch.nn.Linear``; float64 is left
alone.

Errors name the argument and are raised before any work: ValueError (shapes, dtypes, devices, values, names) and
TypeError. Which derivatives exist under which transformation is in the support matrix of the README.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _backend, ops, reference
from ._errors import unknown_name
from .activations import Activation, EncodedActivations, encode

MAX_LAYERS = 55  # hidden ones: operators name wanted gradients by the bits of an integer (csrc/problem.h)


class BrenierGradients(NamedTuple):
    """Gradients of ``sum <v, T> + sum u phi``; None where not asked for or not a tensor."""

    x: Tensor | None
    skip_weight: Tensor | None
    bias: Tensor | None
    weights: list[Tensor] | None
    inverse_lipschitz: Tensor | None
    embedding: Tensor | None


# Names as the operators take them: gradient i by bit i, those of the weights, the last, by all that follow.
_GRADIENT_BITS = {
    "x": 1 << 0,
    "skip_weight": 1 << 1,
    "bias": 1 << 2,
    "inverse_lipschitz": 1 << 3,
    "embedding": 1 << 4,
    "weights": -1 << 5,
}


class Operands(NamedTuple):
    """The arguments of one call, checked where Python holds them and in the form the operators take."""

    x: Tensor
    skip_weight: Tensor
    bias: Tensor
    weights: Sequence[Tensor]
    inverse_lipschitz: Tensor
    embedding: Tensor | None
    activations: EncodedActivations
    route: int  # its place in ROUTES
    recompute: bool | None

    def reference_arguments(self) -> tuple[tuple[Tensor, Tensor, Tensor, Sequence[Tensor]], dict]:
        """Positional and keyword arguments of :mod:`ilvae_fast.reference`."""
        embedding: Tensor | int | None = self.embedding
        if embedding is None and self.x.shape[-1] != self.skip_weight.shape[-1]:
            embedding = int(self.skip_weight.shape[-1])
        return (self.x, self.skip_weight, self.bias, self.weights), {
            "activations": self.activations.layers,
            "inverse_lipschitz": self.inverse_lipschitz,
            "embedding": embedding,
        }


def check_inverse_lipschitz(value: float) -> float:
    """A finite L >= 0 as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"inverse_lipschitz: got {type(value).__name__}, wanted a float or a tensor with one element")
    if not 0 <= value < math.inf:  # a comparison, which compiled regions guard on
        raise ValueError(f"inverse_lipschitz: got {value!r}, wanted a finite number >= 0")
    return value


_constants: dict[tuple[float, torch.dtype], Tensor] = {}


def _constant(value: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dim() > 1:
            raise ValueError(f"inverse_lipschitz: got shape {tuple(value.shape)}, wanted one element")
        return value if value.dim() == 1 else value.reshape(1)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    value = check_inverse_lipschitz(value)
    # Making a tensor is a few percent of a small call. Not kept: what a compiled region, a transformation or a mode
    # makes, and what lies on a GPU, where it may belong to a graph that is being captured.
    plain = type(like) is Tensor or type(like) is torch.nn.Parameter
    if not (plain and like.is_cpu) or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return torch.full((1,), value, dtype=dtype, device=like.device)
    kept = _constants.get((value, dtype))
    if kept is None:
        with torch.inference_mode(False):  # a backward pass may want it
            kept = torch.full((1,), value, dtype=dtype, device=like.device)
        if type(kept) is Tensor and len(_constants) < 64:
            _constants[value, dtype] = kept
    return kept


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity; reads back to the host."""
    if bad := int((~tensor.isfinite()).sum()):
        raise ValueError(f"{name}: got {bad} non-finite of {tensor.numel()} values, wanted finite ones")


def _validate(operands: Operands) -> None:
    named = {
        "x": operands.x,
        "skip_weight": operands.skip_weight,
        "bias": operands.bias,
        "inverse_lipschitz": operands.inverse_lipschitz,
        "embedding": operands.embedding,
        **{f"weights[{k}]": w for k, w in enumerate(operands.weights)},
    }
    for name, tensor in named.items():
        if tensor is None:
            continue
        tensor = tensor.detach()
        check_finite(name, tensor)
        if (name.startswith("weights") or name == "inverse_lipschitz") and bool((tensor < 0).any()):
            raise ValueError(f"{name}: got a smallest value of {float(tensor.min()):g}, wanted values >= 0")


def prepare(
    x: Tensor,
    skip_weight: Tensor,
    bias: Tensor,
    weights: Sequence[Tensor],
    activations: Sequence[str | Activation] | EncodedActivations,
    inverse_lipschitz: float | Tensor,
    embedding: Tensor | int | None,
    route: str,
    recompute: bool | None,
    validate: bool,
) -> Operands:
    """Check what the operators cannot see and bring the rest into their form."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, wanted a tensor")
    code = 0 if route == "auto" else _backend.route_code(route)
    encoded = activations if isinstance(activations, EncodedActivations) else encode(activations)
    if isinstance(embedding, int):
        if embedding != skip_weight.shape[-1]:
            raise ValueError(
                f"embedding: got {embedding}, wanted the width of skip_weight, {skip_weight.shape[-1]}, or a tensor"
            )
        embedding = None
    elif embedding is None and (not (shape := x.shape) or shape[-1] != skip_weight.shape[-1]):
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, wanted (..., {skip_weight.shape[-1]}) as skip_weight "
            f"{tuple(skip_weight.shape)} says, or an embedding"
        )
    operands = Operands(
        x, skip_weight, bias, weights, _constant(inverse_lipschitz, x), embedding, encoded, code, recompute
    )
    if validate:
        _validate(operands)
    return operands


def apply_potential_and_map(operands: Operands, want_potential: bool, want_map: bool) -> tuple[Tensor, Tensor]:
    """Potential and map of prepared operands; what is not wanted comes back empty."""
    if _backend._current == "reference":
        args, options = operands.reference_arguments()
        x = operands.x
        if not want_map:
            return ops.as_result(reference.potential(*args, **options), x), x.new_empty(0)
        phi, t = reference.potential_and_map(*args, **options)
        return ops.as_result(phi, x), ops.as_result(t, x)
    return ops.potential_and_map(operands, want_potential, want_map)


def apply_map_jvp(operands: Operands, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """Map and directional derivative of prepared operands."""
    if _backend._current == "reference":
        return ops.plain_map_jvp(operands, tangent)
    return ops.map_jvp(operands, tangent)


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
    """``phi(B x) = G(B x) + L/2 |B x|^2``, shape (...): the convex potential (design section 2)."""
    operands = prepare(
        x, skip_weight, bias, weights, activations, inverse_lipschitz, embedding, route, recompute, validate
    )
    return apply_potential_and_map(operands, True, False)[0]


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
    """``T(B x) = grad G(B x) + L B x``, shape (..., d): L-inverse Lipschitz (Kinoshita et al., ICML 2023)."""
    operands = prepare(
        x, skip_weight, bias, weights, activations, inverse_lipschitz, embedding, route, recompute, validate
    )
    return apply_potential_and_map(operands, False, True)[1]


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
    """``(phi, T)``, shapes (...) and (..., d), for little more than the map alone."""
    operands = prepare(
        x, skip_weight, bias, weights, activations, inverse_lipschitz, embedding, route, recompute, validate
    )
    return apply_potential_and_map(operands, True, True)


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
    """The training terms: gradients of ``sum <map_cotangent, T> + sum potential_cotangent phi``.

    Args:
        map_cotangent: v (..., d), or None; without it there is no tangent sweep.
        potential_cotangent: u (...), or None; at least one of the two is wanted.
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
    terms = ops.plain_training_terms if _backend._current == "reference" else ops.training_terms
    gx, ga, gb, gl, ge, *gw = terms(operands, map_cotangent, potential_cotangent, wanted)
    if gl is not None and isinstance(inverse_lipschitz, Tensor) and inverse_lipschitz.dim() == 0:
        gl = gl.reshape(())
    # of the weights' gradients none is None where they are wanted, which the type of the list cannot say
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
    """``(T, T')``, both (..., d): the map and its derivative along ``tangent`` (the shape of ``x``).

    Without an embedding ``dT/dx`` is symmetric, so this is the vector-Jacobian product too.
    """
    operands = prepare(x, skip_weight, bias, weights, activations, inverse_lipschitz, embedding, route, None, validate)
    return apply_map_jvp(operands, tangent)
