"""FSDP2 for models too wide for one device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from ..decoder import BrenierDecoder
from ..vae import AutoregressiveDecoder

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
    "decoder": ("jvp", "jacobian", "inverse_lipschitz_bound", "embedding_matrix", "generate"),
}


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """Shard the parameters of a :class:`ilvae_fast.vae.VAE` over all processes, in place (``fully_shard``).

    Each Brenier decoder and the encoder are gathered for their own computation, the rest with the model. The ELBO is
    computed inside ``forward``, which gathers by itself; the other entry points are registered to do so too.

    Args:
        options: of ``torch.distributed.fsdp.fully_shard``, such as ``mesh`` and ``mp_policy``.
    """
    parts = [module for module in model.modules() if isinstance(module, BrenierDecoder | AutoregressiveDecoder)]
    for part in reversed(parts):  # a decoder of sequences comes before its head
        fully_shard(part, **options)
        _register(part, "decoder")
    encoder = getattr(model, "encoder", None)
    if encoder is not None:
        fully_shard(encoder, **options)
    fully_shard(model, **options)
    _register(model, "model")
    return model


def _register(module: nn.Module, kind: str) -> None:
    """Let methods gather the parameters as ``forward`` does; called from one another or from ``forward`` they find
    them gathered, and gathering twice would scatter them too early."""
    depth = [0]

    def enter(*_: Any) -> None:
        depth[0] += 1

    def leave(*_: Any) -> None:
        depth[0] -= 1

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)
    for name in _METHODS[kind]:
        if not hasattr(module, name):
            continue
        inner = getattr(module, name)
        register_fsdp_forward_method(module, name)
        setattr(module, name, _outermost(inner, getattr(module, name), depth))


def _outermost(inner: Callable[..., Any], gathering: Callable[..., Any], depth: list[int]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def method(*args: Any, **kwargs: Any) -> Any:
        if depth[0] > 0:
            return inner(*args, **kwargs)
        depth[0] += 1
        try:
            return gathering(*args, **kwargs)
        finally:
            depth[0] -= 1

    return method
