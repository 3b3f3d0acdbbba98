from typing import Any

class Plan:
    route: str
    reason: str
    recompute: bool
    map_flops: float
    training_flops: float
    saved_bytes: int

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
