"""PyTorch's function transformations: which are active, and derivatives of plain functions under all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

_functorch: Any = torch._C._functorch
_vjp: Any = torch.func.vjp  # typed upstream as either of its two forms, with and without auxiliary results
_jvp: Any = torch.func.jvp

Function = Callable[..., tuple[Tensor, ...]]


def transforms_active() -> bool:
    """Whether a C++ autograd function would be refused here: under ``torch.func`` or an open dual level."""
    if forward_ad._current_level >= 0:
        return True
    if not torch._C._are_functorch_transforms_active() or is_compiling():
        return torch._C._are_functorch_transforms_active()
    # functionalisation works on operators, and knows no functions with rules
    return any(i.key() != _functorch.TransformType.Functionalize for i in _functorch.get_interpreter_stack() or ())


def forward_modes_nested() -> bool:
    """Whether a ``torch.autograd.Function`` would lose tangents here: under two forward modes or more.

    Its rule is then applied at one level alone, and the tangents of the others become silent zeros (pytorch issue
    197867). Dual levels of ``torch.autograd.forward_ad`` nest neither in each other nor in those of ``torch.func``.
    """
    if not torch._C._are_functorch_transforms_active():
        return False
    levels = _functorch.get_interpreter_stack() or ()
    return sum(level.key() == _functorch.TransformType.Jvp for level in levels) > 1


def living(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return tensors without the wrappers of transformations that are over.

    The pull-back that ``torch.func.vjp`` returns runs when its level is over, and finds what a
    ``torch.autograd.Function`` saved still wrapped. Operators take that, and a new level around it does not.
    """
    return [None if t is None else _functorch.unwrap_if_dead(t) for t in tensors]


def pull_back(function: Function, primals: Sequence[Tensor | None]) -> tuple[tuple[Tensor, ...], Function]:
    """Return the values of ``function`` and its vector-Jacobian product, a function of a tuple of cotangents."""
    return _vjp(function, *primals)


def along(
    function: Function, primals: Sequence[Tensor | None], tangents: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the values of ``function`` and their derivatives along ``tangents``, by forward mode."""
    # torch.func.jvp refuses expanded tensors: a dual number must not overlap itself
    whole = tuple(None if t is None else t.contiguous() for t in primals)
    return _jvp(function, whole, tuple(t.contiguous() for t in tangents))


def transposed_pull_back(
    function: Function, primals: Sequence[Tensor | None], tangents: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the same as :func:`along`, by reverse mode: the pull-back is linear, and its transpose pushes forward.

    This is for an open dual level of torch.autograd.forward_ad, in which forward mode does not nest.
    """
    values, pull = _vjp(function, *primals)
    _, transposed = _vjp(pull, tuple(torch.zeros_like(v) for v in values))
    return values, transposed(tuple(tangents))[0]
