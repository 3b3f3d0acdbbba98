"""How well a model explains the data: likelihoods, and what its latent contributes to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._support.checks import check_positive
from .batches import Data, Reduce, mean
from .collapse import kl_terms


@torch.no_grad()
def negative_log_likelihood(
    model: Any,
    data: Data,
    num_importance_samples: int = 1000,
    *,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
    reduce: Reduce = None,
) -> float:
    """``-1/N sum_x log 1/S sum_s p(x, z_s) / q(z_s|x)``, z_s ~ q(z|x): an upper bound of ``-log p(x)`` in expectation.

    The logarithm of the mean weight is taken for each datum, then the mean over the data (Burda et al., ICLR 2016,
    equation 8); the other order would not be a bound.

    Needs of the model: ``log_likelihood(x, num_importance_samples, generator)``.
    """
    return -float(mean(lambda x: model.log_likelihood(x, num_importance_samples, generator), data, batch_size, reduce))


@torch.no_grad()
def elbo(
    model: Any,
    data: Data,
    num_samples: int = 1,
    *,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
    reduce: Reduce = None,
) -> float:
    """``E_x [E_q(z|x) log p(x|z) - KL(q(z|x) || p(z))]``, a lower bound of ``E_x log p(x)``.

    ``num_samples`` z for each datum, the KL term in closed form as in :func:`kl_divergence`. The weight of the KL term
    and free bits, which training may have used, are left out.

    Needs of the model: those of :func:`kl_divergence`, ``generative(z, x)`` and ``likelihood.log_prob(x, f)``.
    """
    check_positive("num_samples", num_samples)
    return float(mean(lambda x: _elbo(model, x, num_samples, generator), data, batch_size, reduce))


@torch.no_grad()
def gain(
    model: Any,
    data: Data,
    train: Tensor | None = None,
    num_samples: int = 1,
    *,
    baseline: float | None = None,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
    reduce: Reduce = None,
) -> float:
    """Nats per datum by which the ELBO (:func:`elbo`) beats the best model that ignores its latent
    (:func:`nll_without_latent`).

    Where the gain is not positive the latent costs at least
    what it is worth. KL, mutual information and active units do not show that: a decoder too steep for the data raises
    all three, because the encoder then has to pay for telling latents apart.

    Args:
        train: as of :func:`nll_without_latent`.
        baseline: instead of it the negative log-likelihood on the data of a model that ignores its latent, in nats per
            datum; an autoregressive decoder has a gain of NaN without one.

    Needs of the model: those of :func:`elbo` and of :func:`nll_without_latent`.

    Raises:
        ValueError: neither ``train`` nor ``baseline``.
    """
    if baseline is not None:
        return baseline + elbo(model, data, num_samples, batch_size=batch_size, generator=generator, reduce=reduce)
    if train is None:
        raise ValueError("train: got None, wanted the training data, or a baseline")
    check_positive("num_samples", num_samples)
    without_latent = _without_latent(model, train)

    def values(x: Tensor) -> Tensor:
        return _elbo(model, x, num_samples, generator) - without_latent(x)

    return float(mean(values, data, batch_size, reduce))


@torch.no_grad()
def nll_without_latent(
    model: Any, data: Data, train: Tensor, *, batch_size: int = 1024, reduce: Reduce = None
) -> float:
    """Negative log-likelihood, in nats per datum, of the best model that ignores its latent.

    It gives every datum the same f, the likeliest one for the training data, and fits the scale where the likelihood
    has one to fit (``likelihood.ignoring(train)``).

    NaN for an autoregressive decoder: it predicts a token from those before, and beats frequencies by far without any
    latent. What to compare it with has to be trained: the plain model (``svae``) of the same sizes with a ``kl_weight``
    so large (100) that its KL is 0 is an autoregressive model without a latent, and :func:`negative_log_likelihood`
    measures it.

    Args:
        train: (N, D), or (N, ...) for an adapted model; all of it in every process.

    Needs of the model: ``likelihood.ignoring(x)``.
    """
    without_latent = _without_latent(model, train)
    return -float(mean(without_latent, data, batch_size, reduce))


def _without_latent(model: Any, train: Tensor) -> Callable[[Tensor], Tensor]:
    """``log p(x)`` (n,) of the best model that ignores its latent."""
    if hasattr(getattr(model, "decoder", None), "given"):
        return lambda x: torch.full((len(x),), math.nan, device=x.device)
    likelihood, f = model.likelihood.ignoring(train.flatten(1))
    return lambda x: likelihood.log_prob(x.flatten(1), f.to(x.device))


def _elbo(model: Any, x: Tensor, num_samples: int, generator: torch.Generator | None) -> Tensor:
    """The ELBO of each x (n, ...): (n,) float64."""
    posterior = model.inference(x)
    total = -kl_terms(model.prior, posterior).sum(-1)
    for _ in range(num_samples):
        z, weights = posterior.sample_components(generator)
        log_prob = model.likelihood.log_prob(x.flatten(1), model.generative(z, x)).to(total)
        total = total + (log_prob if weights is None else (weights.to(total) * log_prob).sum(0)) / num_samples
    return total
