"""Data that stream by in batches, and means over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .._support.checks import check_positive
from .._support.devices import with_float64

Data: TypeAlias = "Tensor | Iterable[Tensor | Sequence[Tensor]]"
Reduce: TypeAlias = "Callable[[Tensor], Tensor] | None"


def batches(data: Data, batch_size: int) -> Iterator[Tensor]:
    """Yield batches (n, D) or (n, ...) with n > 0.

    Raises:
        ValueError, TypeError: there is no datum, or one alone, which would count as D of them; naming the argument.
    """
    batch_size = check_positive("batch_size", batch_size)
    parts = data.split(batch_size) if isinstance(data, Tensor) else data
    empty = True
    for batch in parts:
        x = batch if isinstance(batch, Tensor) else batch[0]
        if not isinstance(x, Tensor):
            raise TypeError(f"data: got batches of {type(x).__name__}, wanted tensors (n, D), or tuples of them")
        if x.dim() < 2:
            raise ValueError(f"data: got shape {tuple(x.shape)}, wanted (n, D); unsqueeze(0) makes one")
        if len(x):
            empty = False
            yield x
    if empty:
        raise ValueError("data: got no datum, wanted at least one")


def ratio(total: Tensor, count: int, reduce: Reduce) -> Tensor:
    """Return ``total / count`` on the CPU, both summed over processes."""
    sums = torch.cat([total.cpu().double().reshape(-1), torch.tensor([count], dtype=torch.float64)])
    sums = sums if reduce is None else reduce(sums).cpu()
    return (sums[:-1] / sums[-1]).reshape(total.shape)


def mean(values: Callable[[Tensor], Tensor], data: Data, batch_size: int, reduce: Reduce) -> Tensor:
    """Return the mean over the data of ``values(x)`` (n, ...), in float64 on the CPU."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for x in batches(data, batch_size):
        total = total + with_float64(values(x)).double().sum(0).cpu()
        count += len(x)
    return ratio(total, count, reduce)
