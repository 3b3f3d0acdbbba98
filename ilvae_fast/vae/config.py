"""Configurations of the models: plain data that JSON can hold, checked when made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .._errors import unknown_name
from .._options import build, check_names, check_number
from ..activations import Activation
from ..decoder import EMBEDDINGS
from ..functional import check_inverse_lipschitz
from ..layers import VERSION, check_positive
from ..nonneg import NonNegative
from .decoders import DECODERS
from .distributions import PRIORS
from .encoders import ENCODERS
from .likelihoods import LIKELIHOODS

# The published models, as what sets them apart: a decoder ..
_PLAIN: dict[str, Any] = {"decoder": "mlp"}  # Kingma & Welling, ICLR 2014
# Wang, Blei & Cunningham, NeurIPS 2021: an injective decoder, no bound on how nearly it collapses
_LID: dict[str, Any] = {"decoder": "brenier", "inverse_lipschitz": (0.0, 0.0)}
_IL_LID: dict[str, Any] = {"decoder": "brenier", "inverse_lipschitz": (1.0, 1.0)}  # Kinoshita et al., ICML 2023
# .. and a family: a mixture as prior, or sequences
_MIXTURE: dict[str, Any] = {"prior": "gaussian_mixture"}
_SEQUENCE: dict[str, Any] = {
    "encoder": "lstm",
    "encoder_hidden": (100,),
    "autoregressive_hidden": 100,
    "likelihood": "categorical",
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "vae": _PLAIN,
    "lidvae": _LID,
    "il-lidvae": _IL_LID,
    "gmvae": {**_PLAIN, **_MIXTURE},
    "lidmvae": {**_LID, **_MIXTURE},
    "il-lidmvae": {**_IL_LID, **_MIXTURE},
    "svae": {**_PLAIN, **_SEQUENCE, "decoder_hidden": ()},
    "lidsvae": {**_LID, **_SEQUENCE},
    "il-lidsvae": {**_IL_LID, **_SEQUENCE},
}


# decoder_options that were the defaults in version 1
FIRST_OPTIONS = {"activation": "softplus", "nonneg": "softplus", "initialization": "random"}


def _tuples(value: Any) -> Any:
    """Lists, which JSON makes of tuples, back to tuples."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


# decoder_options that may be objects; to JSON one is {"name": .., "parameter": ..}
_OBJECTS: dict[str, type[Activation | NonNegative]] = {
    **dict.fromkeys(("activation", "first_activation", "output_activation"), Activation),
    "nonneg": NonNegative,
}


def _objects(argument: str, kind: type[Activation | NonNegative], value: Any) -> Any:
    """Back from the form for JSON, each of a pair by itself; a bare name stays one."""
    if isinstance(value, tuple):
        return tuple(_objects(argument, kind, v) for v in value)
    if not isinstance(value, Mapping):
        return value
    if value.get("parameter") is not None:
        check_number(f"{argument}.parameter", value["parameter"])
    return build(argument, kind, value)


def _plain(value: Any) -> Any:
    """As JSON can hold it."""
    if isinstance(value, Activation | NonNegative):
        return dataclasses.asdict(value)
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _widths(argument: str, value: Any) -> tuple[Any, ...]:
    """Widths, or widths of several parts, as Python's own integers, which JSON can hold."""
    if not isinstance(value, tuple):
        raise TypeError(f"{argument}: got {type(value).__name__} {value!r}, wanted a sequence of widths")
    names = [f"{argument}[{k}]" for k in range(len(value))]
    return tuple(
        (_widths if isinstance(v, tuple) else check_positive)(name, v) for name, v in zip(names, value, strict=True)
    )


