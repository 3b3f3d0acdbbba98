"""Potential and map by formula in plain torch operations, for runtimes that know neither operators nor autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .activations import Activation


def potential_and_map(
    activations: Sequence[Activation],
    y: Tensor,
    skip_weight: Tensor,
    bias: Tensor,
    weights: Sequence[Tensor],
    constant: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return ``phi(y)`` and ``T(y) = sum_k S_k^T (g_k s_k'(a_k)) + L y``: (..., d) -> (...), (..., d).

    ``a_k`` are the pre-activations and ``g_k`` their values' adjoints, of the output ``g = 1``.
    """
    h, slopes = None, []
    skips = F.linear(y, skip_weight, bias).split([*(w.shape[1] for w in weights), 1], dim=-1)
    for k, (activation, skip) in enumerate(zip(activations, skips, strict=True)):
        h, slope, _ = activation.derivatives(skip if h is None else skip + F.linear(h, weights[k - 1]))
        slopes.append(slope)
    assert h is not None
    adjoints = [slopes[-1]]
    for weight, slope in zip(reversed(weights), reversed(slopes[:-1]), strict=True):
        adjoints.insert(0, (adjoints[0] @ weight) * slope)
    potential = h.squeeze(-1) + constant / 2 * y.square().sum(-1)
    return potential, torch.cat(adjoints, -1) @ skip_weight + constant * y
