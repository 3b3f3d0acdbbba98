"""Options given by name. A part that is built from them refuses a name that it does not know."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from .errors import unknown_name

T = TypeVar("T")


def check_names(argument: str, names: Iterable[str], known: Collection[str]) -> None:
    """Accept ``names`` that are all among the ``known`` ones.

    Raises:
        ValueError: a name is unknown; the nearest known one is named.
    """
    for name in names:
        if name not in known:
            raise unknown_name(argument, name, known) if known else ValueError(f"{argument}: got {name!r}, wanted none")


def build(argument: str, part: Callable[..., T], options: Mapping[str, Any], *fixed: Any) -> T:
    """Return ``part(*fixed, **options)``; ``argument`` is the configuration's name for the options.

    Raises:
        ValueError: an option is unknown (the nearest known one is named) or missing.
    """
    parameters = inspect.signature(part).parameters
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [name for name, parameter in parameters.items() if parameter.kind in by_name][len(fixed) :]
    check_names(argument, options, known)
    for name in known:
        if name not in options and parameters[name].default is inspect.Parameter.empty:
            raise ValueError(f"{argument}: {name!r} is missing, which has no default")
    return part(*fixed, **options)
