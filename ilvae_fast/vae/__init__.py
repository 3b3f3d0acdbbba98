"""Variational autoencoders with plain and inverse-Lipschitz decoders: one ELBO, interchangeable parts.

config = VAEConfig.named("il-lidvae", data_dim=64, latent_dim=10, likelihood_options={"scale": 0.5})
model = VAE(config)
output = model(x)                      # named fields; output.loss.backward() trains
model.save_pretrained("checkpoint")
"""

from ..distributions import LIKELIHOODS as LIKELIHOODS
from ..distributions import PRIORS as PRIORS
from ..distributions import Bernoulli as Bernoulli
from ..distributions import Categorical as Categorical
from ..distributions import ContinuousBernoulli as ContinuousBernoulli
from ..distributions import DiagonalGaussian as DiagonalGaussian
from ..distributions import Gaussian as Gaussian
from ..distributions import GaussianMixture as GaussianMixture
from ..distributions import GaussianMixturePosterior as GaussianMixturePosterior
from ..distributions import Likelihood as Likelihood
from ..distributions import NegativeBinomial as NegativeBinomial
from ..distributions import Poisson as Poisson
from ..distributions import Prior as Prior
from ..distributions import StandardNormal as StandardNormal
from .config import CONFIGURATIONS as CONFIGURATIONS
from .config import DECODERS as DECODERS
from .config import ENCODERS as ENCODERS
from .config import VAEConfig as VAEConfig
from .model import VAE as VAE
from .model import ImportanceSamples as ImportanceSamples
from .model import VAEOutput as VAEOutput
from .sequences import AutoregressiveDecoder as AutoregressiveDecoder
