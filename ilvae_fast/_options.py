"""Options given by name: parts built from them refuse a name they do not know."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ._errors import unknown_name

T = TypeVar("T")


def build(argument: str, part: Callable[..., T], options: Mapping[str, Any], *fixed: Any) -> T:
    """``part(*fixed, **options)``; ``argument`` is what the options are called in the configuration.

    Raises:
        ValueError: an option that ``part`` does not have, with the nearest one; one that is missing.
    """
    parameters = inspect.signature(part).parameters
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [name for name, parameter in parameters.items() if parameter.kind in by_name][len(fixed) :]
    for name in options:
        if name not in known:
            if not known:
                raise ValueError(f"{argument}: got {name!r}, wanted none")
            raise unknown_name(argument, name, known)
    for name in known:
        if name not in options and parameters[name].default is inspect.Parameter.empty:
            raise ValueError(f"{argument}: got none called {name!r}, which is needed")
    return part(*fixed, **options)
