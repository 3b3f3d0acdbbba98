"""Checks of single arguments. Each error names the argument, what came and what was wanted."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor


def check_number(argument: str, value: Any, *, least: float = 0, above: bool = False, whole: bool = False) -> None:
    """Accept a finite number >= ``least``; with ``above`` it must be > ``least``, with ``whole`` an int.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    wanted = f"{'an integer' if whole else 'a finite number'} {'>' if above else '>='} {least:g}"
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if str(value)[:1].isdecimal() else ""
        raise TypeError(f"{argument}: got {type(value).__name__} {value!r}, wanted {wanted}{hint}")
    if not math.isfinite(value) or value < least or (above and value == least):
        raise ValueError(f"{argument}: got {value!r}, wanted {wanted}")


def check_tensor(argument: str, value: Any) -> None:
    """Accept a tensor.

    Raises:
        TypeError: naming the argument.
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{argument}: got {type(value).__name__}, wanted a tensor; torch.as_tensor makes one of arrays and lists"
        )


def check_positive(argument: str, value: Any) -> int:
    """Return a positive integer as a Python int; integers of NumPy and torch are accepted.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    try:
        if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
            raise TypeError
        size = operator.index(value)
    except TypeError:
        cure = "; int(..) makes one of it" if isinstance(value, float) and value.is_integer() else ""
        raise TypeError(f"{argument}: got {type(value).__name__} {value!r}, wanted a positive int{cure}") from None
    if size < 1:
        raise ValueError(f"{argument}: got {size}, wanted at least 1")
    return size


def check_sizes(
    argument: str, value: Any, wanted: str = "a sequence of sizes", most: float = math.inf
) -> tuple[int, ...]:
    """Return a sequence of 1 to ``most`` positive integers as a tuple; ``wanted`` describes it in the error.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    try:
        sizes = () if isinstance(value, str) else tuple(value)
    except TypeError:  # not iterable
        sizes = ()
    if not 0 < len(sizes) <= most:
        raise ValueError(f"{argument}: got {value!r}, wanted {wanted}")
    return tuple(check_positive(f"{argument}[{k}]", size) for k, size in enumerate(sizes))
