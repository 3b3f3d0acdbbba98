"""Likelihoods by name. To add one, write a subclass of :class:`Likelihood` and put it into ``LIKELIHOODS``.

Nothing else knows their names. Options of a constructor are the ``likelihood_options`` of a configuration, so they must
be what JSON can hold.
"""

from __future__ import annotations

from .._support.errors import unknown_name
from .._support.options import build
from .base import Likelihood
from .binary import Bernoulli, ContinuousBernoulli
from .categorical import Categorical
from .counts import NegativeBinomial, Poisson
from .gaussian import Gaussian

LIKELIHOODS: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "continuous_bernoulli": ContinuousBernoulli,
    "gaussian": Gaussian,
    "categorical": Categorical,
    "poisson": Poisson,
    "negative_binomial": NegativeBinomial,
}


def as_likelihood(value: str | Likelihood, argument: str = "likelihood") -> Likelihood:
    """Return the likelihood of a name, with default options, or the object as it is.

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
