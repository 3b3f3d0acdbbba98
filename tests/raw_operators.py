"""The operators ``torch.ops.ilvae_fast.*`` called by the argument names of their schemas.

No test outside this module knows in which order a schema has its arguments, or which bit stands for which gradient.
A call is varied by :func:`dataclasses.replace` of its operands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import opcheck

from cases import Tensors
from ilvae_fast.operators.activations import encode

AUTO, MATMUL, FUSED = range(3)  # csrc/core/plan.h
UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # of opcheck


@dataclass(frozen=True)
class Operands:
    """What the operators share: the network, its batch, and how to compute."""

    x: Tensor
    skip_weight: Tensor
    bias: Tensor
    weights: Sequence[Tensor]
    inverse_lipschitz: Tensor
    embedding: Tensor | None
    activations: Sequence[int]
    activation_parameters: Sequence[float]
    product_dtype: torch.dtype | None = None
    route: int = AUTO

    @classmethod
    def of(cls, tensors: Tensors) -> Operands:
        x, skip_weight, bias, weights = tensors.positional()
        codes, parameters, _ = encode(tensors.case.activations)
        named = tensors.named
        constant, embedding = named["inverse_lipschitz"], named.get("embedding")
        return cls(x, skip_weight, bias, weights, constant, embedding, codes, parameters)

    def gradients(self) -> list[str]:
        """The names of the gradients in the order of the results of ``training_terms``."""
        layers = range(len(self.weights))
        return ["x", "skip_weight", "bias", "inverse_lipschitz", "embedding", *(f"weights[{k}]" for k in layers)]

    def wanted(self, *names: str) -> int:
        """What ``training_terms`` takes to compute these gradients; by default every one that exists.

        "weights" stands for the weights of all layers.
        """
        existing = [name for name in self.gradients() if name != "embedding" or self.embedding is not None]
        chosen = {name for name in existing if not names or name in names or name.split("[")[0] in names}
        assert {name.split("[")[0] for name in names} <= {name.split("[")[0] for name in chosen}, names
        return sum(1 << i for i, name in enumerate(self.gradients()) if name in chosen)


class Operator:
    """An operator as a function of operands and, by name, of the arguments that are its own."""

    def __init__(self, name: str, library: str = "ilvae_fast"):
        self.overload = getattr(getattr(torch.ops, library), name).default
        self.names = [argument.name for argument in self.overload._schema.arguments]

    def __call__(self, operands: Operands | None = None, **own: Any) -> Any:
        return self.overload(**self.arguments(operands, **own))

    def arguments(self, operands: Operands | None = None, **own: Any) -> dict[str, Any]:
        """All arguments of a call; operands that the schema does not have are left out."""
        shared = {} if operands is None else vars(operands)
        return {name: value for name, value in shared.items() if name in self.names} | own

    def check(self, operands: Operands | None = None, *, utilities: Sequence[str] = UTILITIES, **own: Any) -> None:
        """:func:`torch.library.opcheck` of a call."""
        opcheck(self.overload, (), self.arguments(operands, **own), test_utils=utilities)


potential_and_map = Operator("potential_and_map")
training_terms = Operator("training_terms")
map_jvp = Operator("map_jvp")
training_terms_backward = Operator("training_terms_backward")
map_jvp_backward = Operator("map_jvp_backward")
softplus = Operator("softplus")
softplus_backward = Operator("softplus_backward")
