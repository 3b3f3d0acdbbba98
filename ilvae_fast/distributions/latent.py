"""Distributions over the latent space: approximate posteriors and priors.

A prior says how wide an encoder's output has to be (``num_posterior_parameters``), of which it makes the approximate
posterior. To add one, write a subclass of :class:`Prior`, with its posterior, and put it into ``PRIORS``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._support.checks import check_number, check_positive
from ..operators.softplus import plain_softplus

_LOG_2PI = math.log(2 * math.pi)


def _noise(like: Tensor, num_samples: int | None, generator: torch.Generator | None) -> Tensor:
    shape = like.shape if num_samples is None else (num_samples, *like.shape)
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def _log_normal(z: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    # scaled before it is squared: the variance may be too small to divide by
    return _log_standardised((z - mean) * (-0.5 * log_variance).exp(), log_variance)


def _log_standardised(deviations: Tensor, log_variance: Tensor) -> Tensor:
    """Log density of a normal variable that is so many standard ``deviations`` (..., m) from its mean."""
    return -0.5 * (deviations.square() + log_variance + _LOG_2PI).sum(-1)


class DiagonalGaussian(NamedTuple):
    """``q(z|x) = N(mean, diag exp(log_variance))``, both (..., m)."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, num_samples: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Reparametrised samples: (..., m), or (num_samples, ..., m)."""
        return self._draw(num_samples, generator)[0]

    def sample_with_log_prob(
        self, num_samples: int | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`sample` with ``log q(z|x)``, (...) or (num_samples, ...), from the noise that made z.

        :meth:`log_prob` sees z as it was rounded, which for a deviation near the rounding error is another point.
        """
        z, noise = self._draw(num_samples, generator)
        return z, _log_standardised(noise, self.log_variance)

    def _draw(self, num_samples: int | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """z and the noise in it."""
        noise = _noise(self.mean, num_samples, generator)
        return self.mean + (0.5 * self.log_variance).exp() * noise, noise

    def sample_components(self, generator: torch.Generator | None = None) -> tuple[Tensor, None]:
        """The one component's sample (..., m), and None: it has no weight to speak of."""
        return self.sample(generator=generator), None

    def log_prob(self, z: Tensor) -> Tensor:
        """``log q(z|x)`` in nats: z (*samples, ..., m) -> (*samples, ...)."""
        return _log_normal(z, self.mean, self.log_variance)


class GaussianMixturePosterior(NamedTuple):
    """``q(y|x) q(z|x, y)``: y categorical with logits (..., K), z given y a diagonal Gaussian.

    means, log_variances (..., K, m).
    """

    logits: Tensor
    means: Tensor
    log_variances: Tensor

    @property
    def mean(self) -> Tensor:
        """``E_q(z|x)[z]`` (..., m), over all components."""
        return (self.logits.softmax(-1).unsqueeze(-1) * self.means).sum(-2)

    @property
    def log_variance(self) -> Tensor:
        """Logarithm of ``Var_q(z|x)[z]`` (..., m), over all components."""
        within = self.log_variances.exp() + (self.means - self.mean.unsqueeze(-2)).square()
        return (self.logits.softmax(-1).unsqueeze(-1) * within).sum(-2).log()

    def sample(self, num_samples: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Samples of ``q(z|x)``, reparametrised given y: (..., m), or (num_samples, ..., m)."""
        z, *_ = self._draw(1 if num_samples is None else num_samples, generator)
        return z.squeeze(0) if num_samples is None else z

    def sample_with_log_prob(
        self, num_samples: int | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`sample` with ``log q(z|x)``, as of :class:`DiagonalGaussian`."""
        z, mean, log_variance, noise = self._draw(1 if num_samples is None else num_samples, generator)
        # from each component's mean, in its standard deviations; from that of y it is the noise, to the bit
        to_chosen = (mean.unsqueeze(-2) - self.means) * (-0.5 * self.log_variances).exp()
        ratio = (0.5 * (log_variance.unsqueeze(-2) - self.log_variances)).exp()
        log_q = self._marginal(_log_standardised(to_chosen + ratio * noise.unsqueeze(-2), self.log_variances))
        return (z.squeeze(0), log_q.squeeze(0)) if num_samples is None else (z, log_q)

    def _draw(self, count: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z of a random y, the mean and the log variance given y, and the noise, each (count, ..., m)."""
        *shape, components = self.logits.shape
        flat = self.logits.reshape(-1, components).softmax(-1)
        y = torch.multinomial(flat, count, replacement=True, generator=generator).T.reshape(count, *shape, 1, 1)
        index = y.expand(count, *shape, 1, self.means.shape[-1])

        def chosen(values: Tensor) -> Tensor:
            return values.expand(count, *values.shape).gather(-2, index).squeeze(-2)

        mean, log_variance = chosen(self.means), chosen(self.log_variances)
        noise = _noise(mean, None, generator)
        return mean + (0.5 * log_variance).exp() * noise, mean, log_variance, noise

    def sample_components(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """A sample of each component (K, ..., m) and its weight ``q(y|x)`` (K, ...): no noise from choosing y."""
        z = self.means + (0.5 * self.log_variances).exp() * _noise(self.means, None, generator)
        return z.movedim(-2, 0), self.logits.softmax(-1).movedim(-1, 0)

    def log_prob(self, z: Tensor) -> Tensor:
        """``log sum_y q(y|x) q(z|x, y)`` in nats: z (*samples, ..., m) -> (*samples, ...)."""
        return self._marginal(_log_normal(z.unsqueeze(-2), self.means, self.log_variances))

    def _marginal(self, given_y: Tensor) -> Tensor:
        """``log q(z|x)`` of ``log q(z|x, y)`` (..., K)."""
        return (self.logits.log_softmax(-1) + given_y).logsumexp(-1)


Posterior = DiagonalGaussian | GaussianMixturePosterior


class Prior(nn.Module, ABC):
    """What models and metrics need of a prior on m = latent_dim coordinates."""

    num_posterior_parameters: int  # what an encoder returns for a datum

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim

    @abstractmethod
    def posterior(self, parameters: Tensor) -> Posterior:
        """The approximate posterior of an encoder's output (..., num_posterior_parameters)."""

    @abstractmethod
    def sample(
        self,
        num_samples: int,
        generator: torch.Generator | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Samples (num_samples, m)."""

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """``log p(z)`` in nats: (..., m) -> (...)."""

    @abstractmethod
    def kl(self, posterior: Posterior) -> Tensor:
        """What each coordinate of z contributes to the KL term of the ELBO, in nats: (..., m)."""

    def assignment_kl(self, posterior: Posterior) -> Tensor | None:
        """What a categorical variable contributes to the KL term besides, in nats (...); None without one."""
        return None

    def extra_repr(self) -> str:
        return f"{self.latent_dim}"


class StandardNormal(Prior):
    """The prior ``p(z) = N(0, I)``, with a diagonal Gaussian as approximate posterior.

    Args:
        minimum_rate: lower bound of ``KL(q(z|x) || p(z))`` in nats, spread evenly over the coordinates, by keeping the
            posterior's variances under the value where a mean of 0 alone would cost as much. After delta-VAE
            (Razavi, van den Oord, Poole & Vinyals, ICLR 2019), for independent coordinates.
    """

    def __init__(self, latent_dim: int, minimum_rate: float = 0.0) -> None:
        super().__init__(latent_dim)
        check_number("minimum_rate", minimum_rate)
        self.num_posterior_parameters = 2 * latent_dim
        self.minimum_rate = float(minimum_rate)
        self._ceiling = _log_variance_of_rate(self.minimum_rate / latent_dim)

    def posterior(self, parameters: Tensor) -> DiagonalGaussian:
        mean, log_variance = parameters.chunk(2, -1)
        if self.minimum_rate > 0:
            log_variance = self._ceiling - plain_softplus(self._ceiling - log_variance)
        return DiagonalGaussian(mean, log_variance)

    def sample(
        self,
        num_samples: int,
        generator: torch.Generator | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        return torch.randn(num_samples, self.latent_dim, generator=generator, dtype=dtype, device=device)

    def log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * (z.square() + _LOG_2PI).sum(-1)

    def kl(self, posterior: Posterior) -> Tensor:
        """``KL(q(z|x) || p(z))`` of each coordinate (Kingma & Welling, ICLR 2014, appendix B)."""
        assert isinstance(posterior, DiagonalGaussian)
        mean, log_variance = posterior
        return 0.5 * (mean.square() + log_variance.expm1() - log_variance)


def _log_variance_of_rate(rate: float) -> float:
    """The t <= 0 with ``1/2 (exp(t) - 1 - t) = rate``, by bisection."""
    low, high = -2 * rate - 2, 0.0  # at low the left side exceeds rate
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if math.expm1(middle) - middle > 2 * rate else (low, middle)
    return (low + high) / 2


class GaussianMixture(Prior):
    """The prior ``p(y) p(z|y)``: y uniform on K components, ``p(z|y) = N(means[y], diag exp(log_variances[y]))``.

    The approximate posterior is ``q(y|x) q(z|x, y)``. The ELBO sums over y exactly, so a training step decodes K
    latents for each datum.

    Args:
        num_components: K.
        trained_variances: train the components' variances too. By default they are 1: they set the unit of length in
            the latent space, and with it what an inverse-Lipschitz constant of the decoder means.
        spread: standard deviation of the means at first.

    State: means (K, m), log_variances (K, m).

    Source: Dilokthanakul et al., arXiv 1611.02648; Wang, Blei & Cunningham, NeurIPS 2021 (LIDMVAE).
    """

    log_variances: Tensor

    def __init__(
        self, latent_dim: int, num_components: int = 10, trained_variances: bool = False, spread: float = 1.0
    ) -> None:
        super().__init__(latent_dim)
        self.num_components = check_positive("num_components", num_components)
        check_number("spread", spread)
        self.num_posterior_parameters = num_components * (1 + 2 * latent_dim)
        self.means = nn.Parameter(spread * torch.randn(num_components, latent_dim))
        log_variances = torch.zeros(num_components, latent_dim)
        if trained_variances:
            self.log_variances = nn.Parameter(log_variances)
        else:
            self.register_buffer("log_variances", log_variances)

    def posterior(self, parameters: Tensor) -> GaussianMixturePosterior:
        if parameters.dim() == 0:
            raise ValueError(
                f"parameters: got a tensor without dimensions, wanted (..., {self.num_posterior_parameters})"
            )
        components = self.num_components
        logits, rest = parameters[..., :components], parameters[..., components:]
        means, log_variances = rest.unflatten(-1, (components, 2 * self.latent_dim)).chunk(2, -1)
        return GaussianMixturePosterior(logits, means, log_variances)

    def sample(
        self,
        num_samples: int,
        generator: torch.Generator | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        device = device or self.means.device
        y = torch.randint(self.num_components, (num_samples,), generator=generator, device=device)
        noise = torch.randn(num_samples, self.latent_dim, generator=generator, dtype=dtype, device=device)
        return (self.means[y] + (0.5 * self.log_variances[y]).exp() * noise).to(noise.dtype)

    def log_prob(self, z: Tensor) -> Tensor:
        given_y = _log_normal(z.unsqueeze(-2), self.means, self.log_variances)
        return given_y.logsumexp(-1) - math.log(self.num_components)

    def kl(self, posterior: Posterior) -> Tensor:
        """``E_q(y|x) KL(q(z|x, y) || p(z|y))`` of each coordinate."""
        assert isinstance(posterior, GaussianMixturePosterior)
        precision = (-self.log_variances).exp()
        difference = posterior.log_variances - self.log_variances
        square = (posterior.means - self.means).square() * precision
        given_y = 0.5 * (square + difference.expm1() - difference)
        return (posterior.logits.softmax(-1).unsqueeze(-1) * given_y).sum(-2)

    def assignment_kl(self, posterior: Posterior) -> Tensor:
        """``KL(q(y|x) || p(y))``."""
        assert isinstance(posterior, GaussianMixturePosterior)
        log_q = posterior.logits.log_softmax(-1)
        finite = log_q.clamp(min=torch.finfo(log_q.dtype).min)  # 0 log 0 = 0 where an encoder rules a component out
        return (log_q.exp() * finite).sum(-1) + math.log(self.num_components)

    def extra_repr(self) -> str:
        return f"{self.latent_dim}, num_components={self.num_components}"


PRIORS: dict[str, type[Prior]] = {"standard_normal": StandardNormal, "gaussian_mixture": GaussianMixture}
