"""The functions of :mod:`ilvae_fast.functional` by plain autograd: the yardstick of every test.

One formula, the potential, written as anybody would write an input-convex network (Amos et al., ICML 2017); the map is
its gradient and the training terms are the gradients of the map, all left to automatic differentiation. Inside
``torch.func`` transforms, dual levels and compiled regions, where ``torch.autograd.grad`` is refused, the gradient is
taken by ``torch.func.grad``. Everything here differentiates any number of times.

Arguments are those of :mod:`ilvae_fast.functional` (which checks them); see there for shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from .activations import Activation, encode


def embed(x: Tensor, embedding: Tensor | int | None) -> Tensor:
    """``B x``: the input of the potential, of width d."""
    if embedding is None:
        return x
    if isinstance(embedding, Tensor):
        return x @ embedding.mT
    return F.pad(x, (0, embedding - x.shape[-1]))


def convex_network(
    y: Tensor, skip_weight: Tensor, bias: Tensor, weights: Sequence[Tensor], activations: Sequence[str | Activation]
) -> Tensor:
    """``G(y)``: the input-convex network alone, ``y (..., d) -> (...)``."""
    layers = encode(activations).layers
    skip = F.linear(y, skip_weight, bias)  # one product for the skip terms of all layers
    widths = [w.shape[1] for w in weights]  # n_1 .. n_K
    *hidden, out = skip.split([*widths, 1], dim=-1)
    h = layers[0](hidden[0])
    for activation, weight, a in zip(layers[1:-1], weights[:-1], hidden[1:], strict=True):
        h = activation(a + F.linear(h, weight))
    return layers[-1](out + F.linear(h, weights[-1])).squeeze(-1)


def _potential_of(
    y: Tensor,
    skip_weight: Tensor,
    bias: Tensor,
    weights: Sequence[Tensor],
    activations: Sequence[str | Activation],
    inverse_lipschitz: float | Tensor,
) -> Tensor:
    """``phi(y) = G(y) + L/2 |y|^2``."""
    constant = inverse_lipschitz
    if isinstance(constant, Tensor):
        constant = constant.to(y.dtype).squeeze(-1) if constant.dim() == 1 else constant.to(y.dtype)
    network = convex_network(y, skip_weight, bias, weights, activations)
    return network + constant / 2 * y.square().sum(-1)


def potential(
    x: Tensor,
    skip_weight: Tensor,
    bias: Tensor,
    weights: Sequence[Tensor],
    *,
    activations: Sequence[str | Activation],
    inverse_lipschitz: float | Tensor = 1.0,
    embedding: Tensor | int | None = None,
) -> Tensor:
    """``phi(B x)``, shape (...)."""
    y = embed(x, embedding)
    return _potential_of(y, skip_weight, bias, weights, activations, inverse_lipschitz)


def _without_graph(t: Tensor) -> Tensor:
    return t.clone() if t.is_inference() else t.detach()


def potential_and_map(
    x: Tensor,
    skip_weight: Tensor,
    bias: Tensor,
    weights: Sequence[Tensor],
    *,
    activations: Sequence[str | Activation],
    inverse_lipschitz: float | Tensor = 1.0,
    embedding: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """``phi(B x)``, shape (...), and ``T(B x) = grad phi``, shape (..., d)."""
    if (
        torch._C._are_functorch_transforms_active()
        or torch.compiler.is_dynamo_compiling()
        or forward_ad._current_level >= 0
    ):
        y = embed(x, embedding)

        def total(y: Tensor) -> tuple[Tensor, Tensor]:
            phi = _potential_of(y, skip_weight, bias, weights, activations, inverse_lipschitz)
            return phi.sum(), phi

        gradient, phi = torch.func.grad(total, has_aux=True)(y)
        return phi, gradient
    keep_graph = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        if not keep_graph:
            x, skip_weight, bias, *weights = (_without_graph(t) for t in (x, skip_weight, bias, *weights))
            embedding = _without_graph(embedding) if isinstance(embedding, Tensor) else embedding
            if isinstance(inverse_lipschitz, Tensor):
                inverse_lipschitz = _without_graph(inverse_lipschitz)
        y = embed(x, embedding)
        # a tensor of its own: parameters that depend on x, or are x, stay what they are
        y = y.view_as(y) if y.requires_grad else y.detach().requires_grad_()
        phi = _potential_of(y, skip_weight, bias, weights, activations, inverse_lipschitz)
        (gradient,) = torch.autograd.grad(phi.sum(), y, create_graph=keep_graph)
    return (phi, gradient) if keep_graph else (phi.detach(), gradient)


def brenier_map(
    x: Tensor,
    skip_weight: Tensor,
    bias: Tensor,
    weights: Sequence[Tensor],
    *,
    activations: Sequence[str | Activation],
    inverse_lipschitz: float | Tensor = 1.0,
    embedding: Tensor | int | None = None,
) -> Tensor:
    """``T(B x)``, shape (..., d)."""
    return potential_and_map(
        x,
        skip_weight,
        bias,
        weights,
        activations=activations,
        inverse_lipschitz=inverse_lipschitz,
        embedding=embedding,
    )[1]
