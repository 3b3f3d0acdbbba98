"""Decoders by name, each built from a configuration. To add one, write a builder and put it into ``DECODERS``.

A decoder is a module ``(..., m) -> (..., P)``, P the parameters of ``p(x|z)``. One with ``jacobian(z)`` and
``inverse_lipschitz_bound()``, as :class:`ilvae_fast.BrenierDecoder`, gives the metrics its Jacobians and its certified
constant. For sequences it is the head of :class:`~.sequences.AutoregressiveDecoder`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from .._options import check_names
from ..decoder import MAP_OPTIONS, BrenierDecoder
from .encoders import mlp

if TYPE_CHECKING:
    from .config import VAEConfig


def _mlp(config: VAEConfig, in_features: int, out_features: int) -> nn.Module:
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


DECODERS: dict[str, Callable[[VAEConfig, int, int], nn.Module]] = {"mlp": _mlp, "brenier": _brenier}
