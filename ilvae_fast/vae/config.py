"""Configurations of the models: plain data that JSON can hold, checked when made, and the parts that they name.

An encoder is a module ``(..., D) -> (..., P)``, with the P parameters of the approximate posterior that the prior asks
for (``Prior.num_posterior_parameters``). One that makes its own posterior may return that instead.

A decoder is a module ``(..., m) -> (..., P)``, P the parameters of ``p(x|z)``. One with ``jacobian(z)`` and
``inverse_lipschitz_bound()``, as :class:`ilvae_fast.BrenierDecoder`, gives the metrics its Jacobians and its certified
constant. For sequences it is the head of :class:`~.sequences.AutoregressiveDecoder`.

To add one, write a builder that reads a configuration, and put it into ``ENCODERS`` or ``DECODERS``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .._support.checks import check_number, check_positive
from .._support.errors import unknown_name
from .._support.options import build, check_names
from ..distributions import LIKELIHOODS, PRIORS
from ..layers import BrenierDecoder, NonNegative
from ..layers.brenier_decoder import EMBEDDINGS, MAP_OPTIONS
from ..layers.brenier_map import VERSION
from ..operators.activations import Activation
from ..operators.operands import check_inverse_lipschitz
from .encoders import ConvolutionalEncoder, LSTMEncoder, mlp

# The published models, by what sets them apart: a decoder, and a family below
_PLAIN: dict[str, Any] = {"decoder": "mlp"}  # Kingma & Welling, ICLR 2014
# Wang, Blei & Cunningham, NeurIPS 2021: an injective decoder, no bound on how nearly it collapses
_LID: dict[str, Any] = {"decoder": "brenier", "inverse_lipschitz": (0.0, 0.0)}
_IL_LID: dict[str, Any] = {"decoder": "brenier", "inverse_lipschitz": (1.0, 1.0)}  # Kinoshita et al., ICML 2023
# a mixture as prior, or sequences
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


# The defaults of decoder_options in version 1
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


def _mlp_encoder(config: VAEConfig, out_features: int) -> nn.Module:
    if config.likelihood == "categorical":
        raise ValueError("encoder: got 'mlp' with a categorical likelihood, wanted 'lstm' or a module of your own")
    return mlp(config.data_dim, config.encoder_hidden, out_features)


def _conv(config: VAEConfig, out_features: int) -> nn.Module:
    if config.data_shape is None:
        raise ValueError("data_shape: got None, wanted the shape of an image for encoder='conv'")
    return ConvolutionalEncoder(config.data_shape, config.encoder_hidden, out_features)


def _lstm(config: VAEConfig, out_features: int) -> nn.Module:
    if len(config.encoder_hidden) != 1:
        raise ValueError(f"encoder_hidden: got {config.encoder_hidden}, wanted one width for encoder='lstm'")
    if "num_categories" not in config.likelihood_options:
        raise ValueError(f"encoder: got 'lstm' with likelihood {config.likelihood!r}, wanted 'categorical'")
    tokens = check_positive("num_categories", config.likelihood_options["num_categories"])
    return LSTMEncoder(tokens, config.token_embedding, config.encoder_hidden[0], out_features)


def _user(config: VAEConfig, out_features: int) -> nn.Module:
    raise ValueError(f"encoder: got 'user', wanted the module too: VAE(config, encoder=module), {out_features} outputs")


ENCODERS: dict[str, Callable[[VAEConfig, int], nn.Module]] = {
    "mlp": _mlp_encoder,
    "conv": _conv,
    "lstm": _lstm,
    "user": _user,
}


def _mlp_decoder(config: VAEConfig, in_features: int, out_features: int) -> nn.Module:
    hidden: Any = (128, 128) if config.decoder_hidden is None else config.decoder_hidden
    if any(not isinstance(width, int) for width in hidden):
        raise ValueError(f"decoder_hidden: got {hidden!r}, wanted a sequence of widths for decoder='mlp'")
    if config.decoder_options:
        raise ValueError(f"decoder_options: got {dict(config.decoder_options)!r}, wanted none for decoder='mlp'")
    return mlp(in_features, hidden, out_features)


def _brenier(config: VAEConfig, in_features: int, out_features: int) -> nn.Module:
    hidden: Any = ((128, 128), (512, 512)) if config.decoder_hidden is None else config.decoder_hidden
    if len(hidden) != 2 or any(isinstance(widths, int) for widths in hidden):
        raise ValueError(f"decoder_hidden: got {hidden!r}, wanted the widths of both maps for decoder='brenier'")
    if config.autoregressive_hidden is not None and in_features > out_features:
        raise ValueError(
            f"autoregressive_hidden: got {config.autoregressive_hidden} with latent_dim {config.latent_dim}, wanted "
            f"at most num_categories, {out_features}, in all: the head maps [hidden state, z] injectively to logits"
        )
    check_names("decoder_options", config.decoder_options, MAP_OPTIONS)
    return BrenierDecoder(
        in_features,
        out_features,
        hidden,
        inverse_lipschitz=config.inverse_lipschitz,
        embedding=config.embedding,
        **config.decoder_options,
    )


DECODERS: dict[str, Callable[[VAEConfig, int, int], nn.Module]] = {"mlp": _mlp_decoder, "brenier": _brenier}


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
            ValueError, TypeError: no mapping; unknown name of a field, with the nearest one.
        """
        if not isinstance(fields, Mapping):
            raise TypeError(f"fields: got {type(fields).__name__}, wanted names with values")
        names = [f.name for f in dataclasses.fields(cls)]
        check_names("field", fields, [*names, "version"])
        given = {name: value for name, value in fields.items() if name != "version"}
        early = "version" not in fields and set(names) <= set(given) and given["decoder"] == "brenier"
        if early and isinstance(given["decoder_options"], Mapping):
            given["decoder_options"] = {**FIRST_OPTIONS, **given["decoder_options"]}
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them, and the version that wrote them, for defaults may change."""
        fields = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {**fields, "version": VERSION}
