"""Which implementation runs, what was built, and which route a shape takes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ._errors import unknown_name

BACKENDS = ("native", "reference")
ROUTES = ("auto", "matmul", "fused")  # in the order of csrc/core/plan.h


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


def route_code(route: str) -> int:
    """The route as the operators take it; refuses one that does not exist."""
    if route not in ROUTES:
        raise unknown_name("route", route, ROUTES)
    return ROUTES.index(route)


def build_info() -> dict[str, Any]:
    """What the installed extension was built with and for.

    Keys: ``version``; ``torch`` and ``python`` of the build; ``compiler``; ``cpu``, the instruction set in use;
    ``cuda``, the toolkit version, or None where the extension was built for the CPU alone; ``cuda_architectures``.
    """
    from . import _C
    from ._version import __version__

    return {"version": __version__, **_C.build_info()}


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` says of a shape; printing it gives a small table."""

    route: str
    reason: str
    recompute: bool
    map_flops: float
    training_flops: float
    saved_bytes: int

    def __str__(self) -> str:
        return (
            f"route            {self.route} ({self.reason})\n"
            f"map              {self.map_flops / 1e6:,.3g} Mflop\n"
            f"training terms   {self.training_flops / 1e6:,.3g} Mflop\n"
            f"saved            {self.saved_bytes / 2**10:,.4g} KiB from forward to backward"
            f"{' (recomputed instead)' if self.recompute else ''}"
        )


def plan(
    batch: int,
    in_features: int,
    hidden_features: Sequence[int],
    *,
    embedding_features: int | None = None,
    embedding: str = "identity",
    dtype: torch.dtype = torch.float32,
    route: str = "auto",
    recompute: bool | None = None,
    device: str | torch.device = "cpu",
) -> Plan:
    """Which route a map takes, and what it costs: a pure function of shape and dtype.

    Args:
        batch: rows N.
        in_features: d, the width of the map.
        hidden_features: n_1 .. n_K.
        embedding_features: m, where the input is embedded: x = B z with z of width m.
        embedding: "identity" or "dense", what B is.
        dtype: of the operands of matrix products.
        route: "auto", or a route to force.
        recompute: whether the backward pass recomputes instead of reading what the forward pass saved; None: whatever
            is faster.
        device: "cpu" or a CUDA device, on whose shared memory the fused kernels depend; where there is none, an H100.
            torch's setting for float32 products counts too (``torch.set_float32_matmul_precision``).

    Returns:
        flops of the matrix products of the map and of the training terms (all gradients, one map cotangent), and the
        bytes kept from forward to backward besides inputs and weights.
    """
    from . import _C

    code = route_code(route)
    for name, value in {"batch": batch, "in_features": in_features}.items():
        if value < (0 if name == "batch" else 1):
            raise ValueError(f"{name}: got {value}, wanted a positive number")
    if not hidden_features or min(hidden_features) < 1:
        raise ValueError(f"hidden_features: got {tuple(hidden_features)}, wanted at least one width, all positive")
    if embedding not in ("identity", "dense"):
        raise unknown_name("embedding", embedding, ("identity", "dense"))
    m = in_features if embedding_features is None else embedding_features
    if not 1 <= m <= in_features:
        raise ValueError(f"embedding_features: got {m}, wanted 1 to {in_features}, in_features")
    cuda = torch.device(device).type == "cuda"
    if route == "fused" and dtype.itemsize < 4 and not cuda:
        raise ValueError(f"route: got 'fused', wanted 'matmul' for {str(dtype).removeprefix('torch.')}")
    dense = embedding_features is not None and embedding == "dense"
    real = torch.promote_types(dtype, torch.float32).itemsize
    shared = 0
    if cuda:
        properties: Any = torch.cuda.get_device_properties(device) if torch.cuda.is_available() else None
        shared = properties.shared_memory_per_block_optin if properties else 232448
    # not allow_tf32: it raises where the setting was made by its newer name
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    sizes = (batch, m, in_features, list(hidden_features), dense, real, dtype.itemsize)
    p = _C.plan(*sizes, code, recompute, shared, tf32)
    if route not in ("auto", p.route):
        raise ValueError(f"route: got {route!r}, wanted {p.route!r}: {p.reason}")
    return Plan(p.route, p.reason, p.recompute, p.map_flops, p.training_flops, p.saved_bytes)
