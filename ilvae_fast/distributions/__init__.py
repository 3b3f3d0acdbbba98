"""Distributions of the models: likelihoods over data, priors and approximate posteriors over latents."""

from .base import Likelihood as Likelihood
from .binary import Bernoulli as Bernoulli
from .binary import ContinuousBernoulli as ContinuousBernoulli
from .categorical import Categorical as Categorical
from .counts import NegativeBinomial as NegativeBinomial
from .counts import Poisson as Poisson
from .gaussian import Gaussian as Gaussian
from .latent import PRIORS as PRIORS
from .latent import DiagonalGaussian as DiagonalGaussian
from .latent import GaussianMixture as GaussianMixture
from .latent import GaussianMixturePosterior as GaussianMixturePosterior
from .latent import Posterior as Posterior
from .latent import Prior as Prior
from .latent import StandardNormal as StandardNormal
from .likelihoods import LIKELIHOODS as LIKELIHOODS
from .likelihoods import as_likelihood as as_likelihood
