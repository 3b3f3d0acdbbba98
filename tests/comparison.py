"""The tolerance rule of the tests, and assertions built on it. They are themselves tested (test_comparison.py).

Rule: the error against float64 is at most twice the error of eager autograd in the same dtype, plus a floor: 8 eps
times the largest reference value, or, for sums over the batch (gradients of parameters), 8 eps times the sum of the
absolute terms; eps is that of the operands of products.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 8.0


def floor(eps: float, reference: Tensor, absolute_terms: Tensor | None = None) -> Tensor:
    """The error that any computation with this eps is granted, elementwise or as a scalar."""
    scale = reference.abs().amax() if absolute_terms is None else absolute_terms.abs().amax()
    return FLOOR * eps * scale


def assert_as_accurate_as_eager(
    name: str,
    ours: Tensor,
    eager: Tensor,
    reference: Tensor,
    absolute_terms: Tensor | None = None,
    eps: float | None = None,
) -> None:
    """``ours`` and ``eager`` in one dtype, ``reference`` the same quantity in float64.

    ``eager`` may have a leading dimension: several computations, of which the worst counts. ``eps``: of the operands of
    products where that is not the dtype's, as with tf32.
    """
    assert ours.dtype == eager.dtype, f"{name}: {ours.dtype} but eager {eager.dtype}"
    assert ours.shape == reference.shape, f"{name}: {tuple(ours.shape)} but reference {tuple(reference.shape)}"
    if reference.numel() == 0:
        return
    error = (ours.double() - reference).abs().max()
    granted = floor(torch.finfo(ours.dtype).eps if eps is None else eps, reference, absolute_terms)
    allowed = 2 * (eager.double() - reference).abs().max() + granted
    assert error <= allowed, f"{name} ({ours.dtype}): error {error:.3g}, allowed {allowed:.3g}"


def assert_equal_to_rounding(name: str, ours: Tensor, reference: Tensor, absolute_terms: Tensor | None = None) -> None:
    """Two float64 computations of one quantity, from inputs of order one: agreement to 1e-12 of its scale plus 2e-14.

    The first is thousands of eps: in both computations a saturated activation multiplies the rounding error of its
    argument by beta |a|. The second is 100 eps of the inputs: where curvature vanishes, rounding errors do not.
    """
    assert ours.dtype == reference.dtype == torch.float64, f"{name}: {ours.dtype}, {reference.dtype}"
    assert ours.shape == reference.shape, f"{name}: {tuple(ours.shape)} but reference {tuple(reference.shape)}"
    if reference.numel() == 0:
        return
    error = (ours - reference).abs().max()
    allowed = 1e-12 * (reference if absolute_terms is None else absolute_terms).abs().max() + 2e-14
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def inverse_lipschitz_violation(x: Tensor, y: Tensor, fx: Tensor, fy: Tensor, constant: float) -> Tensor:
    """``L |x - y| - |f(x) - f(y)|`` of pairs (..., d): positive where the bound fails."""
    return constant * (x - y).norm(dim=-1) - (fx - fy).norm(dim=-1)


def monotonicity_violation(x: Tensor, y: Tensor, tx: Tensor, ty: Tensor, constant: float) -> Tensor:
    """``L |x - y|^2 - <T(x) - T(y), x - y>`` of pairs (..., d): positive where strong monotonicity fails."""
    return constant * (x - y).square().sum(-1) - ((tx - ty) * (x - y)).sum(-1)
