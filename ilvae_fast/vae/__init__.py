"""Variational autoencoders with plain and inverse-Lipschitz decoders: one ELBO, interchangeable parts.

config = VAEConfig.named("il-lidvae", data_dim=64, latent_dim=10, likelihood_options={"scale": 0.5})
model = VAE(config)
output = model(x)                      # named fields; output.loss.backward() trains
model.save_pretrained("checkpoint")
"""

from .config import CONFIGURATIONS as CONFIGURATIONS
from .config import VAEConfig as VAEConfig
from .decoders import DECODERS as DECODERS
from .distributions import PRIORS as PRIORS
from .distributions import DiagonalGaussian as DiagonalGaussian
from .distributions import GaussianMixture as GaussianMixture
from .distributions import GaussianMixturePosterior as GaussianMixturePosterior
from .distributions import Prior as Prior
from .distributions import StandardNormal as StandardNormal
from .encoders import ENCODERS as ENCODERS
from .likelihoods import LIKELIHOODS as LIKELIHOODS
from .likelihoods import Bernoulli as Bernoulli
from .likelihoods import Categorical as Categorical
from .likelihoods import ContinuousBernoulli as ContinuousBernoulli
from .likelihoods import Gaussian as Gaussian
from .likelihoods import Likelihood as Likelihood
from .likelihoods import NegativeBinomial as NegativeBinomial
from .likelihoods import Poisson as Poisson
from .model import VAE as VAE
from .model import ImportanceSamples as ImportanceSamples
from .model import VAEOutput as VAEOutput
from .sequences import AutoregressiveDecoder as AutoregressiveDecoder
