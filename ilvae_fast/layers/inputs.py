"""Checks of what a map is called with. They run in every call, before any work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._support.checks import check_tensor


def check_input(argument: str, value: Any, width: int | None, meaning: str, parameter: Tensor) -> None:
    """Accept a tensor (..., width) that fits the layer whose ``parameter`` is given.

    Args:
        argument: the name by which the caller knows ``value``.
        width: None accepts any.
        meaning: the name of the width.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    check_tensor(argument, value)
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested" if value.is_nested else f"a {value.layout}"
        raise TypeError(
            f"{argument}: got {kind} tensor, wanted a dense one: {argument}.to_dense(), or "
            f"{argument}.to_padded_tensor(0.0) of a nested one"
        )
    shape, dtype, wanted, device = value.shape, value.dtype, parameter.dtype, value.device
    if width is not None and (not shape or shape[-1] != width):
        raise ValueError(f"{argument}: got shape {tuple(shape)}, wanted (..., {width}), {meaning} values each")
    if device != parameter.device:
        raise ValueError(
            f"{argument}: got device {device}, wanted {parameter.device}, where the parameters are: move either "
            "with .to(device)"
        )
    if dtype != wanted and not (
        torch.is_autocast_enabled(device.type) and value.is_floating_point() and torch.float64 not in (dtype, wanted)
    ):
        raise ValueError(
            f"{argument}: got dtype {dtype}, wanted {wanted}, that of the parameters: {argument}.to({wanted})"
        )
    if wanted == torch.float16 and device.type == "cpu":
        raise ValueError(f"{argument}: got {dtype} on the CPU, wanted float32 or bfloat16; float16 is for GPUs")


def check_like(name: str, v: Any, argument: str, value: Tensor) -> None:
    """Accept v, such as a tangent at ``value``, which the caller knows as ``argument``.

    Raises:
        ValueError, TypeError: naming v as ``name``.
    """
    if not isinstance(v, Tensor):
        raise TypeError(f"{name}: got {type(v).__name__}, wanted a tensor")
    if v.shape != value.shape:
        raise ValueError(f"{name}: got shape {tuple(v.shape)}, wanted that of {argument}, {tuple(value.shape)}")
    if v.device != value.device:
        raise ValueError(f"{name}: got device {v.device}, wanted that of {argument}, {value.device}")
    if v.dtype != value.dtype and not torch.is_autocast_enabled(value.device.type):
        raise ValueError(f"{name}: got dtype {v.dtype}, wanted that of {argument}, {value.dtype}")
