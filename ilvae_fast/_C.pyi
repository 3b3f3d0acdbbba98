from collections.abc import Sequence
from typing import Any

from torch import Tensor

class Plan:
    route: str
    reason: str
    recompute: bool
    map_flops: float
    training_flops: float
    saved_bytes: int
    few_rows: bool

def build_info() -> dict[str, Any]: ...
def plan(
    rows: int,
    input: int,
    width: int,
    widths: list[int],
    dense: bool,
    real_bytes: int,
    operand_bytes: int,
    route: int,
    recompute: bool | None,
    cuda_shared_bytes: int,
    tf32: bool,
) -> Plan: ...

# The operators, arguments by position as their schemas in csrc/torch/operators.h have them
def potential_and_map(*arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]: ...
def training_terms(*arguments: Any) -> list[Tensor]: ...
def map_jvp(*arguments: Any) -> tuple[Tensor, Tensor]: ...
def softplus(raw: Sequence[Tensor]) -> list[Tensor]: ...
