"""Which route a shape takes, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._support.errors import unknown_name
from .extension import _C

ROUTES = ("auto", "matmul", "fused")  # in the order of csrc/core/plan.h


def route_code(route: str) -> int:
    """Return the number by which the operators know a route.

    Raises:
        ValueError: the name is unknown.
    """
    if route not in ROUTES:
        raise unknown_name("route", route, ROUTES)
    return ROUTES.index(route)


@dataclass(frozen=True)
class Plan:
    """What a map of some shape costs. Printing it gives a small table.

    Attributes:
        route: ``"matmul"`` or ``"fused"``.
        reason: for the route.
        recompute: whether the backward pass recomputes instead of reading what the forward pass saved.
        map_flops: of the matrix products of the map, a multiply-add counted as two.
        training_flops: of those of the training terms.
        saved_bytes: kept from forward to backward besides inputs and parameters.
        map_bytes: inputs and parameters read once, results written once.
        training_bytes: the same of the training terms.
    """

    route: str
    reason: str
    recompute: bool
    map_flops: float
    training_flops: float
    saved_bytes: int
    map_bytes: int
    training_bytes: int

    def __str__(self) -> str:
        return (
            f"route            {self.route} ({self.reason})\n"
            f"map              {self.map_flops / 1e6:,.3g} Mflop, {self.map_bytes / 2**10:,.4g} KiB\n"
            f"training terms   {self.training_flops / 1e6:,.3g} Mflop, {self.training_bytes / 2**10:,.4g} KiB\n"
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
    recorded: bool | None = None,
) -> Plan:
    """Say which route a map takes and what it costs: a pure function of shape and dtype.

    :meth:`ilvae_fast.BrenierMap.plan` and :meth:`ilvae_fast.BrenierDecoder.plan` say it of one call.

    Args:
        batch: the number of rows N.
        in_features: d, the width of the map.
        hidden_features: n_1 .. n_K.
        embedding_features: m, where the input is embedded: x = B z with z of width m.
        embedding: "identity" or "dense", what B is.
        dtype: of the operands of matrix products.
        route: "auto", or a route to force.
        recompute: whether the backward pass recomputes instead of reading what the forward pass saved; None: whatever
            is faster.
        device: "cpu" or a CUDA device. The fused kernels depend on the device's shared memory; where there is no
            device, that of an H100 counts. So does torch's setting for float32 products
            (``torch.set_float32_matmul_precision``).
        recorded: whether autograd records the call. Without it nothing is saved, and few rows of a large network take
            another route. None: the plan is that of a recorded call, and the reason names the exception.

    Returns:
        The costs of the map, and of the training terms with all gradients and one map cotangent.

    Raises:
        ValueError: naming the argument.
    """
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
    given, result = _elements(batch, m, in_features, hidden_features, dense), batch * in_features
    map_bytes, training_bytes = dtype.itemsize * (given + result), dtype.itemsize * (2 * given + result)
    taken, reason, saved_bytes = p.route, p.reason, p.saved_bytes
    alone = "the map alone, without autograd, of so few rows"
    if recorded is None and p.few_rows:
        reason = f"{reason}; {alone}: matmul"
    elif recorded is False:
        saved_bytes = 0
        if p.few_rows:
            taken, reason = "matmul", alone
    return Plan(taken, reason, p.recompute, p.map_flops, p.training_flops, saved_bytes, map_bytes, training_bytes)


def _elements(batch: int, m: int, d: int, widths: Sequence[int], dense: bool) -> int:
    """Count the elements of x and of all parameters; L does not count."""
    skip = (sum(widths) + 1) * (d + 1)
    hidden = sum(a * b for a, b in zip(widths, [*widths[1:], 1], strict=True))
    return batch * m + skip + hidden + (d * m if dense else 0)
