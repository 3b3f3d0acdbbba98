"""Largest errors against float64 by dtype and order of derivative, beside those of eager autograd.

    python -m benchmarks.accuracy

Errors are maxima of |ours - float64| / max |float64|, over the shapes and activations below; for float64 itself, of the
difference between operator and reference.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

import ilvae_fast as il
from benchmarks.record import provenance, write
from ilvae_fast import functional, reference

SHAPES = [(2, (32, 32), 128), (8, (128, 128), 256), (32, (64, 48, 40), 64), (64, (256, 256, 256), 128)]
ACTIVATIONS = ["softplus", "celu", "smooth_leaky_relu", "leaky_relu"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
ORDERS = ["potential", "map", "jvp", "gradient of x", "gradient of parameters", "double backward"]


def _quantities(module: ModuleType, layer: il.BrenierMap, x: Tensor, u: Tensor, v: Tensor) -> dict[str, list[Tensor]]:
    with il.use_backend("native" if module is functional else "reference"):
        phi, t = layer.potential_and_map(x)
        parameters = list(layer.parameters())
        loss = (u * phi).sum() + (v * t).sum()
        gradients = torch.autograd.grad(loss, [x, *parameters], create_graph=True)
        second = torch.autograd.grad(gradients[0].square().sum(), [x, *parameters], allow_unused=True)
        with torch.no_grad():
            derivative = layer.jvp(x, v)[1]
    lists = ([phi], [t], [derivative], gradients[:1], gradients[1:], [s for s in second if s is not None])
    return dict(zip(ORDERS, map(list, lists), strict=True))


def _error(values: list[Tensor], exact: list[Tensor]) -> float:
    errors = ((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30) for a, b in zip(values, exact, strict=True))
    return float(max(error.detach() for error in errors))


def measure() -> dict[str, dict[str, dict[str, float]]]:
    """dtype -> order -> {"ours", "eager"}: largest relative errors."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for dtype in DTYPES:
        rows = {order: {"ours": 0.0, "eager": 0.0} for order in ORDERS}
        for width, hidden, batch in SHAPES:
            for activation in ACTIVATIONS:
                first = "squared_leaky_relu" if activation == "leaky_relu" else None
                torch.manual_seed(0)
                layer = il.BrenierMap(width, hidden, activation=activation, first_activation=first, dtype=dtype)
                exact_layer = il.BrenierMap(
                    width, hidden, activation=activation, first_activation=first, dtype=torch.float64
                )
                exact_layer.load_state_dict(layer.state_dict())
                x, v = (torch.randn(batch, width).to(dtype) for _ in range(2))
                u = torch.randn(batch).to(dtype)
                exact = _quantities(reference, exact_layer, x.double().requires_grad_(), u.double(), v.double())
                for name, module in {"ours": functional, "eager": reference}.items():
                    values = _quantities(module, layer, x.requires_grad_(), u, v)
                    for order in ORDERS:
                        rows[order][name] = max(rows[order][name], _error(values[order], exact[order]))
        table[str(dtype).removeprefix("torch.")] = rows
    return table


def main() -> None:
    table = measure()
    print(f"{'':26s}" + "".join(f"{dtype:>22s}" for dtype in table))
    print(f"{'':26s}" + f"{'ours':>11s}{'eager':>11s}" * len(table))
    for order in ORDERS:
        cells = "".join(f"{rows[order]['ours']:11.1e}{rows[order]['eager']:11.1e}" for rows in table.values())
        print(f"{order:26s}{cells}")
    print("written:", write("accuracy", {**provenance(), "errors": table}))


if __name__ == "__main__":
    main()
