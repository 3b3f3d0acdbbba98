"""Measures of fit and of posterior collapse, over data that streams by in batches; no measure keeps a graph.

Arguments common to all functions:

    model: a :class:`ilvae_fast.vae.VAE`, or any object with those of its parts that the function names
    data: (N, D), or an iterable of batches (n, D), where a tuple or list stands for its first entry; on the model's
        device and in its dtype
    batch_size: how many data of a tensor go at once
    generator: of the samples; by default torch's own

Units are nats. Errors name the argument: ValueError for data without a datum, TypeError.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .layers import check_positive

Data: TypeAlias = "Tensor | Iterable[Tensor | Sequence[Tensor]]"


class KLDivergence(NamedTuple):
    """total: a float. per_dimension (m,) float64, whose sum it is."""

    total: float
    per_dimension: Tensor


class ActiveUnits(NamedTuple):
    """active: how many of the m units are. variances (m,) float64: ``Var_x E_q(z|x)[z]``."""

    active: int
    variances: Tensor


class RelativeFisher(NamedTuple):
    """See :func:`relative_fisher`; all are means over the data.

    divergence; lower_bound, NaN where no constant is certified; projected_residual ``E |Pi s|^2``, the other factor
    of the bound; effective_sample_size of the importance weights, between 1 and the number of samples.
    """

    divergence: float
    lower_bound: float
    projected_residual: float
    effective_sample_size: float


class InverseLipschitz(NamedTuple):
    """certified: what the construction guarantees, NaN for none. measured: the smallest singular value seen."""

    certified: float
    measured: float


def _batches(data: Data, batch_size: int) -> Iterator[Tensor]:
    check_positive("batch_size", batch_size)
    batches = data.split(batch_size) if isinstance(data, Tensor) else data
    empty = True
    for batch in batches:
        x = batch if isinstance(batch, Tensor) else batch[0]
        if len(x):
            empty = False
            yield x
    if empty:
        raise ValueError("data: got no datum, wanted at least one")


@torch.no_grad()
def negative_log_likelihood(
    model: Any,
    data: Data,
    num_importance_samples: int = 1000,
    *,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> float:
    """``-1/N sum_x log 1/S sum_s p(x, z_s) / q(z_s|x)``, z_s ~ q(z|x): an upper bound of ``-log p(x)`` in expectation.

    The logarithm of the mean weight is taken for each datum, then the mean over the data (Burda et al., ICLR 2016,
    equation 8); the other order would not be a bound.

    Needs of the model: ``log_likelihood(x, num_importance_samples, generator)``.
    """
    total, count = 0.0, 0
    for x in _batches(data, batch_size):
        total -= model.log_likelihood(x, num_importance_samples, generator).double().sum().item()
        count += len(x)
    return total / count


@torch.no_grad()
def kl_divergence(model: Any, data: Data, *, batch_size: int = 1024) -> KLDivergence:
    """``E_x KL(q(z|x) || p(z))``, and what each latent coordinate contributes to it, in closed form.

    Needs of the model: ``inference(x)`` and ``prior.kl(posterior)`` (n, m).
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for x in _batches(data, batch_size):
        total = total + model.prior.kl(model.inference(x)).double().sum(0).cpu()
        count += len(x)
    return KLDivergence(float(total.sum()) / count, total / count)


@torch.no_grad()
def active_units(model: Any, data: Data, threshold: float = 0.01, *, batch_size: int = 1024) -> ActiveUnits:
    """Latent coordinates with ``Var_x E_q(z|x)[z] >= threshold``, the (biased) variance over the data.

    Source: Burda et al., ICLR 2016, section 5.2.

    Needs of the model: ``inference(x)`` with a ``mean`` (n, m).
    """
    count, mean, square = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for x in _batches(data, batch_size):
        # batches are merged as by Chan, Golub & LeVeque (1983), without cancellation
        latent = model.inference(x).mean.double().cpu()
        n, here = len(latent), latent.mean(0)
        square = square + (latent - here).square().sum(0) + (here - mean).square() * (count * n / (count + n))
        mean = mean + (here - mean) * (n / (count + n))
        count += n
    variances = square / count
    return ActiveUnits(int((variances >= threshold).sum()), variances)


