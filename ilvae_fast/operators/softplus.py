"""softplus, exact in float64 too: non-negative weights of raw ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.overrides import has_torch_function

from . import backend, native
from .transforms import transforms_active


def plain_softplus(raw: Tensor) -> Tensor:
    """Return softplus by PyTorch, exact in float64 too: exp(-40) < 2^-53, where the default threshold 20 errs by 2e-9.

    It is one kernel. The softplus of :mod:`.activations` is made for any beta and takes four. In compiled regions it is
    another: F.softplus with a threshold multiplies by beta there, and where that is 1 a checkpoint in the region breaks
    (torch 2.14).
    """
    return -F.logsigmoid(-raw) if is_compiling() else F.softplus(raw, 1.0, 40.0)


def softplus(raws: Sequence[Tensor]) -> list[Tensor]:
    """Return softplus of several tensors, by one operator where all are plain tensors of the CPU."""
    watched = is_compiling() or transforms_active() or has_torch_function(tuple(raws))
    if raws and not watched and backend.absent is None and all(_is_plain(raw) for raw in raws):
        return native.softplus(raws)
    return [plain_softplus(raw) for raw in raws]


def _is_plain(t: Tensor) -> bool:
    return (
        (type(t) is torch.nn.Parameter or type(t) is Tensor)
        and t.is_cpu
        and (t.dtype == torch.float32 or t.dtype == torch.float64)
    )
