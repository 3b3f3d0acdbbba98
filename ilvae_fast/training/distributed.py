"""FSDP2 for models too wide for one device."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from ..decoder import BrenierDecoder

_METHODS = {
    "model": (
        "inference",
        "generative",
        "encode",
        "decode",
        "reconstruct",
        "sample",
        "interpolate",
        "importance_sample",
        "log_likelihood",
    ),
    "decoder": ("jvp", "jacobian", "inverse_lipschitz_bound", "embedding_matrix"),
}


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """Shard the parameters of a :class:`ilvae_fast.vae.VAE` over all processes, in place (``fully_shard``).

    Each Brenier decoder and the encoder are gathered for their own computation, the rest with the model. The ELBO is
    computed inside ``forward``, which gathers by itself; the other entry points are registered to do so too.

    Args:
        options: of ``torch.distributed.fsdp.fully_shard``, such as ``mesh`` and ``mp_policy``.
    """
    parts = [module for module in model.modules() if isinstance(module, BrenierDecoder)]
    for part in parts:
        fully_shard(part, **options)
        _register(part, "decoder")
    encoder = getattr(model, "encoder", None)
    if encoder is not None:
        fully_shard(encoder, **options)
    fully_shard(model, **options)
    _register(model, "model")
    return model


def _register(module: nn.Module, kind: str) -> None:
    for name in _METHODS[kind]:
        if hasattr(module, name):
            register_fsdp_forward_method(module, name)
