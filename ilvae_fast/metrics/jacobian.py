"""Measures of the decoder's Jacobian: relative Fisher information and inverse-Lipschitz constants."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._support.checks import check_positive
from .._support.devices import with_float64
from .batches import Data, Reduce, batches, ratio


class RelativeFisher(NamedTuple):
    """See :func:`relative_fisher`; all are means over the data.

    divergence; lower_bound, NaN where no constant is certified; projected_residual ``E |Pi s|^2``, the other factor
    of the bound; effective_sample_size of the importance weights, between 1 and the number of samples; local_bound;
    cotangent_bound, NaN for a decoder without one.
    """

    divergence: float
    lower_bound: float
    projected_residual: float
    effective_sample_size: float
    local_bound: float = math.nan
    cotangent_bound: float = math.nan


class InverseLipschitz(NamedTuple):
    """certified: what the construction guarantees, NaN for none. measured: the smallest singular value seen."""

    certified: float
    measured: float


@torch.no_grad()
def relative_fisher(
    model: Any,
    data: Data,
    num_samples: int = 128,
    *,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
    reduce: Reduce = None,
) -> RelativeFisher:
    r"""Relative Fisher information divergence of the true posterior from the prior, and its lower bound.

    ``E_x E_{p(z|x)} | grad_z log p(z|x) - grad_z log p(z) |^2`` (Kinoshita et al., ICML 2023, section 3). The
    difference is ``grad_z log p(x|z) = J_f(z)^T s`` with the likelihood's score ``s = d log p(x|z) / d f``. For a
    decoder that is L-inverse Lipschitz no singular value of J_f is below L, so the divergence is at least

        L^2 E |Pi s|^2,   Pi(z): the projection on the range of J_f(z)

    where s is ``t(x) - grad Lambda(f)`` for an exponential family with natural parameter f, and ``(x - f) / sigma^2``,
    hence the bound ``L^2 / sigma^4 E |Pi (x - f)|^2``, for a Gaussian of fixed variance with mean f.  Without Pi it
    holds only where D = m. The factor ``E |Pi s|^2`` is reported too: it varies with L, so that the bound need not
    grow with L^2. L is the certified constant.

    Two more bounds, both above that one and below the divergence, say where it is loose:

    - ``local_bound``: ``E sigma_min(J_f(z))^2 |Pi s|^2``, for any decoder. The steepness is that where the posterior
      is; the rest of the divergence is due to scores that do not point along the flattest direction.
    - ``cotangent_bound``: ``E L1^2 |B^T J2 s|^2``, J2 the Jacobian of a Brenier decoder's second map, certified by
      the first map's constant alone (:meth:`ilvae_fast.BrenierDecoder.cotangent_bound`).

    The true posterior is sampled by self-normalised importance weights from q(z|x), the same for divergence and bound,
    which therefore are ordered sample by sample, not in expectation alone. A mean effective sample size ``1 / sum w^2``
    (Kong, 1992) near 1 says that the estimates are not to be trusted.

    For an autoregressive decoder f(z) are the logits of all tokens of x, stacked: bounds of single tokens do not add.

    Needs of the model: ``importance_sample(x, num_samples, generator)``, ``likelihood.score(x, f)`` and ``decoder``
    as in :func:`decoder_jacobian`. ``batch_size * num_samples`` Jacobians (D, m) are held at a time.
    """
    num_samples = check_positive("num_samples", num_samples)
    total, count, constant = torch.zeros(5, dtype=torch.float64), 0, math.nan
    for x in batches(data, batch_size):
        samples = model.importance_sample(x, num_samples, generator)
        weights = samples.log_weights.softmax(0)
        decoder = decoder_given(model.decoder, x)
        jacobian = _at_least_float32(decoder_jacobian(decoder, samples.z))
        score = model.likelihood.score(x.flatten(1), samples.f).unsqueeze(-1).to(jacobian.dtype)
        gradient = (jacobian.mT @ score).square().sum((-2, -1))
        orthonormal, triangle = torch.linalg.qr(jacobian)
        residual = (orthonormal.mT @ score).square().sum((-2, -1))
        local = residual * _smallest_singular_value(triangle).square()
        cotangent = torch.full_like(residual, math.nan)
        if hasattr(decoder, "cotangent_bound"):
            cotangent = decoder.cotangent_bound(samples.z, score.squeeze(-1).to(samples.z.dtype)).square()
        means = [(weights * value).sum(0) for value in (gradient, residual, local, cotangent)]
        sums = [*means, 1 / weights.square().sum(0)]
        total = total + with_float64(torch.stack(sums)).double().sum(-1).cpu()
        constant = certified_constant(decoder)
        count += len(x)
    divergence, projected, local_bound, cotangent_bound, effective = ratio(total, count, reduce).tolist()
    return RelativeFisher(divergence, constant**2 * projected, projected, effective, local_bound, cotangent_bound)


@torch.no_grad()
def inverse_lipschitz(decoder: Any, z: Tensor, *, batch_size: int = 1024) -> InverseLipschitz:
    """The smallest singular value of the decoder's Jacobian over latents z (N, m), beside the certified constant.

    For a differentiable decoder the best inverse-Lipschitz constant is at most the infimum of that
    singular value, so what is measured on samples lies above the true constant, and above any certified one.

    Args:
        decoder: as in :func:`decoder_jacobian`; of an autoregressive one, ``decoder.given(x)`` for one sequence x (T,).
        z: latents where to look, such as samples of the prior or of posteriors.
    """
    measured = math.inf
    for part in batches(z, batch_size):
        jacobian = _at_least_float32(decoder_jacobian(decoder, part))
        if jacobian.shape[-2] < jacobian.shape[-1]:
            measured = 0.0  # m > D: some direction is lost
            break
        measured = min(measured, torch.linalg.svdvals(jacobian).min().item())
    return InverseLipschitz(certified_constant(decoder), measured)


def certified_constant(decoder: Any) -> float:
    """The inverse-Lipschitz constant that ``decoder.inverse_lipschitz_bound()`` guarantees; NaN without that method."""
    bound = getattr(decoder, "inverse_lipschitz_bound", None)
    return math.nan if bound is None else float(bound())


def decoder_given(decoder: Any, x: Tensor) -> Any:
    """The decoder as a function of z alone: ``decoder.given(x)`` if it reads x (..., T) too, else itself."""
    return decoder.given(x) if hasattr(decoder, "given") else decoder


def decoder_jacobian(decoder: Any, z: Tensor) -> Tensor:
    """``d decoder / dz`` at z (..., m): (..., D, m), by the decoder's own ``jacobian(z)`` if it has one.

    Any other decoder is differentiated in forward mode, each latent by itself (:func:`torch.func.jacfwd`).
    """
    if hasattr(decoder, "jacobian"):
        return decoder.jacobian(z)
    flat = torch.func.vmap(torch.func.jacfwd(lambda one: decoder(one).flatten()))(z.reshape(-1, z.shape[-1]))
    return flat.reshape(*z.shape[:-1], *flat.shape[-2:])


def _smallest_singular_value(matrix: Tensor) -> Tensor:
    """Of matrices (..., k, m): (...), 0 where m > k, for some direction is lost; NaN where one is not finite."""
    if matrix.shape[-2] < matrix.shape[-1]:
        return matrix.new_zeros(matrix.shape[:-2])
    finite = matrix.isfinite().all(-1).all(-1)
    values = torch.linalg.svdvals(matrix.where(finite[..., None, None], 0.0)).amin(-1)
    return values.where(finite, math.nan)


def _at_least_float32(t: Tensor) -> Tensor:
    """For the factorisations, which LAPACK has in no fewer bits."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