@torch.no_grad()
def relative_fisher(
    model: Any,
    data: Data,
    num_samples: int = 128,
    *,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
) -> RelativeFisher:
    r"""Relative Fisher information divergence of the true posterior from the prior, and its lower bound.

    ``E_x E_{p(z|x)} | grad_z log p(z|x) - grad_z log p(z) |^2`` (Kinoshita et al., ICML 2023, section 3). The
    difference is ``grad_z log p(x|z) = J_f(z)^T s`` with the likelihood's score ``s = d log p(x|z) / d f``. For a
    decoder that is L-inverse Lipschitz no singular value of J_f is below L, so the divergence is at least

        ``L^2 E |Pi s|^2``,   Pi(z): the projection on the range of J_f(z)

    where s is ``t(x) - grad Lambda(f)`` for an exponential family with natural parameter f, and ``(x - f) / sigma^2``,
    hence the bound ``L^2 / sigma^4 E |Pi (x - f)|^2``, for a Gaussian of fixed variance with mean f.  Without Pi it
    holds only where D = m. The factor ``E |Pi s|^2`` is reported too: it varies with L, so that the bound need not
    grow with L^2. L is the certified constant.

    The true posterior is sampled by self-normalised importance weights from q(z|x), the same for divergence and bound,
    which therefore are ordered sample by sample, not in expectation alone. A mean effective sample size ``1 / sum w^2``
    (Kong, 1992) near 1 says that the estimates are not to be trusted.

    Needs of the model: ``importance_sample(x, num_samples, generator)``, ``likelihood.score(x, f)`` and ``decoder``
    as in :func:`decoder_jacobian`. ``batch_size * num_samples`` Jacobians (D, m) are held at a time.
    """
    check_positive("num_samples", num_samples)
    divergence = projected = effective = 0.0
    count = 0
    for x in _batches(data, batch_size):
        samples = model.importance_sample(x, num_samples, generator)
        weights = samples.log_weights.softmax(0)
        jacobian = decoder_jacobian(model.decoder, samples.z)
        score = model.likelihood.score(x, samples.f).unsqueeze(-1)
        gradient = (jacobian.mT @ score).square().sum((-2, -1))
        residual = (torch.linalg.qr(jacobian).Q.mT @ score).square().sum((-2, -1))
        divergence += (weights * gradient).double().sum().item()
        projected += (weights * residual).double().sum().item()
        effective += (1 / weights.square().sum(0)).double().sum().item()
        count += len(x)
    bound = certified_constant(model.decoder) ** 2 * projected / count
    return RelativeFisher(divergence / count, bound, projected / count, effective / count)


@torch.no_grad()
def inverse_lipschitz(decoder: Any, z: Tensor, *, batch_size: int = 1024) -> InverseLipschitz:
    """The smallest singular value of the decoder's Jacobian over latents z (N, m), beside the certified constant.

    For a differentiable decoder the best inverse-Lipschitz constant is at most the infimum of that
    singular value, so what is measured on samples lies above the true constant, and above any certified one.

    Args:
        decoder: as in :func:`decoder_jacobian`.
        z: latents where to look, such as samples of the prior or of posteriors.
    """
    measured = math.inf
    for part in _batches(z, batch_size):
        jacobian = decoder_jacobian(decoder, part)
        if jacobian.shape[-2] < jacobian.shape[-1]:
            measured = 0.0  # m > D: some direction is lost
            break
        measured = min(measured, torch.linalg.svdvals(jacobian).min().item())
    return InverseLipschitz(certified_constant(decoder), measured)


def certified_constant(decoder: Any) -> float:
    """The inverse-Lipschitz constant that ``decoder.inverse_lipschitz_bound()`` guarantees; NaN without that method."""
    bound = getattr(decoder, "inverse_lipschitz_bound", None)
    return math.nan if bound is None else float(bound())


def decoder_jacobian(decoder: Any, z: Tensor) -> Tensor:
    """``d decoder / dz`` at z (..., m): (..., D, m), by the decoder's own ``jacobian(z)`` if it has one.

    Any other decoder is differentiated in forward mode, each latent by itself (:func:`torch.func.jacfwd`).
    """
    if hasattr(decoder, "jacobian"):
        return decoder.jacobian(z)
    flat = torch.func.vmap(torch.func.jacfwd(decoder))(z.reshape(-1, z.shape[-1]))
    return flat.reshape(*z.shape[:-1], *flat.shape[-2:])
