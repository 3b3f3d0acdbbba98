"""``ILVAE_FAST_LOG=plan``: each new choice once, on stderr, and nothing at all without it."""

from __future__ import annotations

import os
import subprocess
import sys

from ilvae_fast.operators import dispatch, log

PROGRAM = """
import torch, ilvae_fast as il
layer, x = il.BrenierMap(2, (8, 4)), torch.randn(5, 2)
for _ in range(3):
    layer(x).sum().backward()       # one line
layer(torch.randn(6, 2))            # another shape
layer.double()(x.double())          # another dtype
layer.float()
with torch.autocast("cpu", torch.bfloat16):
    layer(x)                        # another one by autocast
il.BrenierMap(2, (8,))(x)           # another layer
with torch.no_grad():
    layer(x)                        # saves nothing
print("done")
"""
REFERENCE = """
import torch, ilvae_fast as il
layer, x = il.BrenierMap(2, (8, 4)), torch.randn(5, 2, requires_grad=True)
for _ in range(2):
    (g,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    g.square().sum().backward()     # a second derivative
with il.use_backend("reference"):
    for _ in range(2):
        layer(x)
"""


def _lines(program: str, value: str | None) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if k != "ILVAE_FAST_LOG"}
    if value is not None:
        environment["ILVAE_FAST_LOG"] = value
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    return result.stderr.splitlines()


def test_each_new_choice_is_logged_once():
    lines = _lines(PROGRAM, "plan")
    assert len(lines) == 6
    assert lines[0].startswith("ilvae_fast: map of x (5, 2), hidden (8, 4), float32 on cpu: fused route (")
    assert lines[0].endswith("recomputes")
    assert "x (6, 2)" in lines[1]
    assert "float64" in lines[2]
    assert "bfloat16 on cpu: matmul route" in lines[3]
    assert "hidden (8)," in lines[4]
    assert lines[5] == lines[0]  # recorded by autograd or not, these few rows take the same route


def test_the_plain_path_is_logged_once_with_its_reason():
    lines = _lines(REFERENCE, "plan")
    plain = [line for line in lines if "plain reference path" in line]
    assert len(plain) == 2
    assert "training_terms of x (5, 2), float32 on cpu" in plain[0]
    assert "no compiled rule for this derivative or transformation" in plain[0]
    assert "potential_and_map of x (5, 2), float32 on cpu" in plain[1]
    assert "the reference backend is in force" in plain[1]
    assert len(lines) == 3


def test_without_it_nothing_is_logged_and_nothing_is_wrapped():
    assert _lines(PROGRAM, None) == []
    assert _lines(PROGRAM, "") == []
    if not log.ENABLED:
        assert dispatch.potential_and_map.__code__.co_filename == dispatch.__file__
        assert log.watched(_lines) is _lines


def test_another_value_is_refused():
    assert "ILVAE_FAST_LOG: got 'plans', wanted one of plan" in _lines("import ilvae_fast", "plans")[-1]
