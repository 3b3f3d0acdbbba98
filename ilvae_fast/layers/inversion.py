"""The inverse of a Brenier map: the minimiser of a strongly convex function.

``T(x) = y`` where ``phi(x) - <x, y>`` is least, and that function has the Hessian ``dT/dx >= L``. Newton's method finds
x. It solves for its steps by conjugate gradients on ``dT/dx v`` (:func:`ilvae_fast.functional.brenier_map_jvp`), so no
Jacobian is formed. It computes in float64 whatever the dtype of ``y``. ``|T(x) - y| <= RESIDUAL (1 + |y|)`` bounds the
error by ``|x - T^{-1}(y)| <= RESIDUAL (1 + |y|) / L``, as L-inverse Lipschitz means (Kinoshita et al., ICML 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..operators import dispatch, plain
from ..operators.activations import EncodedActivations
from ..operators.operands import Operands, check_finite

RESIDUAL = 1e-10  # of |T(x) - y|, over 1 + |y|
_NEWTON_STEPS = 100
_HALVINGS = 40
_DECREASE = 1e-4  # of what the slope promises, for a step to be taken (Armijo)


def inverse(operands: Operands) -> Tensor:
    """x (..., d) with ``T(x) = y``, differentiable any number of times with respect to y and all operands.

    Args:
        operands: of the map, with y (..., d) in the place of x.

    Raises:
        ValueError: y is not finite, or an activation has a kink, so that the map jumps and leaves values out.
        RuntimeError: not found to :data:`RESIDUAL`, as where L = 0 and the map leaves values out.
    """
    check_smooth(operands.activations)
    y = operands.x
    check_finite("y", y)
    with torch.autocast(y.device.type, enabled=False):
        x = _Inverse.apply(operands.activations, *(_exact(t) for t in _tensors(operands)))
    return x.to(y.dtype, copy=True)  # the backward pass keeps x as it is now, and the caller may change the result


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
    def forward(ctx: Any, activations: EncodedActivations, y: Tensor, *parameters: Tensor) -> Tensor:
        x = _minimiser(_operands(activations, y, *parameters))
        x = x.clone() if x is y else x
        ctx.activations = activations
        ctx.save_for_backward(x, *parameters)
        return x

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        _, needs_y, *needed = ctx.needs_input_grad
        with torch.autocast(cotangent.device.type, enabled=False):
            step = _Step.apply(ctx.activations, cotangent, *ctx.saved_tensors)
            if not any(needed):
                return None, step, *(None for _ in needed)
            operands = _operands(ctx.activations, *ctx.saved_tensors)
            skip_weight, bias, constant, *weights = needed
            bits = enumerate([False, skip_weight, bias, constant, False, *weights])
            terms = dispatch.training_terms(operands, -step, None, sum(1 << i for i, wanted in bits if wanted))
        _, skip_weight, bias, constant, _, *weights = terms
        return None, step if needs_y else None, skip_weight, bias, constant, *weights


class _Step(torch.autograd.Function):
    """z with ``dT/dx z = target``, and ``dz = (dT/dx)^{-1} (d target - d(dT/dx) z)``."""

    @staticmethod
    def forward(ctx: Any, activations: EncodedActivations, target: Tensor, *at: Tensor) -> Tensor:
        z = _solve(_hessian(_operands(activations, *at)), target, 1e-12)
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
    return t.to(torch.float64, copy=True)  # the backward pass wants it as it is now


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _norm(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a, dim=-1, keepdim=True)


def _hessian(operands: Operands) -> Callable[[Tensor], Tensor]:
    return lambda v: dispatch.map_jvp(operands, v)[1]


def _minimiser(exact: Operands) -> Tensor:
    """The minimiser of ``phi(x) - <x, y>`` where ``exact`` has y for x."""
    y = x = exact.x
    wanted = RESIDUAL * (1 + _norm(y))

    def look(x: Tensor) -> tuple[Tensor, Tensor]:
        phi, t = dispatch.potential_and_map(exact._replace(x=x), True, True)
        return phi.unsqueeze(-1) - _dot(x, y), t - y

    value, slope = look(x)
    for _ in range(_NEWTON_STEPS):
        error = _norm(slope)
        if (error <= wanted).all():
            return x
        # where the error is large a rough direction will do; the better it gets, the more exactly is it worth solving
        direction = -_solve(_hessian(exact._replace(x=x)), slope, (error / (1 + _norm(y))).clamp(1e-12, 0.1))
        promised = _dot(slope, direction)
        length = torch.ones_like(value)
        rounding = 1e-13 * (1 + value.abs())
        for _ in range(_HALVINGS):
            candidate = x + length * direction
            new_value, new_slope = look(candidate)
            too_long = ~(new_value <= value + _DECREASE * length * promised + rounding)
            if not too_long.any():
                break
            length = torch.where(too_long, length / 2, length)
        x, value, slope = candidate, new_value, new_slope
    missed = ~(_norm(slope) <= wanted)
    if not missed.any():
        return x
    raise RuntimeError(
        f"y: found no x with T(x) = y for {int(missed.sum())} of {missed.numel()} rows; after {_NEWTON_STEPS} steps "
        f"|T(x) - y| is up to {float(_norm(slope).max()):.3g}, wanted {float(wanted.max()):.3g}. There is one for "
        f"every finite y if inverse_lipschitz > 0, which is {float(exact.inverse_lipschitz):g}"
    )


def _solve(product: Callable[[Tensor], Tensor], target: Tensor, accuracy: Tensor | float) -> Tensor:
    """z with ``product(z) = target`` to a relative ``accuracy``, row by row, by conjugate gradients."""
    z, residual = torch.zeros_like(target), target
    direction, squared = residual, _dot(residual, residual)
    wanted = squared * accuracy**2
    for _ in range(10 * target.shape[-1] + 10):
        open_rows = squared > wanted
        if not open_rows.any():
            break
        image = product(direction)
        curvature = _dot(direction, image)
        length = torch.where(open_rows & (curvature > 0), squared / curvature, 0.0)
        z = z + length * direction
        residual = residual - length * image
        before, squared = squared, _dot(residual, residual)
        direction = residual + torch.where(before > 0, squared / before, 0.0) * direction
    return z
