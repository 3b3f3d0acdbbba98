"""Which implementation runs: the compiled operators or plain autograd."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from .._support.errors import unknown_name

BACKENDS = ("native", "reference")


def _from_environment() -> str:
    name = os.environ.get("ILVAE_FAST_BACKEND", "native")
    if name not in BACKENDS:
        raise unknown_name("environment variable ILVAE_FAST_BACKEND", name, BACKENDS)
    return name


_current = _from_environment()
absent: str | None = None  # why there are no compiled operators, on the reference backend (extension.py)


def current_backend() -> str:
    """Return ``"native"`` or ``"reference"``."""
    return _current


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run everything inside by the compiled operators (``"native"``) or by plain autograd (``"reference"``).

    Like the flags of ``torch.backends`` it holds for the whole process. A backward pass keeps what its forward pass
    chose. Outside any such context the environment variable ``ILVAE_FAST_BACKEND``, read once at import, decides.

    Raises:
        ValueError: the name is unknown.
        ImportError: the compiled operators are asked for, and there are none.
    """
    global _current
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS)
    if name == "native" and absent is not None:
        raise ImportError(absent)
    previous, _current = _current, name
    try:
        yield
    finally:
        _current = previous
