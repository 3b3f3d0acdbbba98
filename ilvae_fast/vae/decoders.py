"""Decoders by name, each built from a configuration. To add one, write a builder and put it into ``DECODERS``.

A decoder is a module ``(..., m) -> (..., D)``. One with ``jacobian(z)`` and ``inverse_lipschitz_bound()``, as
:class:`ilvae_fast.BrenierDecoder`, gives the metrics its Jacobians and its certified constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from ..decoder import BrenierDecoder
from .encoders import mlp

if TYPE_CHECKING:
    from .config import VAEConfig


def _mlp(config: VAEConfig) -> nn.Module:
    hidden: Any = (128, 128) if config.decoder_hidden is None else config.decoder_hidden
    if any(not isinstance(width, int) for width in hidden):
        raise ValueError(f"decoder_hidden: got {hidden!r}, wanted a sequence of widths for decoder='mlp'")
    if config.decoder_options:
        raise ValueError(f"decoder_options: got {dict(config.decoder_options)!r}, wanted none for decoder='mlp'")
    return mlp(config.latent_dim, hidden, config.data_dim)


def _brenier(config: VAEConfig) -> nn.Module:
    hidden: Any = ((128, 128), (512, 512)) if config.decoder_hidden is None else config.decoder_hidden
    if len(hidden) != 2 or any(isinstance(widths, int) for widths in hidden):
        raise ValueError(f"decoder_hidden: got {hidden!r}, wanted the widths of both maps for decoder='brenier'")
    return BrenierDecoder(
        config.latent_dim,
        config.data_dim,
        hidden,
        inverse_lipschitz=config.inverse_lipschitz,
        embedding=config.embedding,
        **config.decoder_options,
    )


DECODERS: dict[str, Callable[[VAEConfig], nn.Module]] = {"mlp": _mlp, "brenier": _brenier}
