"""The inverse of a Brenier map: the minimiser of a strongly convex function.

``T(x) = y`` where ``phi(x) - <x, y>`` is least, which :mod:`~ilvae_fast.layers.minimiser` finds. It ends in float64
whatever the dtype of ``y``. ``|T(x) - y| <= tolerance (1 + |y|)`` bounds the error by ``|x - T^{-1}(y)| <= tolerance
(1 + |y|) / L``, as L-inverse Lipschitz means (Kinoshita et al., ICML 2023).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._support.devices import with_float64
from ..operators import dispatch, plain
from ..operators.activations import EncodedActivations
from ..operators.operands import Operands, check_finite
from .inputs import check_like
from .minimiser import minimiser, solve

RESIDUAL = 1e-10  # of |T(x) - y|, over 1 + |y|, in float64


def inverse(operands: Operands, initial: Tensor | None = None, tolerance: float | None = None) -> Tensor:
    """x (..., d) with ``T(x) = y``, differentiable any number of times with respect to y and all operands.

    Args:
        operands: of the map, with y (..., d) in the place of x.
        initial: x to start from, of y's shape, dtype and device, which is not differentiated; y if None.
        tolerance: of ``|T(x) - y|``, over ``1 + |y|``. None: :data:`RESIDUAL` in float64, else float32's epsilon.

    Raises:
        ValueError, TypeError: y is not finite, or an activation has a kink, so that the map jumps and leaves values
            out, or a bad argument.
        RuntimeError: not found to the tolerance, as where L = 0 and the map leaves values out.
    """
    check_smooth(operands.activations)
    y = operands.x
    check_finite("y", y)
    if tolerance is None:
        tolerance = RESIDUAL if y.dtype == torch.float64 else torch.finfo(torch.float32).eps
    elif isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance: got {tolerance!r}, wanted a number > 0")
    if initial is not None:
        check_like("initial", initial, "y", y)
        check_finite("initial", initial)
        initial = with_float64(initial.detach()).double()
    with torch.autocast(with_float64(y).device.type, enabled=False):
        x = _Inverse.apply(operands.activations, tolerance, initial, *(_exact(t) for t in _tensors(operands)))
    return x.to(y, copy=True)  # the backward pass keeps x as it is now, and the caller may change the result


def check_smooth(activations: EncodedActivations) -> None:
    """Refuse activations of a map with a kink, where the map, a gradient, jumps."""
    layers, last = activations.layers, len(activations.layers) - 1
    for i, activation in enumerate(layers):
        if not activation.smooth:
            other_first = i == 0 and last > 1 and activation != layers[1]
            argument = "output_activation" if i == last else "first_activation" if other_first else "activation"
            raise ValueError(
                f"{argument}: got {activation.name!r}, wanted one without a kink, such as 'softplus', 'celu' or "
                "'smooth_leaky_relu': with it the map jumps and has no inverse"
            )


class _Inverse(torch.autograd.Function):
    """x with ``T(x) = y``, and ``dx = (dT/dx)^{-1} (dy - d_theta T)``: the implicit function theorem.

    The backward pass is made of differentiable functions of x, which is the result of this one, and of the operands.
    """

    @staticmethod
    def forward(
        ctx: Any,
        activations: EncodedActivations,
        tolerance: float,
        initial: Tensor | None,
        y: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        x = minimiser(_operands(activations, y, *parameters), tolerance, initial)
        ctx.activations = activations
        ctx.save_for_backward(x, *parameters)
        return x

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        needs_y, *needed = ctx.needs_input_grad[3:]
        with torch.autocast(cotangent.device.type, enabled=False):
            step = _Step.apply(ctx.activations, cotangent, *ctx.saved_tensors)
            if not any(needed):
                return None, None, None, step, *(None for _ in needed)
            operands = _operands(ctx.activations, *ctx.saved_tensors)
            skip_weight, bias, constant, *weights = needed
            bits = enumerate([False, skip_weight, bias, constant, False, *weights])
            terms = dispatch.training_terms(operands, -step, None, sum(1 << i for i, wanted in bits if wanted))
        _, skip_weight, bias, constant, _, *weights = terms
        return None, None, None, step if needs_y else None, skip_weight, bias, constant, *weights


class _Step(torch.autograd.Function):
    """z with ``dT/dx z = target``, and ``dz = (dT/dx)^{-1} (d target - d(dT/dx) z)``."""

    @staticmethod
    def forward(ctx: Any, activations: EncodedActivations, target: Tensor, *at: Tensor) -> Tensor:
        z = solve(_operands(activations, *at), target)
        ctx.activations = activations
        ctx.save_for_backward(z, *at)
        return z

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        _, needs_target, *needed = ctx.needs_input_grad
        z, *at = ctx.saved_tensors
        with torch.autocast(cotangent.device.type, enabled=False):
            step = _Step.apply(ctx.activations, cotangent, *at)
            # <-step, dT/dx z> has the gradients in x and the parameters
            tensors = (z, *_operands(ctx.activations, *at).in_order())
            x, skip_weight, bias, constant, *weights = needed
            moving = (False, x, skip_weight, bias, constant, False, *weights)
            static = plain.Static(ctx.activations, ())
            gradients = plain.gradients(plain.map_jvp, static, tensors, moving, (torch.zeros_like(step), -step))
        _, x, skip_weight, bias, constant, _, *weights = gradients
        return None, step if needs_target else None, x, skip_weight, bias, constant, *weights


def _tensors(operands: Operands) -> tuple[Tensor, ...]:
    x, skip_weight, bias, weights, constant, *_ = operands
    return x, skip_weight, bias, constant, *weights


def _operands(
    activations: EncodedActivations, x: Tensor, skip_weight: Tensor, bias: Tensor, constant: Tensor, *weights: Tensor
) -> Operands:
    return Operands(x, skip_weight, bias, weights, constant, None, activations, route=0, recompute=None)


def _exact(t: Tensor) -> Tensor:
    return with_float64(t).to(torch.float64, copy=True)  # the backward pass wants it as it is now
