"""Small models of every kind, and data for them."""

from __future__ import annotations

import torch

from ilvae_fast.vae import CONFIGURATIONS, VAE
from ilvae_fast.vae import VAEConfig as Config

SMALL = {"data_dim": 7, "latent_dim": 3, "encoder_hidden": (11,)}
HIDDEN = {"mlp": (11,), "brenier": ((6,), (9, 5))}
TOKENS = 13
OPTIONS = {"categorical": {"num_categories": TOKENS}}
MIXTURES = [name for name in CONFIGURATIONS if "prior" in CONFIGURATIONS[name]]
SEQUENCES = [name for name in CONFIGURATIONS if "autoregressive_hidden" in CONFIGURATIONS[name]]
STATIC = [name for name in CONFIGURATIONS if name not in SEQUENCES]


def small(name: str = "il-lidvae", **fields) -> Config:
    decoder = fields.get("decoder", CONFIGURATIONS[name]["decoder"])
    sized = {**SMALL, "decoder_hidden": HIDDEN.get(decoder)}
    if name in SEQUENCES:
        sized.update(autoregressive_hidden=8, token_embedding=5, likelihood_options=OPTIONS["categorical"])
    if name in MIXTURES:
        sized["prior_options"] = {"num_components": 4}
    return Config.named(name, **{**sized, **fields})


def small_model(name: str = "il-lidvae", **fields) -> VAE:
    torch.manual_seed(0)
    return VAE(small(name, **fields)).double()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, 7, dtype=torch.float64, generator=seeded(1))


def tokens(*shape: int) -> torch.Tensor:
    """Sequences of 4 to 7 tokens."""
    generator = seeded(1)
    x = torch.randint(TOKENS, (*shape, 7), generator=generator)
    lengths = torch.randint(4, 8, (*shape, 1), generator=generator)
    return torch.where(torch.arange(7) < lengths, x, -1)


def counts(*shape: int) -> torch.Tensor:
    return (9 * batch(*shape).square()).floor()


def values_of(likelihood: str, *shape: int) -> torch.Tensor:
    """Data that the likelihood of that name is meant for."""
    kinds = {"categorical": tokens, "poisson": counts, "negative_binomial": counts}
    return kinds.get(likelihood, batch)(*shape)


def data_for(name: str, *shape: int) -> torch.Tensor:
    return tokens(*shape) if name in SEQUENCES else batch(*shape)
