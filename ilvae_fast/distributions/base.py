"""What a likelihood ``p(x|z)`` is: a function of the datum x and the decoder's output f(z)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from .._support.devices import with_float64


class Likelihood(nn.Module, ABC):
    """What models and metrics need of a likelihood.

    Shapes: x (..., D), f (*samples, ..., P), broadcast; P = D times ``parameters_per_value``.
    """

    data: ClassVar[str]  # words for the values it is meant for
    support: tuple[float, float] = (-math.inf, math.inf)  # the least and the largest of them
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
        """Return the one output f (P,) that is likeliest for all the data x (N, D) alike.

        A model that ignores its latent does that.

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
        """Return the best model of the data x (N, D) that ignores z: a likelihood, and its :meth:`marginal` f (P,).

        Where the likelihood has parameters that training would fit, it is a copy with these fitted: a model without a
        latent has errors as large as the data, and the scale of a Gaussian follows them. Else it is this one.
        """
        return self, self.marginal(x)

    def check(self, x: Tensor) -> None:
        """Accept data x of any shape that are values of this likelihood.

        It reads them all: call it once, before training.

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
        """Follow the data without a gradient. It is called once before the loss of each training step.

        Args:
            weights: (*samples, ...), of the samples of f; None: all 1.
        """


def checked_rows(x: Tensor) -> Tensor:
    """Return data x (N, D) as they are.

    Raises:
        ValueError: x has another shape, or no datum.
    """
    if x.dim() != 2 or len(x) == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted (N, D) with at least one datum")
    return x


def marginal_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a marginal of the data x."""
    return x.dtype if x.is_floating_point() else torch.get_default_dtype()


def smoothed_mean(x: Tensor) -> Tensor:
    """Return the mean (D,) in float64 of values in [0, 1], with half an observation of 0 and of 1 besides."""
    return (with_float64(checked_rows(x)).sum(0, dtype=torch.float64) + 0.5) / (len(x) + 1)


def bisect(increasing: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Return where the increasing function is 0 between low and high, elementwise; if nowhere, the nearer end."""
    for _ in range(64):
        middle = (low + high) / 2
        below = increasing(middle) < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
