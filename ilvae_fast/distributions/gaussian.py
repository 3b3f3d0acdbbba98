"""The likelihood of real values."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .._support.checks import check_number
from .._support.devices import with_float64
from .._support.errors import unknown_name
from .base import Likelihood, checked_rows, marginal_dtype

VARIANCES = ("fixed", "trained", "optimal")


class Gaussian(Likelihood):
    """Independent coordinates ``N(f, scale^2)``: f is the mean, ``f / scale^2`` the natural parameter.

    Args:
        scale: standard deviation sigma > 0 in units of the data, one for all coordinates; the first one if it moves.
        variance: ``"fixed"``; ``"trained"``, a parameter; or ``"optimal"``: the mean squared error of reconstruction,
            where the likelihood is largest (sigma-VAE; Rybkin, Daniilidis & Levine, ICML 2021), followed as a moving
            average over training steps. At the optimum the loss has no slope along sigma, so it needs no gradient.
            It stays above a millionth of ``scale``, about what float32 resolves: no error at all would have a sigma of
            0, and no density.
            In a distributed run it is that of all processes' data: all of them have to take part in a training step.

    State: log_scale (1,) unless fixed, a parameter if trained.

    Raises:
        ValueError, TypeError: naming the option.
    """

    data = "real values"
    _MOMENTUM = 0.05
    _LEAST = 1e-6  # sigma that is followed, in units of the first one
    log_scale: Tensor
    steps: Tensor

    def __init__(self, scale: float = 1.0, variance: str = "fixed") -> None:
        super().__init__()
        check_number("scale", scale, above=True)
        if variance not in VARIANCES:
            raise unknown_name("variance", variance, VARIANCES)
        self.variance, self._fixed = variance, float(scale)
        log_scale = torch.full((1,), math.log(scale))
        if variance == "trained":
            self.log_scale = nn.Parameter(log_scale)
        elif variance == "optimal":
            self.register_buffer("log_scale", log_scale)
            self.register_buffer("steps", torch.zeros(1, dtype=torch.long))

    @property
    def scale(self) -> float | Tensor:
        """sigma: a float if fixed, else a tensor (1,)."""
        return self._fixed if self.variance == "fixed" else self.log_scale.exp()

    @torch.no_grad()
    def adapt(self, x: Tensor, f: Tensor, weights: Tensor | None) -> None:
        if self.variance != "optimal":
            return
        square = (x - f).square().mean(-1)
        if weights is not None:
            square = (weights * square).sum(0)
        mean = square.mean().to(self.log_scale.dtype)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)
            mean = mean / dist.get_world_size()
        rate = torch.where(self.steps == 0, 1.0, self._MOMENTUM).to(self.log_scale.dtype)
        variance = torch.lerp((2 * self.log_scale).exp(), mean, rate)
        adapted = (0.5 * variance.log()).clamp(min=math.log(self._LEAST * self._fixed))
        usable = mean.isfinite()  # an empty batch, or NaN, which the average would keep for ever
        self.log_scale.copy_(torch.where(usable, adapted, self.log_scale))
        self.steps.add_(usable)

    def log_prob(self, x: Tensor, f: Tensor) -> Tensor:
        square = ((x - f) / self.scale).square().sum(-1)
        log_scale = math.log(self._fixed) if self.variance == "fixed" else self.log_scale.squeeze(0)
        return -0.5 * square - f.shape[-1] * (log_scale + 0.5 * math.log(2 * math.pi))

    def mean(self, f: Tensor) -> Tensor:
        return f

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return f + self.scale * torch.randn(f.shape, generator=generator, dtype=f.dtype, device=f.device)

    def score(self, x: Tensor, f: Tensor) -> Tensor:
        return (x - f) / self.scale**2

    def marginal(self, x: Tensor) -> Tensor:
        return with_float64(checked_rows(x)).mean(0, dtype=torch.float64).to(x.device, marginal_dtype(x))

    def fisher(self, f: Tensor) -> Tensor:
        return torch.ones_like(f) / self.scale**2

    @torch.no_grad()
    def ignoring(self, x: Tensor) -> tuple[Likelihood, Tensor]:
        f = self.marginal(x)
        if self.variance == "fixed":
            return self, f
        fitted = copy.deepcopy(self)
        mean_square = with_float64(x - f).square().mean(dtype=torch.float64)
        fitted.log_scale.fill_(max(0.5 * mean_square.log().item(), math.log(self._LEAST * self._fixed)))
        return fitted, f

    def extra_repr(self) -> str:
        return f"scale={self._fixed:g}, variance={self.variance}"
