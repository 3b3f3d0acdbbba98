"""Distributions over the latent space: approximate posteriors and priors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class DiagonalGaussian(NamedTuple):
    """``q(z|x) = N(mean, diag exp(log_variance))``, both (..., m); what an encoder returns."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, num_samples: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Reparametrised samples: (..., m), or (num_samples, ..., m)."""
        shape = self.mean.shape if num_samples is None else (num_samples, *self.mean.shape)
        noise = torch.randn(shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """``log q(z|x)`` in nats: z (*samples, ..., m) -> (*samples, ...)."""
        square = (z - self.mean).square() * (-self.log_variance).exp()
        return -0.5 * (square + self.log_variance + math.log(2 * math.pi)).sum(-1)


class StandardNormal(nn.Module):
    """The prior ``p(z) = N(0, I)`` on latent_dim coordinates; what a model needs of any prior."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim

    def sample(
        self,
        num_samples: int,
        generator: torch.Generator | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Samples (num_samples, m)."""
        return torch.randn(num_samples, self.latent_dim, generator=generator, dtype=dtype, device=device)

    def log_prob(self, z: Tensor) -> Tensor:
        """``log p(z)`` in nats: (..., m) -> (...)."""
        return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)

    def kl(self, posterior: DiagonalGaussian) -> Tensor:
        """``KL(q(z|x) || p(z))`` of each coordinate, in nats: (..., m) (Kingma & Welling, ICLR 2014, appendix B)."""
        mean, log_variance = posterior
        return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)

    def extra_repr(self) -> str:
        return f"{self.latent_dim}"
