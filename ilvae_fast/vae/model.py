"""The variational autoencoder: one ELBO over interchangeable parts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._support.checks import check_positive, check_tensor
from .._support.extras import require
from .._support.files import read_json, write_atomically
from .._support.options import build
from ..distributions import LIKELIHOODS, PRIORS, Likelihood, Posterior, Prior
from ..layers import BrenierDecoder
from ..layers.constant import accept_constants
from .config import DECODERS, ENCODERS, VAEConfig
from .sequences import AutoregressiveDecoder

_TIES = "tied"  # in the metadata of a saved model
_ROWS = 2**15  # latents decoded at a time where only a reduction over them is kept
_VALUES = 2**26  # outputs of the decoder at a time, at most


class VAEOutput(NamedTuple):
    """What one pass over a batch gives; all terms in nats.

    loss (): mean over the data of ``reconstruction + kl_weight * kl``, with free bits if there are any.
    reconstruction (...): ``-E_q(z|x) log p(x|z)``, of the samples z. kl (...): the KL term; kl_per_dimension (..., m)
    its parts, to which a mixture adds the KL of the assignment. posterior: q(z|x). z: its sample (..., m), for a
    mixture one of each component (K, ..., m); f (..., P) or (K, ..., P): the decoder's output at z.
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor
    kl_per_dimension: Tensor
    posterior: Posterior
    z: Tensor
    f: Tensor

    @property
    def mean(self) -> Tensor:
        """Of q(z|x): (..., m)."""
        return self.posterior.mean

    @property
    def log_variance(self) -> Tensor:
        """Of q(z|x): (..., m)."""
        return self.posterior.log_variance


class ImportanceSamples(NamedTuple):
    """Samples of q(z|x) with what turns them into samples of p(z|x).

    z (S, ..., m); f (S, ..., P): the decoder's output; log_weights (S, ...): ``log p(x, z) - log q(z|x)``.
    """

    z: Tensor
    f: Tensor
    log_weights: Tensor


