"""PyTorch's function transformations: which are active, and derivatives of plain functions under all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

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


def pull_back(
    function: Function, primals: Sequence[Tensor], others: Sequence[Tensor | None] = ()
) -> tuple[tuple[Tensor, ...], Function]:
    """Return the values of ``function`` and its vector-Jacobian product, a function of a tuple of cotangents.

    Args:
        others: further tensors that ``function`` reads.
    """
    if not primals:  # which torch refuses
        return function(), lambda _: ()
    whole = [t for t in (*primals, *others) if t is not None]
    if transforms_active() or is_dynamo_compiling():
        return _vjp(function, *primals)
    if torch.is_inference_mode_enabled() or any(t.is_inference() for t in whole):
        return _vjp(function, *primals)  # autograd records no such tensors
    # torch.func refuses hooks of saved tensors, such as those of checkpoints and offloading
    enabled = torch.is_grad_enabled()
    recorded = enabled and any(t.requires_grad for t in whole)
    with torch.enable_grad():
        # tensors of their own: one primal may depend on another, or be it
        inputs = [t.view_as(t) if recorded and t.requires_grad else t.detach().requires_grad_() for t in primals]
        values = function(*inputs)

    def pull(cotangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        pairs = [(v, c) for v, c in zip(values, cotangents, strict=True) if v.requires_grad]
        if not pairs:  # of a constant
            return tuple(torch.zeros_like(t) for t in primals)
        some, of_some = zip(*pairs, strict=True)
        keep = recorded or (enabled and any(c.requires_grad for c in of_some))
        return torch.autograd.grad(some, inputs, of_some, create_graph=keep, materialize_grads=True)

    return values if recorded else tuple(v.detach() for v in values), pull


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
