"""FSDP2 for models too wide for one device: what is sharded, how accelerate is told, and how it is whole again."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from .._support.extras import require
from ..layers import BrenierDecoder, BrenierMap
from ..layers.constant import accept_constants
from ..vae import VAE, AutoregressiveDecoder

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
    "decoder": ("jvp", "jacobian", "cotangent_bound", "inverse_lipschitz_bound", "embedding_matrix", "generate"),
    "map": ("potential", "potential_and_map", "jvp", "jacobian", "logabsdet", "inverse", "nonneg_weights"),
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
    encoder = getattr(model, "encoder", None)
    if encoder is not None:
        fully_shard(encoder, **options)
    fully_shard(model, **options)
    return gather_in_methods(model)


def gather_in_methods(module: nn.Module) -> nn.Module:
    """Let methods of sharded maps, decoders and VAEs gather their parameters, as ``forward`` does. Call it once.

    ``fully_shard`` looks after ``forward`` alone. After ``fully_shard(decoder)`` by hand this makes
    ``decoder.jvp(z, v)``, ``layer.potential(x)`` and the others work; :func:`shard` does it by itself.

    Args:
        module: what was sharded, or whatever holds it.

    Returns:
        The module.
    """
    for part in list(module.modules()):
        if not isinstance(part, FSDPModule):
            continue
        if isinstance(part, BrenierMap):
            _register(part, "map")
        elif isinstance(part, BrenierDecoder | AutoregressiveDecoder):
            _register(part, "decoder")
        elif isinstance(part, VAE):
            _register(part, "model")
    return module


def gathered(tree: Any) -> Any:
    """``tree``, tensors in dicts and lists, with every sharded one whole and on the CPU.

    All processes take part, each of which gets all of it; a device holds one tensor of it at a time.
    """
    return tree_map_only(DTensor, lambda tensor: tensor.full_tensor().cpu(), tree)


def whole(model: VAE, device: torch.device) -> VAE:
    """``model``, or in each process a whole copy of a sharded one, without gradients; all processes take part."""
    if not isinstance(model, FSDPModule):
        return model
    copy = VAE(model.config)
    accept_constants(copy)
    copy.load_state_dict(gathered(model.state_dict()))
    return copy.to(device)


def check_fsdp_version(version: str | int | None = None) -> None:
    """Refuse FSDP1: ``version``, or what the environment asks for, where accelerate may fail before it is asked.

    Raises:
        ValueError: another version than 2.
    """
    if version is None:
        version = os.environ.get("FSDP_VERSION", "2") if _asked_for() else "2"
    if int(version) != 2:
        raise ValueError(
            f"fsdp_version: got {version}, wanted 2 (accelerate launch --use_fsdp --fsdp_version 2, or FSDP_VERSION=2)"
        )


def shard_options(accelerator: Any) -> dict[str, Any] | None:
    """How ``accelerator`` is to shard models, as options of :func:`shard`; None: it is not.

    accelerate leaves FSDP out on the CPU, without a word; here it is what was asked for.

    Raises:
        ValueError: naming the option of accelerate's FSDP plug-in.
    """
    accelerate, state = require("accelerate", "train"), accelerator.state
    kinds = require("accelerate.utils", "train").DistributedType
    if state.distributed_type == kinds.MULTI_CPU and _asked_for():
        state.fsdp_plugin = accelerate.FullyShardedDataParallelPlugin()
        state.distributed_type = accelerate.PartialState().distributed_type = kinds.FSDP
    if state.distributed_type != kinds.FSDP:
        return None
    plugin = state.fsdp_plugin
    check_fsdp_version(plugin.fsdp_version)
    if plugin.activation_checkpointing:
        raise ValueError("fsdp_activation_checkpointing: got true, wanted false: it wraps layers that no model has")
    return {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "reshard_after_forward": None if plugin.reshard_after_forward else False,  # None: all but the root
        "offload_policy": plugin.cpu_offload,
    }


def _asked_for() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


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
