"""Which implementation runs, what was built, and which route a shape takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ._errors import unknown_name

BACKENDS = ("native", "reference")
ROUTES = ("auto", "matmul")


def _from_environment() -> str:
    name = os.environ.get("ILVAE_FAST_BACKEND", "native")
    if name not in BACKENDS:
        raise unknown_name("environment variable ILVAE_FAST_BACKEND", name, BACKENDS)
    return name


_current = _from_environment()


def current_backend() -> str:
    """``"native"`` or ``"reference"``."""
    return _current


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run everything inside by the compiled operators (``"native"``) or by plain autograd (``"reference"``).

    Like the flags of ``torch.backends`` it holds for the whole process; what a forward pass chose its backward pass
    keeps. Outside any such context the environment variable ``ILVAE_FAST_BACKEND``, read once at import, decides.

    Raises:
        ValueError: unknown name.
    """
    global _current
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS)
    previous, _current = _current, name
    try:
        yield
    finally:
        _current = previous


def check_route(route: str) -> None:
    """Refuse a route that does not exist."""
    if route not in ROUTES:
        raise unknown_name("route", route, ROUTES)


def build_info() -> dict[str, Any]:
    """What the installed extension was built with and for.

    Keys: ``version``; ``torch`` and ``python`` of the build; ``compiler``; ``cpu``, the instruction set in use;
    ``cuda``, the toolkit version, or None where the extension was built for the CPU alone; ``cuda_architectures``.
    """
    from . import _C
    from ._version import __version__

    return {"version": __version__, **_C.build_info()}
