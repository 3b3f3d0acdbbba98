"""The Hessian of the potential in closed form, in plain torch operations that differentiate any number of times.

With ``a_k`` the pre-activations, ``J_k = da_k/dy``, and ``g_k`` the adjoints ``dG/dh_k``, of the output ``g = 1``,

    ``H = sum_k J_k^T diag(g_k s_k'') J_k + L I``,
    ``J_1 = S_1``, ``J_{k+1} = S_{k+1} + W_{k+1} diag(s_k') J_k``.

All d tangents share one forward pass, and the products are matrix products of N d rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .activations import Activation
from .operands import Operands


def hessian(operands: Operands) -> Tensor:
    """Return ``dT/dy``: (..., d) -> (..., d, d), symmetric. The embedding must be None, and x of width d.

    In 16 bits it is computed in float32 and rounded once. The region's autocast has no effect.
    """
    dtype, device = operands.x.dtype, operands.x.device.type
    precise = torch.promote_types(dtype, torch.float32)
    with torch.autocast(device, enabled=False):
        x, skip_weight, bias, weights, constant, *_ = operands
        x, skip_weight, bias, constant, *weights = (t.to(precise) for t in (x, skip_weight, bias, constant, *weights))
        return _hessian(operands.activations.layers, x, skip_weight, bias, constant, weights).to(dtype)


def _hessian(
    activations: tuple[Activation, ...],
    y: Tensor,
    skip_weight: Tensor,
    bias: Tensor,
    constant: Tensor,
    weights: Sequence[Tensor],
) -> Tensor:
    leading, d = y.shape[:-1], y.shape[-1]
    y = y.reshape(-1, d)
    widths = [*(w.shape[1] for w in weights), 1]
    skips = skip_weight.split(widths)
    a = F.linear(y, skip_weight, bias).split(widths, dim=-1)

    h, slopes, bends = None, [], []
    for k, (activation, skip) in enumerate(zip(activations, a, strict=True)):
        at = skip if h is None else skip + F.linear(h, weights[k - 1])
        h, first, second = activation.derivatives(at)
        slopes.append(first)
        bends.append(second)
    adjoints = [torch.ones_like(y[:, :1])]
    for slope, weight in zip(reversed(slopes[1:]), reversed(weights), strict=True):
        adjoints.insert(0, (adjoints[0] * slope) @ weight)

    total = _first(skips[0], adjoints[0] * bends[0])
    tangents = skips[0].mT.expand(len(y), d, widths[0])  # J_k^T
    for k in range(1, len(activations)):
        if k == len(weights) and activations[k].name == "identity":
            break  # s'' = 0
        tangents = skips[k].mT + (tangents * slopes[k - 1].unsqueeze(-2)) @ weights[k - 1].mT
        total = total + (tangents * (adjoints[k] * bends[k]).unsqueeze(-2)) @ tangents.mT
    total = total + constant * torch.eye(d, dtype=y.dtype, device=y.device)
    return total.reshape(*leading, d, d)


def _first(skip: Tensor, curvature: Tensor) -> Tensor:
    """``S^T diag(c_n) S`` for each row n of the curvature (N, units): (N, d, d)."""
    (rows, units), d = curvature.shape, skip.shape[1]
    if d <= rows:
        products = skip.unsqueeze(-1) * skip.unsqueeze(-2)  # one matrix product for all rows
        return (curvature @ products.reshape(units, d * d)).reshape(rows, d, d)
    return (skip.mT * curvature.unsqueeze(-2)) @ skip
