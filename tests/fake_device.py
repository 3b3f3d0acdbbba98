"""A device that nobody here has: tensors that say they lie on MPS, whose values are kept on the CPU.

Like Apple's GPUs it has no float64, and like them it is one that the extension has no kernels for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

KIND = "unknown"

_setup_privateuseone_for_python_backend(KIND)


class Fake(Tensor):
    """What :class:`FakeDevice` makes of tensors there."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Fake:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return Tensor._make_wrapper_subclass(cls, held.shape, device=torch.device(KIND, 0), **layout)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"Fake({self.held!r})"


class FakeDevice(TorchDispatchMode):
    """Inside, tensors can be made on and moved to device "mps"."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    given: list[Tensor] = []
    tree_map_only(Fake, given.append, (args, kwargs))
    device = kwargs.get("device")
    there = bool(given) if device is None else torch.device(device).type == KIND
    held_args, held_kwargs = tree_map_only(Fake, lambda t: t.held, (args, kwargs))
    if device is not None and there:
        held_kwargs["device"] = torch.device("cpu")
    result = function(*held_args, **held_kwargs)
    if function is torch.ops.aten.copy_.default:
        there = isinstance(args[0], Fake)
    by_held = {id(t.held): t for t in given}

    def placed(t: Tensor) -> Tensor:
        if id(t) in by_held:  # of an operation in place
            return by_held[id(t)]
        if t.dtype == torch.float64:
            raise TypeError(f"Cannot convert a {KIND} Tensor to float64 dtype, which the framework does not support")
        return Fake(t)

    return tree_map_only(Tensor, placed, result) if there else result
