"""Likelihoods of counts."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from .._support.checks import check_number, check_positive
from .._support.devices import with_float64
from ..operators.softplus import plain_softplus
from .base import Likelihood, bisect, checked_rows, marginal_dtype


class _Counts(Likelihood):
    """Independent counts 0, 1, 2, .. with f the logarithm of their mean."""

    data = "counts, whole numbers >= 0"
    support = (0.0, math.inf)

    def mean(self, f: Tensor) -> Tensor:
        return f.exp()

    def marginal(self, x: Tensor) -> Tensor:
        total = with_float64(checked_rows(x)).sum(0, dtype=torch.float64)
        return ((total + 0.5) / len(x)).log().to(x.device, marginal_dtype(x))

    def check(self, x: Tensor) -> None:
        super().check(x)
        whole = x.frac() == 0 if x.is_floating_point() else torch.ones_like(x, dtype=torch.bool)
        if not bool(whole.all()):
            raise ValueError(
                f"x: got values such as {x[~whole][0].item():g}, wanted {self.data}, for the likelihood "
                f"{type(self).__name__}"
            )


class Poisson(_Counts):
    """Independent counts with log rates f, their natural parameter."""

    def log_prob(self, x: Tensor, f: Tensor) -> Tensor:
        return (x * f - f.exp() - (x + 1).lgamma()).sum(-1)

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.poisson(f.exp(), generator=generator)

    def score(self, x: Tensor, f: Tensor) -> Tensor:
        return x - f.exp()

    def fisher(self, f: Tensor) -> Tensor:
        return f.exp()


class NegativeBinomial(_Counts):
    """Independent counts with log means f and variances ``mu + mu^2 / r``: Poisson's, of rates that are Gamma.

    For counts that spread wider than Poisson's, such as those of genes in cells (Lopez et al., Nature Methods 2018,
    where r is called the inverse dispersion).

    Args:
        dispersion: r > 0; the first one if it is trained. Large r: Poisson.
        trained: train r.
        data_dim: D, for an r of each coordinate; 1: the same for all.

    State: log_dispersion (data_dim,), a parameter if trained.

    Raises:
        ValueError, TypeError: naming the option.
    """

    _RANGE = (-12.0, 12.0)  # of log r where the one that fits the data is looked for
    log_dispersion: Tensor

    def __init__(self, dispersion: float = 1.0, trained: bool = True, data_dim: int = 1) -> None:
        super().__init__()
        check_number("dispersion", dispersion, above=True)
        log_dispersion = torch.full((check_positive("data_dim", data_dim),), math.log(dispersion))
        self.trained = trained
        if trained:
            self.log_dispersion = nn.Parameter(log_dispersion)
        else:
            self.register_buffer("log_dispersion", log_dispersion)

    @property
    def dispersion(self) -> Tensor:
        """r (data_dim,)."""
        return self.log_dispersion.exp()

    def log_prob(self, x: Tensor, f: Tensor) -> Tensor:
        # r log(r / (mu + r)) + x log(mu / (mu + r)) + log of the binomial coefficient, whose terms cancel for large r
        logit, exact = f - self.log_dispersion, with_float64(x)
        r = self.dispersion.to(exact.device, torch.float64)
        coefficient = (exact + r).lgamma() - r.lgamma() - (exact + 1).double().lgamma()
        each = self.dispersion * plain_softplus(logit) + x * plain_softplus(-logit)
        return (coefficient.to(f) - each).sum(-1)

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        shape = self.dispersion.to(f.dtype).expand_as(f).contiguous()
        rate = torch._standard_gamma(shape, generator=generator) * (f - self.log_dispersion).exp()
        return torch.poisson(rate, generator=generator)

    def score(self, x: Tensor, f: Tensor) -> Tensor:
        return x - (x + self.dispersion) * (f - self.log_dispersion).sigmoid()

    def fisher(self, f: Tensor) -> Tensor:
        """``mu r / (mu + r)``."""
        return self.dispersion * (f - self.log_dispersion).sigmoid()

    def check(self, x: Tensor) -> None:
        super().check(x)
        if len(self.log_dispersion) not in (1, x.shape[-1]):
            raise ValueError(f"x: got {x.shape[-1]} coordinates, wanted data_dim, {len(self.log_dispersion)}")

    @torch.no_grad()
    def ignoring(self, x: Tensor) -> tuple[Likelihood, Tensor]:
        f = self.marginal(x)
        if not self.trained:
            return self, f
        fitted = copy.deepcopy(self)
        fitted.log_dispersion.copy_(self._best(with_float64(x).double(), with_float64(f).double()))
        return fitted, f

    def _best(self, x: Tensor, f: Tensor) -> Tensor:
        """The logarithm of the likeliest r (data_dim,), given x (N, D) and f (D,)."""
        values, often = x, torch.ones_like(x)
        highest = int(x.max())
        if highest < len(x):  # fewer values than data: it is enough how often each one occurs
            size, width = highest + 1, x.shape[1]
            index = x.long() + size * torch.arange(width, device=x.device)
            values = torch.arange(size, dtype=x.dtype, device=x.device).unsqueeze(-1)
            often = index.flatten().bincount(minlength=size * width).view(width, size).T.to(x.dtype)

        def decrease(log_r: Tensor) -> Tensor:
            # minus the derivative of log p in r
            r = log_r.exp()
            each = (values + r).digamma() - r.digamma() - plain_softplus(f - log_r) + (f.exp() - values) / (f.exp() + r)
            slope = (often * each).sum(0)
            return -slope if len(log_r) > 1 else -slope.sum(0, keepdim=True)

        low, high = (x.new_full(self.log_dispersion.shape, end) for end in self._RANGE)
        return bisect(decrease, low, high)

    def extra_repr(self) -> str:
        return f"data_dim={self.log_dispersion.numel()}, trained={self.trained}"
