r"""Initial weights that give potential and map a sensible scale, for every activation and parametrisation.

Hoedt & Klambauer (NeurIPS 2023) choose means of the non-negative weights, and biases that undo them, so that
*pre-activations* of an input-convex network keep their scale. What a Brenier map hands on is the *gradient*, and
non-negative weights move all units of a layer together: where a bias cancels the mean of h_{k-1} for inputs of one
scale, inputs of a smaller one find the layer switched off, and the layers above it all the more. Hence:

1. Draw skip rows A_k ~ N(0, 1/d), and hidden weights W_k log-normal of mean c_k / n_{k-1} and a standard deviation
   equal to the mean, with ``c_k = 1 / E|s'_{k-1}|``: the adjoints then keep their sum, ``sum_i |D_{k-1,i}|`` of a layer
   is ``sum_i |D_{k,i}|`` of the next, and all layers contribute alike to ``T = sum_k D_k A_k``. The absolute value is
   for a first activation that is (nearly) even, whose slopes cancel.
2. Choose biases by which every pre-activation is 0 at x = 0: ``b_k = -W_k s_{k-1}(0)``. For positively homogeneous
   activations they vanish, and ``T(r x) = T(x)`` exactly. For smooth ones T is linear near 0. In neither case does
   a unit die when the inputs shrink; when they grow, units are switched on.
3. Choose the output's skip row so that T has mean 0 over x: it adds ``s_out'(o) A_out`` to T, a constant vector for the
   identity. Without it that mean, ``sum_k E[D_k] A_k``, is most of T where d is large.
4. Scale w such that T has variance 1 per coordinate, over x at these weights.

*Sparse.* The second map of a decoder sees x = B z on a subspace of m << d dimensions, where skip terms have the
standard deviation sqrt(m / d) instead of 1 and any network is nearly linear. Lowering the biases of the layers above
the first by _OFFSET afterwards switches their units off there, but for those that training finds a use for: each
becomes a gate for the layer below. T is then centred at x = 0. It fits images far better (``benchmarks/defaults.py``).

The expectations are means over x ~ N(0, I_d), always the same rows, each with its negative (as LSUV; Mishkin & Matas,
ICLR 2016, but for the gradient). Nothing is read back to the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..operators.activations import Activation

_ROWS = 256
_SEED = 0x1CF4_57A7  # nobody's: from the seed of the weights would come the numbers that are in the weights
_OFFSET = 0.5  # of pre-activations whose skip terms have the standard deviation 1 for x ~ N(0, I)
_PASSES = 4  # of step 4: one is exact where s_out is homogeneous, else D_out depends on the scale


def _slope(activation: Activation, a: Tensor) -> Tensor:
    """``s'(a)``."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = a.clone().requires_grad_()
        (slope,) = torch.autograd.grad(activation(leaf).sum(), leaf)
    return slope


def fixed_normal(rows: int, columns: int) -> Tensor:
    """Of N(0, 1), the same in every call, each row with its negative."""
    half = torch.randn(rows // 2, columns, generator=torch.Generator().manual_seed(_SEED))
    return torch.cat([half, -half])


def _sample(width: int, device: torch.device) -> Tensor:
    """Rows of N(0, I), the same in every call, each with its negative."""
    return fixed_normal(_ROWS, width).to(device)


def _log_normal_(weight: Tensor, mean: Tensor) -> Tensor:
    """Fill with a log-normal distribution whose standard deviation is its mean."""
    variance_of_log = math.log(2.0)
    return weight.log_normal_(-variance_of_log / 2, math.sqrt(variance_of_log)).mul_(mean)


def _map_of_unit_output(
    a: Sequence[Tensor], rows: Sequence[Tensor], weights: Sequence[Tensor], activations: Sequence[Activation]
) -> Tensor:
    """``sum_k D_k A_k`` (N, d) over the hidden layers, where D_out = 1."""
    g, total = weights[-1], torch.zeros_like(rows[0][:1])
    for k in reversed(range(len(weights))):
        d = g * _slope(activations[k], a[k])
        total = total + d @ rows[k]
        g = d @ weights[k - 1] if k else g
    return total


@torch.no_grad()
def initialize_(
    skip_weight: Tensor,
    bias: Tensor,
    weights: Sequence[Tensor],
    activations: Sequence[Activation],
    *,
    sparse: bool = False,
) -> None:
    """Fill skip_weight (S+1, d), bias (S+1,) and the effective weights [W_2, .., w] in place (module docstring).

    Args:
        sparse: start with the hidden layers above the first nearly switched off.
    """
    width = skip_weight.shape[1]
    skip_weight.normal_(0, 1 / math.sqrt(width))
    skip_weight[-1].zero_()
    bias.zero_()
    *hidden, output = activations
    units = [w.shape[1] for w in weights]
    rows, biases = skip_weight.float().split([*units, 1]), bias.split([*units, 1])

    x = _sample(width, skip_weight.device)
    terms = [x @ row.T for row in rows]
    a = terms[:1]
    for k, (activation, weight) in enumerate(zip(hidden, weights, strict=True)):
        _log_normal_(weight, 1 / (units[k] * _slope(activation, a[k]).abs().mean().clamp(min=1e-6)))
        biases[k + 1].copy_(-(weight @ activation(torch.zeros_like(a[k][0]))))
        a.append(terms[k + 1] + biases[k + 1].float() + activation(a[k]) @ weight.T)

    network, scale = _map_of_unit_output(a, rows, weights, hidden), x.new_ones(())
    for _ in range(_PASSES):
        d_out = _slope(output, scale * a[-1])
        mean = (d_out * network).mean(0) / d_out.mean().clamp(min=1e-6)
        size, spread = ((d_out * t).square().mean().sqrt() for t in (network, network - mean))
        # a network of affine functions alone has no spread, at any scale
        scale = 1 / torch.where(spread > 1e-3 * size, spread, size).clamp(min=1e-12)
    weights[-1].mul_(scale)
    biases[-1].mul_(scale)
    skip_weight[-1].copy_(-scale * mean)
    if sparse:
        for hidden_bias in biases[1:-1]:
            hidden_bias.sub_(_OFFSET)
        at_zero = [b.float().unsqueeze(0) for b in biases]
        for k, (activation, weight) in enumerate(zip(hidden, weights, strict=True)):
            at_zero[k + 1] = at_zero[k + 1] + activation(at_zero[k]) @ weight.T
        skip_weight[-1].copy_(-_map_of_unit_output(at_zero, rows, weights, hidden).squeeze(0))