@dataclass(frozen=True)
class VAEConfig:
    """All that a :class:`VAE` is built from.

    Args:
        data_dim: D, the values of one datum; for sequences their length.
        latent_dim: m; at most D with a Brenier decoder.
        prior: a key of ``PRIORS``: ``"standard_normal"`` or ``"gaussian_mixture"``.
        prior_options: options of the prior, such as ``{"num_components": 10}`` or ``{"minimum_rate": 0.5}``.
        encoder: a key of ``ENCODERS``: ``"mlp"``, ``"conv"``, ``"lstm"``, or ``"user"`` for a module of your own.
        encoder_hidden: widths of the encoder's hidden layers; channels of its stages for ``"conv"``.
        data_shape: of an image, (height, width) or (channels, height, width), for ``"conv"``.
        decoder: a key of ``DECODERS``: ``"mlp"`` or ``"brenier"``.
        inverse_lipschitz: L1 and L2 of a Brenier decoder, a pair or one value for both, >= 0. Each is that of one map:
            ``--L`` and :func:`ilvae_fast.advise` speak of the certified product ``L = L1 L2 sigma_min(B)``, for which
            each is sqrt(L), unless the embedding B is ``"full_rank"``.
        embedding: ``"orthogonal"``, ``"full_rank"`` or ``"identity"`` (:class:`ilvae_fast.BrenierDecoder`).
        decoder_hidden: widths of the MLP's hidden layers, or a pair of those of the Brenier maps; None: (128, 128), or
            the default of :class:`ilvae_fast.BrenierDecoder`.
        decoder_options: further options of :class:`ilvae_fast.BrenierDecoder`, such as ``{"activation": "celu"}``.
            What takes a parameter may be an object, ``il.Activation("celu", 0.5)``, or
            ``{"name": "celu", "parameter": 0.5}``, which is how JSON holds it.
        autoregressive_hidden: width of the LSTM of an autoregressive decoder, for tokens; the decoder is its head, on
            [hidden state, z]. None: x depends on z alone.
        token_embedding: width of the embeddings of tokens in LSTMs.
        likelihood: a key of ``LIKELIHOODS``: ``"bernoulli"``, ``"continuous_bernoulli"``, ``"gaussian"``,
            ``"categorical"``, or for counts ``"poisson"`` or ``"negative_binomial"``.
        likelihood_options: options of the likelihood, such as ``{"scale": 0.5}``.
        kl_weight: factor of the KL term, >= 0; 1 is the ELBO, another one beta-VAE (Higgins et al., ICLR 2017).
        free_bits: nats of KL in each latent coordinate, averaged over the batch (of one process), that cost as much as
            fewer would (Kingma et al., NeurIPS 2016); 0 is the ELBO.

    Raises:
        ValueError, TypeError: naming the field; for an unknown name with the nearest one.
    """

    data_dim: int
    latent_dim: int
    prior: str = "standard_normal"
    prior_options: Mapping[str, Any] = field(default_factory=dict)
    encoder: str = "mlp"
    encoder_hidden: tuple[int, ...] = (128, 128)
    data_shape: tuple[int, ...] | None = None
    decoder: str = "brenier"
    inverse_lipschitz: tuple[float, float] = (1.0, 1.0)
    embedding: str = "orthogonal"
    decoder_hidden: tuple[int, ...] | tuple[tuple[int, ...], tuple[int, ...]] | None = None
    decoder_options: Mapping[str, Any] = field(default_factory=dict)
    autoregressive_hidden: int | None = None
    token_embedding: int = 100
    likelihood: str = "gaussian"
    likelihood_options: Mapping[str, Any] = field(default_factory=dict)
    kl_weight: float = 1.0
    free_bits: float = 0.0

    def __post_init__(self) -> None:
        for argument in ("data_dim", "latent_dim", "token_embedding", "autoregressive_hidden"):
            if argument != "autoregressive_hidden" or self.autoregressive_hidden is not None:
                object.__setattr__(self, argument, check_positive(argument, getattr(self, argument)))
        parts: dict[str, Iterable[str]] = {
            "prior": PRIORS,
            "encoder": ENCODERS,
            "decoder": DECODERS,
            "embedding": EMBEDDINGS,
            "likelihood": LIKELIHOODS,
        }
        for argument, known in parts.items():
            if getattr(self, argument) not in known:
                raise unknown_name(argument, getattr(self, argument), known)
        if self.autoregressive_hidden is not None and self.likelihood != "categorical":
            raise ValueError(f"likelihood: got {self.likelihood!r}, wanted 'categorical' with autoregressive_hidden")

        pair = _tuples(self.inverse_lipschitz)
        pair = pair if isinstance(pair, tuple) else (pair, pair)
        if len(pair) != 2:
            raise ValueError(f"inverse_lipschitz: got {len(pair)} values, wanted one or a pair")
        object.__setattr__(self, "inverse_lipschitz", tuple(float(check_inverse_lipschitz(value)) for value in pair))

        for argument in ("encoder_hidden", "decoder_hidden", "data_shape"):
            if getattr(self, argument) is not None:
                object.__setattr__(self, argument, _widths(argument, _tuples(getattr(self, argument))))
        if self.data_shape is not None and math.prod(self.data_shape) != self.data_dim:
            raise ValueError(f"data_shape: got {self.data_shape}, wanted data_dim, {self.data_dim}, values in all")
        for argument in ("prior_options", "decoder_options", "likelihood_options"):
            if not isinstance(getattr(self, argument), Mapping):
                raise TypeError(f"{argument}: got {getattr(self, argument)!r}, wanted a mapping of names to values")
        options = {name: _tuples(value) for name, value in self.decoder_options.items()}
        for name, kind in _OBJECTS.items():
            if name in options:
                options[name] = _objects(f"decoder_options.{name}", kind, options[name])
        object.__setattr__(self, "decoder_options", options)
        for argument in ("kl_weight", "free_bits"):
            check_number(argument, getattr(self, argument))

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

        What an earlier version wrote, all fields and no version, keeps the defaults of then.

        Raises:
            ValueError: unknown name of a field, with the nearest one.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        check_names("field", fields, [*names, "version"])
        given = {name: value for name, value in fields.items() if name != "version"}
        if "version" not in fields and set(names) <= set(given) and given["decoder"] == "brenier":
            given["decoder_options"] = {**FIRST_OPTIONS, **given["decoder_options"]}
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them, and the version that wrote them, for defaults may change."""
        fields = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {**fields, "version": VERSION}
