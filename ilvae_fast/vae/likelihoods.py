"""Likelihoods ``p(x|z)`` as functions of the datum x and the decoder's output f(z).

To add one, write a subclass of :class:`Likelihood` and put it into ``LIKELIHOODS``; nothing else knows their names.
Options of the constructor are the ``likelihood_options`` of a configuration, so they are what JSON can hold.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from .._errors import unknown_name
from .._options import build, check_number
from ..layers import check_positive
from ..ops import plain_softplus


class Likelihood(nn.Module, ABC):
    """What models and metrics need of a likelihood. Shapes: x (..., D), f (*samples, ..., P), broadcast; P = D times
    ``parameters_per_value``."""

    data: ClassVar[str]  # words for the values it is meant for ..
    support: tuple[float, float] = (-math.inf, math.inf)  # .. and the least and the largest of them
    parameters_per_value: int = 1

    @abstractmethod
    def log_prob(self, x: Tensor, f: Tensor) -> Tensor:
        """``log p(x|z)`` in nats, summed over the D coordinates: (*samples, ...)."""

    @abstractmethod
    def mean(self, f: Tensor) -> Tensor:
        """``E[x|z]``, or the likeliest x where x is not a number: (..., D)."""

    @abstractmethod
    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One x (..., D) for each f."""

    @abstractmethod
    def score(self, x: Tensor, f: Tensor) -> Tensor:
        """``d log p(x|z) / d f``, (*samples, ..., P).

        For an exponential family with natural parameter f it is the residual ``t(x) - grad Lambda(f)`` of sufficient
        statistic and mean. Then ``grad_z log p(x|z) = J_f(z)^T score``, which needs no autograd graph where the
        Jacobian is at hand. A likelihood with a part that depends on z other than through f has no such score.
        """

    @abstractmethod
    def marginal(self, x: Tensor) -> Tensor:
        """The one output f (P,) of a decoder that is likeliest for all the data x (N, D) alike: what a model does that
        ignores its latent.

        The data count with one observation more, spread evenly over the values where there are finitely many (for two
        values this is Jeffreys' prior), so that values never seen keep a probability and f is finite; of counts with
        half an event more. In the dtype of x; for integers in torch's default one.

        Raises:
            ValueError: x of another shape, or without a datum.
        """

    @abstractmethod
    def fisher(self, f: Tensor) -> Tensor:
        """``E_{x ~ p(x|f)}[score^2]``, (..., P) as f: the diagonal of the Fisher information of x about f.

        Its inverse is the variance of noise on the scale of f: a move of f by less than ``1 / sqrt(fisher)`` is hard
        to see in one x.
        """

    def ignoring(self, x: Tensor) -> tuple[Likelihood, Tensor]:
        """The best model of the data x (N, D) that ignores z: a likelihood, and its :meth:`marginal` f (P,).

        The likelihood is a copy where it has parameters that training would fit, such as the scale of a Gaussian: a
        model without a latent has errors as large as the data, and fits its scale to them. Else it is this one.
        """
        return self, self.marginal(x)

    def check(self, x: Tensor) -> None:
        """x, all data of any shape, are values of this likelihood. For once before training: it reads them all.

        Raises:
            ValueError: with the range of x.
        """
        low, high = self.support
        if not bool(((low <= x) & (x <= high)).all()):
            raise ValueError(
                f"x: got values from {x.min().item():g} to {x.max().item():g}, wanted {self.data}, for the likelihood "
                f"{type(self).__name__}: {low:g} to {high:g}"
            )

    def adapt(self, x: Tensor, f: Tensor, weights: Tensor | None) -> None:
        """Called once before the loss of each training step, for what follows the data without a gradient.

        weights (*samples, ...): of the samples of f; None: all 1.
        """


def _rows(x: Tensor) -> Tensor:
    if x.dim() != 2 or len(x) == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted (N, D) with at least one datum")
    return x


def _dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.get_default_dtype()


def _smoothed_mean(x: Tensor) -> Tensor:
    """Mean (D,) in float64 of values in [0, 1], with half an observation of 0 and of 1 besides."""
    return (_rows(x).sum(0, dtype=torch.float64) + 0.5) / (len(x) + 1)


