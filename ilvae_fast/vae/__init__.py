"""Variational autoencoders with plain and inverse-Lipschitz decoders: one ELBO, interchangeable parts.

config = VAEConfig.named("il-lidvae", data_dim=64, latent_dim=10, likelihood_options={"scale": 0.5})
model = VAE(config)
output = model(x)                      # named fields; output.loss.backward() trains
model.save_pretrained("checkpoint")
"""

from .config import CONFIGURATIONS as CONFIGURATIONS
from .config import VAEConfig as VAEConfig
from .decoders import DECODERS as DECODERS
from .distributions import DiagonalGaussian as DiagonalGaussian
from .distributions import StandardNormal as StandardNormal
from .likelihoods import LIKELIHOODS as LIKELIHOODS
from .likelihoods import Bernoulli as Bernoulli
from .likelihoods import Gaussian as Gaussian
from .likelihoods import Likelihood as Likelihood
from .model import VAE as VAE
from .model import ImportanceSamples as ImportanceSamples
from .model import VAEOutput as VAEOutput
