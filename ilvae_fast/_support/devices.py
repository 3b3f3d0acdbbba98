"""Devices without float64, such as Apple's GPUs: what needs it is computed on the CPU."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def _has_float64(kind: str) -> bool:
    if kind in ("cpu", "cuda", "meta"):
        return True
    try:
        torch.zeros(1, dtype=torch.float64, device=kind)
    except (TypeError, RuntimeError):
        return False
    return True


def has_float64(device: torch.device) -> bool:
    """Return whether tensors on the device can be float64."""
    return _has_float64(device.type)


def with_float64(t: Tensor) -> Tensor:
    """Return t where it can become float64: as it is, or on the CPU. Its dtype is as it was."""
    return t if has_float64(t.device) else t.cpu()
