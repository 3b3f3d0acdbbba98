"""The variational autoencoder: one ELBO over interchangeable parts."""

from __future__ import annotations

import json
import math
import os
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._extras import require
from .._files import write_atomically
from ..layers import check_positive
from .config import VAEConfig
from .decoders import DECODERS
from .distributions import DiagonalGaussian, StandardNormal
from .encoders import MLPEncoder
from .likelihoods import LIKELIHOODS

_ROWS = 2**15  # latents decoded at a time where only a reduction over them is kept


class VAEOutput(NamedTuple):
    """What one pass over a batch gives; all terms in nats.

    loss (): mean over the data of ``reconstruction + kl_weight * kl``. reconstruction (...): ``-log p(x|z)``. kl (...):
    ``KL(q(z|x) || p(z))``, kl_per_dimension (..., m) its parts. z, mean, log_variance (..., m): a sample of q(z|x) and
    its parameters. f (..., D): the decoder's output at z.
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor
    kl_per_dimension: Tensor
    z: Tensor
    mean: Tensor
    log_variance: Tensor
    f: Tensor


class ImportanceSamples(NamedTuple):
    """Samples of q(z|x) with what turns them into samples of p(z|x).

    z (S, ..., m); f (S, ..., D): the decoder's output; log_weights (S, ...): ``log p(x, z) - log q(z|x)``.
    """

    z: Tensor
    f: Tensor
    log_weights: Tensor


class VAE(nn.Module):
    """A variational autoencoder (Kingma & Welling, ICLR 2014) with the parts that ``config`` names.

    Shapes: x (..., D), z (..., m), any leading shape. ``inference``, ``generative``, ``loss`` and ``forward`` are for
    training; ``encode``, ``decode``, ``reconstruct``, ``sample`` and ``log_likelihood`` keep no graph.

    State: encoder, decoder, kl_weight (1,), a buffer to be filled in place by a schedule.

    Raises:
        ValueError, TypeError: naming the field of the configuration.
    """

    kl_weight: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.prior = StandardNormal(config.latent_dim)
        self.likelihood = LIKELIHOODS[config.likelihood](**config.likelihood_options)
        self.encoder = MLPEncoder(config.data_dim, config.encoder_hidden, config.latent_dim)
        self.decoder = DECODERS[config.decoder](config)
        self.register_buffer("kl_weight", torch.full((1,), config.kl_weight))

    def inference(self, x: Tensor) -> DiagonalGaussian:
        """The approximate posterior q(z|x)."""
        if x.dim() == 0 or x.shape[-1] != self.config.data_dim:
            raise ValueError(f"x: got shape {tuple(x.shape)}, wanted (..., {self.config.data_dim})")
        return self.encoder(x)

    def generative(self, z: Tensor) -> Tensor:
        """The decoder's output f(z), which with the likelihood is p(x|z): (..., m) -> (..., D)."""
        if z.dim() == 0 or z.shape[-1] != self.config.latent_dim:
            raise ValueError(f"z: got shape {tuple(z.shape)}, wanted (..., {self.config.latent_dim})")
        return self.decoder(z)

    def loss(self, x: Tensor, posterior: DiagonalGaussian, z: Tensor, f: Tensor) -> VAEOutput:
        """The negative ELBO of x, given q(z|x), a sample z of it and f(z)."""
        kl_per_dimension = self.prior.kl(posterior)
        kl = kl_per_dimension.sum(-1)
        reconstruction = -self.likelihood.log_prob(x, f)
        loss = (reconstruction + self.kl_weight * kl).mean()
        return VAEOutput(loss, reconstruction, kl, kl_per_dimension, z, *posterior, f)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> VAEOutput:
        """One reparametrised sample of the negative ELBO and all that goes into it."""
        posterior = self.inference(x)
        z = posterior.sample(generator=generator)
        return self.loss(x, posterior, z, self.generative(z))

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """The mean of q(z|x): (..., D) -> (..., m)."""
        return self.inference(x).mean

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """The mean of p(x|z): (..., m) -> (..., D)."""
        return self.likelihood.mean(self.generative(z))

    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of p(x|z) at the mean of q(z|x): (..., D) -> (..., D)."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def sample(self, num_samples: int, generator: torch.Generator | None = None, noise: bool = False) -> Tensor:
        """Data (num_samples, D) from latents of the prior: the mean of p(x|z), or with ``noise`` a sample of it."""
        weight = next(self.parameters())
        z = self.prior.sample(num_samples, generator, dtype=weight.dtype, device=weight.device)
        f = self.generative(z)
        return self.likelihood.sample(f, generator) if noise else self.likelihood.mean(f)

    @torch.no_grad()
    def importance_sample(
        self, x: Tensor, num_samples: int, generator: torch.Generator | None = None
    ) -> ImportanceSamples:
        """``num_samples`` latents for each datum, from q(z|x), with their importance weights."""
        posterior = self.inference(x)
        z = posterior.sample(num_samples, generator)
        f = self.generative(z)
        log_weights = self.likelihood.log_prob(x, f) + self.prior.log_prob(z) - posterior.log_prob(z)
        return ImportanceSamples(z, f, log_weights)

    @torch.no_grad()
    def log_likelihood(
        self, x: Tensor, num_importance_samples: int = 1000, generator: torch.Generator | None = None
    ) -> Tensor:
        """``log 1/S sum_s p(x, z_s) / q(z_s|x)``, z_s ~ q(z|x), of each datum: (..., D) -> (...), in nats.

        A lower bound of ``log p(x)`` in expectation that tightens with S (Burda et al., ICLR 2016, equation 8).
        """
        check_positive("num_importance_samples", num_importance_samples)
        rows = max(1, x.numel() // max(1, self.config.data_dim))
        at_once = max(1, _ROWS // rows)
        total: Tensor | None = None
        for done in range(0, num_importance_samples, at_once):
            part = self.importance_sample(x, min(at_once, num_importance_samples - done), generator)
            part_sum = part.log_weights.logsumexp(0)
            total = part_sum if total is None else torch.logaddexp(total, part_sum)
        assert total is not None
        return total - math.log(num_importance_samples)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write ``model.safetensors`` and ``config.json`` into ``directory``, each file whole or not at all.

        Raises:
            ImportError: safetensors is not installed; says how to install it.
        """
        safetensors = require("safetensors.torch", "train")
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_atomically(Path(directory) / "model.safetensors", safetensors.save(state))
        write_atomically(Path(directory) / "config.json", json.dumps(self.config.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> VAE:
        """The model that :meth:`save_pretrained` wrote, on the CPU, in its dtypes and in training mode.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: unknown field in the configuration.
            RuntimeError: the tensors do not fit the configuration.
            ImportError: safetensors is not installed; says how to install it.
        """
        safetensors = require("safetensors.torch", "train")
        paths = [Path(directory) / name for name in ("config.json", "model.safetensors")]
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"directory: no {path.name} in {os.fspath(directory)!r}, wanted a saved model")
        model = cls(VAEConfig.from_dict(json.loads(paths[0].read_text())))
        state = safetensors.load(paths[1].read_bytes())
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            if name in state:  # else load_state_dict names it
                tensor.data = tensor.data.to(state[name].dtype)
        model.load_state_dict(state)
        return model
