"""Calls on DTensors: each process computes the rows that it has, by the compiled operators.

The rows of x are spread over the processes, or whole in each; the parameters are whole. Gradients of parameters are
sums over the rows of all processes, which DTensor adds up where they are needed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .operands import Operands


def is_spread(t: Tensor) -> bool:
    """Whether ``t`` is a DTensor. Their module is not imported for that: without it there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


class Rows:
    """How the rows of x lie in the processes.

    Args:
        x: a DTensor (..., m). What is not spread over its rows alone, features among it, is gathered first.
    """

    def __init__(self, x: Any) -> None:
        from torch.distributed.tensor import Partial, Replicate, Shard

        rows = [p if type(p) is Shard and p.dim < x.dim() - 1 else Replicate() for p in x.placements]
        self.mesh, self.shape, self.placements = x.device_mesh, x.shape[:-1], rows
        self.everywhere = [Replicate()] * len(rows)
        self.sums = [Partial() if isinstance(p, Shard) else Replicate() for p in rows]

    def local(self, operands: Operands) -> Operands:
        """Return the operands that this process computes with.

        Raises:
            TypeError: naming a trained parameter that is no DTensor.
        """
        names = ("skip_weight", "bias", "inverse_lipschitz", "embedding")
        parameters = {name: self._whole(name, getattr(operands, name)) for name in names}
        weights = [self._whole(f"weights[{k}]", w) for k, w in enumerate(operands.weights)]
        return operands._replace(x=self.rows("x", operands.x), weights=weights, **parameters)

    def rows(self, name: str, t: Any) -> Any:
        """Return this process's rows of x, a tangent or a cotangent."""
        if t is None:
            return None
        if not is_spread(t):
            raise TypeError(f"{name}: got a plain tensor, wanted a DTensor, as x is one")
        return t.redistribute(self.mesh, self.placements).to_local()

    def _whole(self, name: str, t: Any) -> Any:
        if t is None or not is_spread(t):
            if t is not None and t.requires_grad:  # whose gradient would be that of these rows alone
                raise TypeError(
                    f"{name}: got a plain tensor that requires a gradient, wanted a DTensor, as x is one: "
                    "torch.distributed.tensor.distribute_module(layer, mesh)"
                )
            return t
        return t.redistribute(self.mesh, self.everywhere).to_local(grad_placements=self.sums)

    def spread(self, local: Tensor, features: Sequence[int]) -> Tensor:
        """Return a result whose rows are as those of x, as a DTensor (..., *features)."""
        return self._dtensor(local, self.placements, (*self.shape, *features))

    def summed(self, local: Tensor) -> Tensor:
        """Return the gradient of a parameter, of which each process has the part of its rows, as a DTensor."""
        return self._dtensor(local, self.sums, local.shape)

    def _dtensor(self, local: Tensor, placements: Any, shape: Sequence[int]) -> Tensor:
        from torch.distributed.tensor import DTensor

        size = torch.Size(shape)
        stride = torch.empty(size, device="meta").stride()
        return DTensor.from_local(local.contiguous(), self.mesh, placements, run_check=False, shape=size, stride=stride)
