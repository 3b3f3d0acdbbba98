"""Likelihoods of values in {0, 1} and in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from .._support.devices import with_float64
from ..operators.softplus import plain_softplus
from .base import Likelihood, bisect, marginal_dtype, smoothed_mean


class Bernoulli(Likelihood):
    """Independent coordinates in {0, 1} with logits f, their natural parameter.

    Values between 0 and 1 give the usual cross-entropy, which is then no normalised density.
    """

    data = "values in {0, 1}, or grey values in [0, 1]"
    support = (0.0, 1.0)

    def log_prob(self, x: Tensor, f: Tensor) -> Tensor:
        # x f - log(1 + exp(f))
        return (x * f - plain_softplus(f)).sum(-1)

    def mean(self, f: Tensor) -> Tensor:
        return f.sigmoid()

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(f.sigmoid(), generator=generator)

    def score(self, x: Tensor, f: Tensor) -> Tensor:
        return x - f.sigmoid()

    def marginal(self, x: Tensor) -> Tensor:
        return smoothed_mean(x).logit().to(x.device, marginal_dtype(x))

    def fisher(self, f: Tensor) -> Tensor:
        return f.sigmoid() * (-f).sigmoid()


class ContinuousBernoulli(Likelihood):
    """Independent coordinates in [0, 1] with density ``exp(x f - Lambda(f))``, ``Lambda(f) = log((exp(f) - 1) / f)``.

    f, the natural parameter, is the logit of the usual lambda. Source: Loaiza-Ganem & Cunningham, NeurIPS 2019.
    """

    data = "grey values in [0, 1]"
    support = (0.0, 1.0)
    _SMALL = 0.1  # |f| below which the series in f are exact to rounding in float64

    def log_prob(self, x: Tensor, f: Tensor) -> Tensor:
        return (x * f - self._log_partition(f)).sum(-1)

    def mean(self, f: Tensor) -> Tensor:
        """``Lambda'(f) = 1 / (1 - exp(-f)) - 1 / f``."""
        small = f.abs() < self._SMALL
        safe = torch.where(small, 1.0, f)
        square = torch.where(small, f, 0.0).square()
        series = 1 / 12 - square * (1 / 720 - square * (1 / 30240 - square * (1 / 1209600 - square / 47900160)))
        return torch.where(small, 0.5 + f * series, -1 / torch.expm1(-safe) - 1 / safe)

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        u = torch.rand(f.shape, generator=generator, dtype=f.dtype, device=f.device)
        # inverse of the distribution function expm1(f x) / expm1(f), for f < 0; f > 0 is its mirror image
        below = -f.abs()
        flat = below > -1e-3
        safe = torch.where(flat, -1.0, below)
        x = torch.where(flat, u, torch.log1p(u * torch.expm1(safe)) / safe)
        return torch.where(f > 0, 1 - x, x)

    def score(self, x: Tensor, f: Tensor) -> Tensor:
        return x - self.mean(f)

    def marginal(self, x: Tensor) -> Tensor:
        mean = smoothed_mean(x)
        # the mean of f is less than 1 / |f| away from 0 for f < 0, from 1 for f > 0
        return bisect(lambda f: self.mean(f) - mean, -1 / mean, 1 / (1 - mean)).to(x.device, marginal_dtype(x))

    def fisher(self, f: Tensor) -> Tensor:
        """``Lambda''(f) = 1 / f^2 - 1 / (2 sinh(f / 2))^2``, the variance of x; in float64 inside, as the two terms
        cancel."""
        size = with_float64(f).double().abs()
        small = size < self._SMALL
        safe = torch.where(small, 1.0, size)
        square = torch.where(small, size, 0.0).square()
        series = 1 / 12 - square * (1 / 240 - square * (1 / 6048 - square * (1 / 172800 - square / 5322240)))
        exact = safe.square().reciprocal() - (-safe).exp() / torch.expm1(-safe).square()
        return torch.where(small, series, exact).to(f)

    def _log_partition(self, f: Tensor) -> Tensor:
        # f/2 + log(sinh(f/2) / (f/2)); the second term is even and, for large |f|, |f|/2 - log|f|
        size = f.abs()
        small = size < self._SMALL
        safe = torch.where(small, 1.0, size)
        square = torch.where(small, f, 0.0).square()
        series = square * (1 / 24 - square * (1 / 2880 - square * (1 / 181440 - square * (1 / 9676800))))
        return 0.5 * f + torch.where(small, series, 0.5 * safe + torch.log(-torch.expm1(-safe)) - safe.log())
