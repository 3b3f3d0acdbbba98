"""The log of choices: ``ILVAE_FAST_LOG=plan`` prints to stderr, once each, which route the calls of a program take.

The environment variable is read once, at import. Without it :func:`watched` returns its argument, so that nothing is
spent on a log that nobody asked for.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._support.errors import unknown_name
from . import backend
from .extension import without_operators
from .operands import Operands, result_dtype

F = TypeVar("F", bound=Callable[..., Any])

_logger = logging.getLogger("ilvae_fast")
_seen: set[Hashable] = set()


def _from_environment() -> bool:
    kind = os.environ.get("ILVAE_FAST_LOG", "")
    if kind not in ("", "plan"):
        raise unknown_name("environment variable ILVAE_FAST_LOG", kind, ("plan",))
    if kind:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        _logger.addHandler(handler)
        _logger.setLevel(logging.INFO)
        _logger.propagate = False  # a handler of the program's own would print everything a second time
    return bool(kind)


ENABLED = _from_environment()


def watched(function: F) -> F:
    """Return ``function`` of operands with a log of its choices; ``function`` itself while the log is off."""
    return _watched(function) if ENABLED else function


def _watched(function: Any) -> Any:
    def call(operands: Operands, *rest: Any) -> Any:
        result = function(operands, *rest)  # first: it refuses what is wrong with the operands
        traced = torch.compiler.is_compiling() or not isinstance(operands.x.numel(), int)
        if not traced and backend.current_backend() == "native":
            _choice(operands)
        return result

    return call


def _choice(operands: Operands) -> None:
    layers = (operands.skip_weight.shape, *(w.shape for w in operands.weights))
    recorded = torch.is_grad_enabled()  # without autograd nothing is saved, and few rows may take another route
    options = (operands.embedding is None, operands.route, operands.recompute, recorded)
    x = operands.x
    key = (x.shape, x.dtype, result_dtype(x), x.device, layers, options)
    if key in _seen:
        return
    _seen.add(key)
    d, m = operands.skip_weight.shape[-1], x.shape[-1]
    hidden = ", ".join(str(w.shape[-1]) for w in operands.weights)
    embedded = "" if operands.embedding is None and m == d else f" embedded in {d}"
    p = operands.plan()
    _logger.info(
        "map of x %s%s, hidden (%s), %s on %s: %s route (%s)%s",
        tuple(x.shape), embedded, hidden, _name(result_dtype(x)), x.device, p.route, p.reason,
        ", recomputes" if p.recompute else f", saves {p.saved_bytes / 2**10:,.4g} KiB",
    )  # fmt: skip


def plain(function: str, x: Tensor) -> None:
    """Log that ``function`` runs by plain autograd."""
    if not ENABLED or torch.compiler.is_compiling():
        return
    asked = backend.current_backend() == "reference"
    why = "the reference backend is in force" if asked else without_operators(x.device.type)
    why = why or "no compiled rule for this derivative or transformation"
    key = (function, x.shape, x.dtype, x.device, why)
    if key not in _seen:
        _seen.add(key)
        _logger.info(
            "%s of x %s, %s on %s: plain reference path (%s)", function, tuple(x.shape), _name(x.dtype), x.device, why
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
