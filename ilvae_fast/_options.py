"""Options given by name: parts built from them refuse a name they do not know, and a value that is no such number."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from ._errors import unknown_name

T = TypeVar("T")


def check_names(argument: str, names: Iterable[str], known: Collection[str]) -> None:
    """All ``names`` are among the ``known`` ones.

    Raises:
        ValueError: with the nearest known one.
    """
    for name in names:
        if name not in known:
            raise unknown_name(argument, name, known) if known else ValueError(f"{argument}: got {name!r}, wanted none")


def build(argument: str, part: Callable[..., T], options: Mapping[str, Any], *fixed: Any) -> T:
    """``part(*fixed, **options)``; ``argument`` is what the options are called in the configuration.

    Raises:
        ValueError: an option that ``part`` does not have, with the nearest one; one that is missing.
    """
    parameters = inspect.signature(part).parameters
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [name for name, parameter in parameters.items() if parameter.kind in by_name][len(fixed) :]
    check_names(argument, options, known)
    for name in known:
        if name not in options and parameters[name].default is inspect.Parameter.empty:
            raise ValueError(f"{argument}: got none called {name!r}, which is needed")
    return part(*fixed, **options)


def check_number(argument: str, value: Any, *, least: float = 0, above: bool = False, whole: bool = False) -> None:
    """A finite number >= least, or > least if ``above``; an int if ``whole``.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    wanted = f"{'an integer' if whole else 'a finite number'} {'>' if above else '>='} {least:g}"
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if str(value)[:1].isdecimal() else ""
        raise TypeError(f"{argument}: got {type(value).__name__} {value!r}, wanted {wanted}{hint}")
    if not math.isfinite(value) or value < least or (above and value == least):
        raise ValueError(f"{argument}: got {value!r}, wanted {wanted}")
