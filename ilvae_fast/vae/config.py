"""Configurations of the models: plain data that JSON can hold, checked when made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .._errors import unknown_name
from ..decoder import EMBEDDINGS
from ..functional import check_inverse_lipschitz
from ..layers import check_positive
from .decoders import DECODERS
from .likelihoods import LIKELIHOODS

# The published models, as what sets them apart.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    # Kingma & Welling, ICLR 2014
    "vae": {"decoder": "mlp"},
    # Wang, Blei & Cunningham, NeurIPS 2021: an injective decoder, no bound on how nearly it collapses
    "lidvae": {"decoder": "brenier", "inverse_lipschitz": (0.0, 0.0)},
    # Kinoshita et al., ICML 2023
    "il-lidvae": {"decoder": "brenier", "inverse_lipschitz": (1.0, 1.0)},
}


def _tuples(value: Any) -> Any:
    """Lists, which JSON makes of tuples, back to tuples."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def _check_widths(argument: str, value: Any) -> None:
    if not isinstance(value, tuple):
        raise TypeError(f"{argument}: got {type(value).__name__} {value!r}, wanted a sequence of widths")
    for k, width in enumerate(value):
        if isinstance(width, tuple):
            _check_widths(f"{argument}[{k}]", width)
        else:
            check_positive(f"{argument}[{k}]", width)


@dataclass(frozen=True)
class VAEConfig:
    """All that a :class:`VAE` is built from.

    Args:
        data_dim: D, the values of one datum.
        latent_dim: m; at most D with a Brenier decoder.
        decoder: a key of ``DECODERS``: ``"mlp"`` or ``"brenier"``.
        inverse_lipschitz: L1 and L2 of a Brenier decoder, a pair or one value for both, >= 0.
        embedding: ``"identity"``, ``"orthogonal"`` or ``"full_rank"`` (:class:`ilvae_fast.BrenierDecoder`).
        encoder_hidden: widths of the encoder's hidden layers.
        decoder_hidden: widths of the MLP's hidden layers, or a pair of those of the Brenier maps; None: (128, 128), or
            the default of :class:`ilvae_fast.BrenierDecoder`.
        decoder_options: further options of :class:`ilvae_fast.BrenierDecoder`, such as ``{"activation": "celu"}``.
        likelihood: a key of ``LIKELIHOODS``: ``"bernoulli"`` or ``"gaussian"``.
        likelihood_options: options of the likelihood, such as ``{"scale": 0.5}``.
        kl_weight: factor of the KL term, >= 0; 1 is the ELBO, another one beta-VAE (Higgins et al., ICLR 2017).

    Raises:
        ValueError, TypeError: naming the field; for an unknown name with the nearest one.
    """

    data_dim: int
    latent_dim: int
    decoder: str = "brenier"
    inverse_lipschitz: tuple[float, float] = (1.0, 1.0)
    embedding: str = "identity"
    encoder_hidden: tuple[int, ...] = (128, 128)
    decoder_hidden: tuple[int, ...] | tuple[tuple[int, ...], tuple[int, ...]] | None = None
    decoder_options: Mapping[str, Any] = field(default_factory=dict)
    likelihood: str = "gaussian"
    likelihood_options: Mapping[str, Any] = field(default_factory=dict)
    kl_weight: float = 1.0

    def __post_init__(self) -> None:
        check_positive("data_dim", self.data_dim)
        check_positive("latent_dim", self.latent_dim)
        for argument, known in (("decoder", DECODERS), ("embedding", EMBEDDINGS), ("likelihood", LIKELIHOODS)):
            if getattr(self, argument) not in known:
                raise unknown_name(argument, getattr(self, argument), known)

        pair = _tuples(self.inverse_lipschitz)
        pair = pair if isinstance(pair, tuple) else (pair, pair)
        if len(pair) != 2:
            raise ValueError(f"inverse_lipschitz: got {len(pair)} values, wanted one or a pair")
        object.__setattr__(self, "inverse_lipschitz", tuple(float(check_inverse_lipschitz(value)) for value in pair))

        object.__setattr__(self, "encoder_hidden", _tuples(self.encoder_hidden))
        _check_widths("encoder_hidden", self.encoder_hidden)
        if self.decoder_hidden is not None:
            object.__setattr__(self, "decoder_hidden", _tuples(self.decoder_hidden))
            _check_widths("decoder_hidden", self.decoder_hidden)
        for argument in ("decoder_options", "likelihood_options"):
            if not isinstance(getattr(self, argument), Mapping):
                raise TypeError(f"{argument}: got {getattr(self, argument)!r}, wanted a mapping of names to values")
        if isinstance(self.kl_weight, bool) or not isinstance(self.kl_weight, int | float):
            raise TypeError(f"kl_weight: got {type(self.kl_weight).__name__}, wanted a number >= 0")
        if not (math.isfinite(self.kl_weight) and self.kl_weight >= 0):
            raise ValueError(f"kl_weight: got {self.kl_weight!r}, wanted a finite number >= 0")

    @classmethod
    def named(cls, name: str, **fields: Any) -> VAEConfig:
        """The configuration of a published model, a key of ``CONFIGURATIONS``, with ``fields`` set besides or instead.

        Raises:
            ValueError: unknown name of a model or a field, with the nearest one.
        """
        if name not in CONFIGURATIONS:
            raise unknown_name("name", name, CONFIGURATIONS)
        return cls.from_dict({**CONFIGURATIONS[name], **fields})

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> VAEConfig:
        """The inverse of :meth:`to_dict`; fields that are absent take their defaults.

        Raises:
            ValueError: unknown name of a field, with the nearest one.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise unknown_name("field", name, known)
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return dict(value) if isinstance(value, Mapping) else value