class ImportanceWeighted(nn.Module):
    """Any model p(x|z) p(z) with an approximate posterior q(z|x), and the importance weights between the two."""

    prior: Prior
    likelihood: Likelihood

    def initialize(self, x: Tensor) -> None:
        """Start from training data x (N, D), before the first step: :meth:`ilvae_fast.BrenierDecoder.initialize`.

        A decoder of another kind stays as it is. An autoregressive one passes its tokens on to its head.
        """
        decoder = self.decoder.head if isinstance(self.decoder, AutoregressiveDecoder) else self.decoder
        if isinstance(decoder, BrenierDecoder):
            decoder.initialize(x, self.likelihood)

    def inference(self, x: Tensor) -> Posterior:
        """The approximate posterior q(z|x)."""
        raise NotImplementedError

    def generative(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """The decoder's output f(z), which with the likelihood is p(x|z): (..., m) -> (..., P)."""
        raise NotImplementedError

    def _flat(self, x: Tensor) -> Tensor:
        """x as the likelihood takes it: (..., D)."""
        return x

    @torch.no_grad()
    def importance_sample(
        self, x: Tensor, num_samples: int, generator: torch.Generator | None = None
    ) -> ImportanceSamples:
        """``num_samples`` latents for each datum, from q(z|x), with their importance weights."""
        posterior = self.inference(x)
        z, log_q = posterior.sample_with_log_prob(num_samples, generator)
        f = self.generative(z, x)
        log_weights = self.likelihood.log_prob(self._flat(x), f) + self.prior.log_prob(z) - log_q
        return ImportanceSamples(z, f, log_weights)

    @torch.no_grad()
    def log_likelihood(
        self, x: Tensor, num_importance_samples: int = 1000, generator: torch.Generator | None = None
    ) -> Tensor:
        """``log 1/S sum_s p(x, z_s) / q(z_s|x)``, z_s ~ q(z|x), of each datum: (..., D) -> (...), in nats.

        A lower bound of ``log p(x)`` in expectation that tightens with S (Burda et al., ICLR 2016, equation 8).
        """
        num_importance_samples = check_positive("num_importance_samples", num_importance_samples)
        check_tensor("x", x)
        flat = self._flat(x)
        rows = max(1, flat.shape[:-1].numel())
        values = max(1, flat.numel() // rows * self.likelihood.parameters_per_value)
        at_once = max(1, min(_ROWS, _VALUES // values) // rows)
        total: Tensor | None = None
        for done in range(0, num_importance_samples, at_once):
            part = self.importance_sample(x, min(at_once, num_importance_samples - done), generator)
            part_sum = part.log_weights.logsumexp(0)
            total = part_sum if total is None else torch.logaddexp(total, part_sum)
        assert total is not None
        return total - math.log(num_importance_samples)


class VAE(ImportanceWeighted):
    """A variational autoencoder (Kingma & Welling, ICLR 2014) with the parts that ``config`` names.

    Args:
        config: the parts.
        encoder: a module of your own, x (..., D) -> (..., P) with the P parameters of the approximate posterior that
            the prior asks for (``model.prior.num_posterior_parameters``), or a posterior that it makes itself.

    Shapes: x (..., D), z (..., m), any leading shape. ``inference``, ``generative``, ``loss`` and ``forward`` are for
    training; ``encode``, ``decode``, ``reconstruct``, ``sample``, ``interpolate`` and ``log_likelihood`` keep no graph.
    Under autocast encoder and decoder run in the low precision, likelihood and KL in float32.

    State: prior, likelihood, encoder, decoder, kl_weight (1,), a buffer to be filled in place by a schedule.

    Raises:
        ValueError, TypeError: naming the field of the configuration.
    """

    kl_weight: Tensor

    def __init__(self, config: VAEConfig, encoder: nn.Module | None = None) -> None:
        super().__init__()
        if encoder is not None:
            config = replace(config, encoder="user")
        self.config = config
        self.prior = build("prior_options", PRIORS[config.prior], config.prior_options, config.latent_dim)
        self.likelihood = build("likelihood_options", LIKELIHOODS[config.likelihood], config.likelihood_options)
        if encoder is None:
            encoder = ENCODERS[config.encoder](config, self.prior.num_posterior_parameters)
        self.encoder = encoder
        decoder, values = DECODERS[config.decoder], self.likelihood.parameters_per_value
        self.decoder: nn.Module
        if config.autoregressive_hidden is None:
            self.decoder = decoder(config, config.latent_dim, config.data_dim * values)
        else:
            hidden = config.autoregressive_hidden
            head = decoder(config, hidden + config.latent_dim, values)
            self.decoder = AutoregressiveDecoder(head, config.latent_dim, values, config.token_embedding, hidden)
        self.register_buffer("kl_weight", torch.full((1,), config.kl_weight))

    def inference(self, x: Tensor) -> Posterior:
        """The approximate posterior q(z|x)."""
        check_tensor("x", x)
        if x.dim() == 0 or x.shape[-1] != self.config.data_dim:
            raise ValueError(f"x: got shape {tuple(x.shape)}, wanted (..., {self.config.data_dim})")
        encoded = self.encoder(x)
        return (
            self.prior.posterior(_wide(encoded)) if isinstance(encoded, Tensor) else encoded._make(map(_wide, encoded))
        )

    def generative(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """The decoder's output f(z), which with the likelihood is p(x|z): (..., m) -> (..., P).

        x: the sequences (..., T) whose tokens an autoregressive decoder reads; other decoders do not ask for it.
        """
        check_tensor("z", z)
        if z.dim() == 0 or z.shape[-1] != self.config.latent_dim:
            raise ValueError(f"z: got shape {tuple(z.shape)}, wanted (..., {self.config.latent_dim})")
        if not isinstance(self.decoder, AutoregressiveDecoder):
            return _wide(self.decoder(z))
        if x is None:
            raise ValueError("x: got None, wanted the sequences that an autoregressive decoder reads")
        return _wide(self.decoder(z, x))

    def loss(self, x: Tensor, posterior: Posterior, z: Tensor, f: Tensor, weights: Tensor | None = None) -> VAEOutput:
        """The negative ELBO of x, given q(z|x), a sample z of it and f(z); with weights, of each of its components."""
        if self.training:
            self.likelihood.adapt(x, f.detach(), weights)
        reconstruction = -self.likelihood.log_prob(x, f)
        if weights is not None:
            reconstruction = (weights * reconstruction).sum(0)
        kl_per_dimension, assignment = self.prior.kl(posterior), self.prior.assignment_kl(posterior)
        kl = kl_per_dimension.sum(-1) if assignment is None else kl_per_dimension.sum(-1) + assignment
        if self.config.free_bits == 0:
            loss = (reconstruction + self.kl_weight * kl).mean()
        else:
            charged = (
                kl_per_dimension.reshape(-1, self.config.latent_dim).mean(0).clamp(min=self.config.free_bits).sum()
            )
            if assignment is not None:
                charged = charged + assignment.mean()
            loss = reconstruction.mean() + self.kl_weight.squeeze(0) * charged
        return VAEOutput(loss, reconstruction, kl, kl_per_dimension, posterior, z, f)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> VAEOutput:
        """One reparametrised sample of the negative ELBO and all that goes into it."""
        posterior = self.inference(x)
        z, weights = posterior.sample_components(generator)
        return self.loss(x, posterior, z, self.generative(z, x), weights)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """The mean of q(z|x): (..., D) -> (..., m)."""
        return self.inference(x).mean

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """The mean of p(x|z), for sequences the likeliest token after token: (..., m) -> (..., D)."""
        return self._data(z, None, noise=False)

    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of p(x|z) at the mean of q(z|x): (..., D) -> (..., D)."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def sample(self, num_samples: int, generator: torch.Generator | None = None, noise: bool = False) -> Tensor:
        """Data (num_samples, D) from latents of the prior: as :meth:`decode`, or with ``noise`` samples of p(x|z)."""
        weight = next(self.decoder.parameters())
        z = self.prior.sample(num_samples, generator, dtype=weight.dtype, device=weight.device)
        return self._data(z, generator, noise)

    @torch.no_grad()
    def interpolate(self, start: Tensor, end: Tensor, num_steps: int = 8) -> Tensor:
        """Data decoded on the line between the latents of start and end (..., D): (num_steps, ..., D), ends
        included."""
        num_steps = check_positive("num_steps", num_steps)
        if num_steps < 2:
            raise ValueError(f"num_steps: got {num_steps}, wanted at least 2, the ends")
        first, last = self.encode(start), self.encode(end)
        steps = torch.linspace(0, 1, num_steps, dtype=first.dtype, device=first.device)
        return self.decode(torch.lerp(first, last, steps.view(-1, *[1] * first.dim())))

    def _data(self, z: Tensor, generator: torch.Generator | None, noise: bool) -> Tensor:
        if isinstance(self.decoder, AutoregressiveDecoder):
            return self.decoder.generate(z, self.config.data_dim, generator, noise)
        f = self.generative(z)
        return self.likelihood.sample(f, generator) if noise else self.likelihood.mean(f)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write ``model.safetensors`` and ``config.json`` into ``directory``, each file whole or not at all.

        Tied tensors, of an encoder of your own, are written once, with the names that share them.

        Raises:
            ImportError: safetensors is not installed; says how to install it.
        """
        safetensors = require("safetensors.torch", "train")
        config = json.dumps(self.config.to_dict(), indent=2) + "\n"  # first: what has no such form leaves no file
        state, ties = _untied(self.state_dict())
        write_atomically(
            Path(directory) / "model.safetensors", safetensors.save(state, {_TIES: json.dumps(ties)} if ties else None)
        )
        write_atomically(Path(directory) / "config.json", config)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        encoder: nn.Module | None = None,
        inverse_lipschitz: float | tuple[float, float] | None = None,
    ) -> VAE:
        """The model that :meth:`save_pretrained` wrote, on the CPU, in its dtypes and in training mode.

        Args:
            encoder: a module like the one that was saved, if that was the user's own.
            inverse_lipschitz: L1 and L2 for the Brenier decoder, as in :class:`VAEConfig`, instead of those it was
                saved with; the configuration has them too. None: those of the saved tensors, where a schedule may have
                moved them from those of the configuration.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a damaged file, or unknown field in the configuration; ``inverse_lipschitz`` for a model without
                a Brenier decoder.
            RuntimeError: the tensors do not fit the configuration.
            ImportError: safetensors is not installed; says how to install it.
        """
        safetensors = require("safetensors.torch", "train")
        paths = [Path(directory) / name for name in ("config.json", "model.safetensors")]
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"directory: no {path.name} in {os.fspath(directory)!r}, wanted a saved model")
        cure = "copy both files of the model anew, or save it again"
        fields = read_json(paths[0], cure)
        try:
            config = VAEConfig.from_dict(fields)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{paths[0]}: {error}") from error
        if inverse_lipschitz is not None:
            if config.decoder != "brenier":
                raise ValueError(
                    f"inverse_lipschitz: got {inverse_lipschitz}, wanted None for decoder={config.decoder!r}"
                )
            config = replace(config, inverse_lipschitz=inverse_lipschitz)  # type: ignore[arg-type]  # one value too
        content = paths[1].read_bytes()
        try:
            state, ties = safetensors.load(content), _ties(content)
        except Exception as error:  # safetensors' own, which is no ValueError
            found = f"is damaged, not in the form of safetensors ({error})" if content else "is empty"
            raise ValueError(f"{paths[1]}: {found}; {cure}") from error
        model = cls(config, encoder)
        for name, source in ties.items():
            if name not in state and source in state:
                state[name] = state[source]
                _tie(model, name, source)
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            if name in state:  # else load_state_dict names it
                tensor.data = tensor.data.to(state[name].dtype)
        accept_constants(model.decoder)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise RuntimeError(f"{paths[1]}: does not fit config.json; {' '.join(str(error).split())}") from error
        if inverse_lipschitz is not None:
            decoder = next(module for module in model.decoder.modules() if isinstance(module, BrenierDecoder))
            decoder.inverse_lipschitz = config.inverse_lipschitz
        return model


def _untied(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, on the CPU and in memory of its own; and by each name left out that of the same tensor."""
    kept: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, tensor in state.items():
        tensor = tensor.detach()
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() > 0 and place in seen:
            ties[name] = seen[place]
            continue
        seen[place] = name
        own = tensor.untyped_storage().nbytes() == tensor.nbytes
        kept[name] = (tensor if own else tensor.clone()).cpu().contiguous()
    return kept, ties


def _ties(content: bytes) -> dict[str, str]:
    """What :func:`_untied` left out of a file of safetensors, whose first eight bytes say how long its header is."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header.get("__metadata__", {}).get(_TIES, "{}"))


def _tie(model: nn.Module, name: str, source: str) -> None:
    """Let a tensor of the model be that of another name, if both are there and of one kind."""
    places: list[tuple[dict[str, Any], str] | None] = []
    for path in (name, source):
        owner, _, attribute = path.rpartition(".")
        module = dict(model.named_modules(remove_duplicate=False)).get(owner)
        kinds = () if module is None else (module._parameters, module._buffers)
        places.append(next(((kind, attribute) for kind in kinds if kind.get(attribute) is not None), None))
    here, there = places
    if here is not None and there is not None:
        here[0][here[1]] = there[0][there[1]]


def _wide(tensor: Tensor) -> Tensor:
    """Under autocast, in float32 at least: likelihood and KL are sums that a low precision would spoil."""
    if not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
