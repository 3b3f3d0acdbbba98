"""The operands of one call: checked where Python holds them, and in the form that the operators take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._support.checks import check_tensor
from . import backend
from .activations import Activation, EncodedActivations, encode
from .extension import without_operators
from .plan import ROUTES, Plan, plan, route_code

MAX_LAYERS = 55  # hidden ones: operators name wanted gradients by the bits of an integer (csrc/problem.h)


class Operands(NamedTuple):
    """The arguments of one call. :func:`prepare` makes them."""

    x: Tensor
    skip_weight: Tensor
    bias: Tensor
    weights: Sequence[Tensor]
    inverse_lipschitz: Tensor
    embedding: Tensor | None
    activations: EncodedActivations
    route: int  # its place in ROUTES
    recompute: bool | None

    def in_order(self) -> tuple[Any, ...]:
        """Return the tensors, among which the embedding may be None, in the order of their gradients."""
        x, skip_weight, bias, weights, constant, embedding, *_ = self
        return x, skip_weight, bias, constant, embedding, *weights

    def recorded(self) -> bool:
        """Whether autograd records a call with these operands."""
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in self.in_order())

    def plan(self) -> Plan:
        """Say what this very call does: :func:`ilvae_fast.plan` of its shapes, dtypes, device and autograd state.

        On the reference backend, and on devices without compiled operators, the route is ``"reference"``; costs remain
        those of the compiled operators.
        """
        m, d, dense = self.x.shape[-1], self.skip_weight.shape[-1], self.embedding is not None
        p = plan(
            self.x.shape[:-1].numel(),
            d,
            [weight.shape[-1] for weight in self.weights],
            embedding_features=m if dense or m != d else None,
            embedding="dense" if dense else "identity",
            dtype=result_dtype(self.x),
            route=ROUTES[self.route],
            recompute=self.recompute,
            device=self.x.device,
            recorded=self.recorded(),
        )
        if backend.current_backend() == "reference":
            return replace(p, route="reference", reason="use_backend or ILVAE_FAST_BACKEND asks for it")
        if (reason := without_operators(self.x.device.type)) is not None:
            return replace(p, route="reference", reason=reason)
        return p


def result_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of products and results for ``x``: its own, or under autocast that of autocast."""
    device = x.device.type
    # autocast does not know the meta device
    if x.dtype == torch.float64 or device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def check_inverse_lipschitz(value: float) -> float:
    """Return a finite L >= 0 as it is.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"inverse_lipschitz: got {type(value).__name__}, wanted a float or a tensor with one element")
    # a compiled region has one graph for all values, which finds out as it runs (assert_constant)
    if not torch.compiler.is_compiling() and not 0 <= value < math.inf:
        raise ValueError(f"inverse_lipschitz: got {value!r}, wanted a finite number >= 0")
    return value


_constants: dict[tuple[float, torch.dtype], Tensor] = {}


def _constant(value: float | Tensor, like: Tensor) -> Tensor:
    """Return L as a tensor of shape (1,)."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dim() > 1:
            raise ValueError(f"inverse_lipschitz: got shape {tuple(value.shape)}, wanted one element")
        return value if value.dim() == 1 else value.reshape(1)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    value = check_inverse_lipschitz(value)
    # Making a tensor takes a few percent of a small call, so constants are kept. Not kept is what a compiled region, a
    # transformation or a mode makes, nor what lies on a GPU, where it may belong to a graph that is being captured.
    plain = type(like) is Tensor or type(like) is torch.nn.Parameter
    if torch.compiler.is_compiling():
        constant = as_constant(value, dtype, like.device)
        assert_constant(constant)
        return constant
    if not (plain and like.is_cpu) or torch._C._are_functorch_transforms_active():
        return torch.full((1,), value, dtype=dtype, device=like.device)
    kept = _constants.get((value, dtype))
    if kept is None:
        with torch.inference_mode(False):  # a backward pass may want it
            kept = torch.full((1,), value, dtype=dtype, device=like.device)
        if type(kept) is Tensor and len(_constants) < 64:
            _constants[value, dtype] = kept
    return kept


def as_constant(value: float, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """Return a number as a tensor (1,). torch.full would make compiled regions compile anew for each value."""
    return torch.ones(1, dtype=dtype, device=device) * value


def assert_constant(constant: Tensor, positive: bool = False) -> None:
    """Refuse an L (1,) that is no finite number >= 0, or > 0, while a compiled region runs."""
    fits = (constant > 0) if positive else (constant >= 0)
    wanted = "> 0 for a trained constant" if positive else ">= 0"
    torch._assert_async(fits & constant.isfinite(), f"inverse_lipschitz: wanted a finite number {wanted}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity; this reads back to the host.

    Raises:
        ValueError: with the number of such values.
    """
    if bad := int((~tensor.isfinite()).sum()):
        raise ValueError(f"{name}: got {bad} non-finite of {tensor.numel()} values, wanted finite ones")


def _check_values(operands: Operands) -> None:
    """Refuse NaN, infinity, negative weights and a negative L; this reads back to the host."""
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
        check_tensor(name, tensor)
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
    """Check what the operators cannot see, and bring the rest into their form (:mod:`ilvae_fast.functional`).

    Raises:
        ValueError, TypeError: naming the argument.
    """
    check_tensor("x", x)
    check_tensor("skip_weight", skip_weight)
    if not skip_weight.shape:
        raise ValueError("skip_weight: got a tensor without dimensions, wanted (S+1, d)")
    code = 0 if route == "auto" else route_code(route)
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
        _check_values(operands)
    return operands
