"""Wording that error messages share. Each names the argument, what came and what was wanted."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(argument: str, name: object, known: Iterable[str]) -> ValueError:
    """Return the error for a name outside ``known``; it suggests the nearest known one."""
    names = sorted(known)
    nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)
    hint = f" (nearest: {nearest[0]!r})" if nearest else ""
    return ValueError(f"{argument}: got {name!r}, wanted one of {', '.join(names)}{hint}")
