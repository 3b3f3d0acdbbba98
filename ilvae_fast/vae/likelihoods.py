"""Likelihoods ``p(x|z)`` as functions of the datum x and the decoder's output f(z).

To add one, write a subclass of :class:`Likelihood` and put it into ``LIKELIHOODS``; nothing else knows their names.
Options of the constructor are the ``likelihood_options`` of a configuration, so they are what JSON can hold.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Likelihood(nn.Module, ABC):
    """What models and metrics need of a likelihood. Shapes: x (..., D), f (*samples, ..., D), broadcast."""

    data: ClassVar[str]  # words for the values it is meant for

    @abstractmethod
    def log_prob(self, x: Tensor, f: Tensor) -> Tensor:
        """``log p(x|z)`` in nats, summed over the D coordinates: (*samples, ...)."""

    @abstractmethod
    def mean(self, f: Tensor) -> Tensor:
        """``E[x|z]`` in the shape of f."""

    @abstractmethod
    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One x for each f, in its shape."""

    @abstractmethod
    def score(self, x: Tensor, f: Tensor) -> Tensor:
        """``d log p(x|z) / d f``, (*samples, ..., D).

        For an exponential family with natural parameter f it is the residual ``t(x) - grad Lambda(f)`` of sufficient
        statistic and mean. Then ``grad_z log p(x|z) = J_f(z)^T score``, which needs no autograd graph where the
        Jacobian is at hand. A likelihood with a part that depends on z other than through f has no such score.
        """


class Bernoulli(Likelihood):
    """Independent coordinates in {0, 1} with logits f, their natural parameter.

    Values between 0 and 1 give the usual cross-entropy, which is then no normalised density.
    """

    data = "values in {0, 1}, or grey values in [0, 1]"

    def log_prob(self, x: Tensor, f: Tensor) -> Tensor:
        # x f - log(1 + exp(f))
        return (x * f - F.softplus(f)).sum(-1)

    def mean(self, f: Tensor) -> Tensor:
        return f.sigmoid()

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(f.sigmoid(), generator=generator)

    def score(self, x: Tensor, f: Tensor) -> Tensor:
        return x - f.sigmoid()


class Gaussian(Likelihood):
    """Independent coordinates ``N(f, scale^2)``: f is the mean, ``f / scale^2`` the natural parameter.

    Args:
        scale: the fixed standard deviation sigma > 0, in units of the data.

    Raises:
        ValueError, TypeError: scale is no finite number > 0.
    """

    data = "real values"

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise TypeError(f"scale: got {type(scale).__name__} {scale!r}, wanted a number > 0")
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale: got {scale!r}, wanted a finite number > 0")
        self.scale = float(scale)

    def log_prob(self, x: Tensor, f: Tensor) -> Tensor:
        square = ((x - f) / self.scale).square().sum(-1)
        return -0.5 * square - f.shape[-1] * (math.log(self.scale) + 0.5 * math.log(2 * math.pi))

    def mean(self, f: Tensor) -> Tensor:
        return f

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return f + self.scale * torch.randn(f.shape, generator=generator, dtype=f.dtype, device=f.device)

    def score(self, x: Tensor, f: Tensor) -> Tensor:
        return (x - f) / self.scale**2

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"


LIKELIHOODS: dict[str, type[Likelihood]] = {"bernoulli": Bernoulli, "gaussian": Gaussian}