def _bisect(increasing: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Where the increasing function is 0 between low and high, elementwise; the end that is nearer, if nowhere."""
    for _ in range(64):
        middle = (low + high) / 2
        below = increasing(middle) < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


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
        return _smoothed_mean(x).logit().to(_dtype(x))

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
        mean = _smoothed_mean(x)
        # the mean of f is less than 1 / |f| away from 0 for f < 0, from 1 for f > 0
        return _bisect(lambda f: self.mean(f) - mean, -1 / mean, 1 / (1 - mean)).to(_dtype(x))

    def fisher(self, f: Tensor) -> Tensor:
        """``Lambda''(f) = 1 / f^2 - 1 / (2 sinh(f / 2))^2``, the variance of x; in float64 inside, as the two terms
        cancel."""
        size = f.double().abs()
        small = size < self._SMALL
        safe = torch.where(small, 1.0, size)
        square = torch.where(small, size, 0.0).square()
        series = 1 / 12 - square * (1 / 240 - square * (1 / 6048 - square * (1 / 172800 - square / 5322240)))
        exact = safe.square().reciprocal() - (-safe).exp() / torch.expm1(-safe).square()
        return torch.where(small, series, exact).to(f.dtype)

    def _log_partition(self, f: Tensor) -> Tensor:
        # f/2 + log(sinh(f/2) / (f/2)); the second term is even and, for large |f|, |f|/2 - log|f|
        size = f.abs()
        small = size < self._SMALL
        safe = torch.where(small, 1.0, size)
        square = torch.where(small, f, 0.0).square()
        series = square * (1 / 24 - square * (1 / 2880 - square * (1 / 181440 - square * (1 / 9676800))))
        return 0.5 * f + torch.where(small, series, 0.5 * safe + torch.log(-torch.expm1(-safe)) - safe.log())


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
        return _rows(x).mean(0, dtype=torch.float64).to(_dtype(x))

    def fisher(self, f: Tensor) -> Tensor:
        return torch.ones_like(f) / self.scale**2

    @torch.no_grad()
    def ignoring(self, x: Tensor) -> tuple[Likelihood, Tensor]:
        f = self.marginal(x)
        if self.variance == "fixed":
            return self, f
        fitted = copy.deepcopy(self)
        mean_square = (x - f).square().mean(dtype=torch.float64)
        fitted.log_scale.fill_(max(0.5 * mean_square.log().item(), math.log(self._LEAST * self._fixed)))
        return fitted, f

    def extra_repr(self) -> str:
        return f"scale={self._fixed:g}, variance={self.variance}"


class Categorical(Likelihood):
    """Independent coordinates in 0 .. V - 1 with logits f, V for each: f (..., D V), one coordinate after the other.

    A coordinate of -1 is absent: it has no probability and no score.

    Args:
        num_categories: V.
    """

    data = "int64 tokens, -1 for none"

    def __init__(self, num_categories: int) -> None:
        super().__init__()
        self.parameters_per_value = check_positive("num_categories", num_categories)
        self.support = (-1, num_categories - 1)

    def _logits(self, f: Tensor) -> Tensor:
        return f.unflatten(-1, (-1, self.parameters_per_value))

    def log_prob(self, x: Tensor, f: Tensor) -> Tensor:
        logits = self._logits(f)
        shape = torch.broadcast_shapes(x.shape, logits.shape[:-1])
        index = x.clamp(min=0).expand(shape).unsqueeze(-1)
        each = logits.expand(*shape, -1).gather(-1, index).squeeze(-1) - logits.logsumexp(-1)
        return torch.where(x >= 0, each, 0.0).sum(-1)

    def mean(self, f: Tensor) -> Tensor:
        return self._logits(f).argmax(-1)

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        probabilities = self._logits(f).softmax(-1)
        drawn = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
        return drawn.reshape(probabilities.shape[:-1])

    def score(self, x: Tensor, f: Tensor) -> Tensor:
        probabilities = self._logits(f).softmax(-1)
        one_hot = F.one_hot(x.clamp(min=0), self.parameters_per_value).to(f.dtype)
        return ((one_hot - probabilities) * (x >= 0).unsqueeze(-1)).flatten(-2)

    def marginal(self, x: Tensor) -> Tensor:
        """Log frequencies at each position; absent tokens are not counted."""
        positions, categories = _rows(x).shape[-1], self.parameters_per_value
        index = x.long() + categories * torch.arange(positions, device=x.device)
        counts = index[x >= 0].bincount(minlength=positions * categories).double()
        smoothed = counts.unflatten(0, (positions, categories)) + 1 / categories
        return (smoothed / smoothed.sum(-1, keepdim=True)).log().flatten().to(_dtype(x))

    def fisher(self, f: Tensor) -> Tensor:
        probabilities = self._logits(f).softmax(-1)
        likeliest = probabilities.argmax(-1, keepdim=True)
        # 1 - p would cancel where p is near 1, which one category alone can be
        others = probabilities.scatter(-1, likeliest, 0.0).sum(-1, keepdim=True)
        return (probabilities * (1 - probabilities).scatter(-1, likeliest, others)).flatten(-2)

    def extra_repr(self) -> str:
        return f"num_categories={self.parameters_per_value}"


class _Counts(Likelihood):
    """Independent counts 0, 1, 2, .. with f the logarithm of their mean."""

    data = "counts, whole numbers >= 0"
    support = (0.0, math.inf)

    def mean(self, f: Tensor) -> Tensor:
        return f.exp()

    def marginal(self, x: Tensor) -> Tensor:
        return ((_rows(x).sum(0, dtype=torch.float64) + 0.5) / len(x)).log().to(_dtype(x))

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
        logit, r = f - self.log_dispersion, self.dispersion.double()
        coefficient = (x + r).lgamma() - r.lgamma() - (x + 1).double().lgamma()
        each = self.dispersion * plain_softplus(logit) + x * plain_softplus(-logit)
        return (coefficient.to(f.dtype) - each).sum(-1)

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
        fitted.log_dispersion.copy_(self._best(x.double(), f.double()))
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
        return _bisect(decrease, low, high)

    def extra_repr(self) -> str:
        return f"data_dim={self.log_dispersion.numel()}, trained={self.trained}"


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "continuous_bernoulli": ContinuousBernoulli,
    "gaussian": Gaussian,
    "categorical": Categorical,
    "poisson": Poisson,
    "negative_binomial": NegativeBinomial,
}


def as_likelihood(value: str | Likelihood, argument: str = "likelihood") -> Likelihood:
    """A name with default options, or an object with its own.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if isinstance(value, Likelihood):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{argument}: got {type(value).__name__}, wanted a name or a Likelihood")
    if value not in LIKELIHOODS:
        raise unknown_name(argument, value, LIKELIHOODS)
    return build(f"{argument} {value!r}, pass an object with its options", LIKELIHOODS[value], {})
