"""The fused CUDA kernels, executed on the host (tests/executor) against float64."""

from __future__ import annotations

import pytest
import torch

from cases import FIRST, LATER
from cuda_cases import DTYPES, SOFT, Problem, check, execute
from ilvae_fast import Activation

SHAPES = [  # rows, width, hidden, input
    (37, 2, (32, 32), None),
    (70, 3, (20, 32), None),
    (1, 13, (17,), None),
    (33, 16, (64,), 5),
    (40, 33, (50, 64, 7), None),
    (19, 64, (32, 20, 9, 31), 60),
    (35, 16, (64, 64, 64, 64), None),
]
WIDE = [(21, 32, (128, 128), None), (35, 64, (100, 128), 40), (33, 100, (128,), None)]


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_networks(kind, shape):
    rows, width, hidden, inputs = shape
    problem = Problem.random(DTYPES[kind], rows, width, hidden, SOFT[: len(hidden) + 1], inputs=inputs)
    check(kind, problem, execute(kind, problem))


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_wide_networks(kind, shape):
    rows, width, hidden, inputs = shape
    problem = Problem.random(DTYPES[kind], rows, width, hidden, SOFT[: len(hidden) + 1], inputs=inputs, seed=1)
    check(kind, problem, execute(kind, problem))


@pytest.mark.parametrize("kind", ["tf32x3", "bfloat16"])
@pytest.mark.parametrize("name", FIRST)
def test_activations(kind, name):
    later = name if name in LATER else "celu"
    activations = (Activation(name), Activation(later), Activation("softplus", 2.0))
    problem = Problem.random(DTYPES[kind], 45, 5, (32, 24), activations, seed=3)
    check(kind, problem, execute(kind, problem))


@pytest.mark.parametrize(("v", "u"), [(True, True), (True, False), (False, True)])
def test_absent_cotangents(v, u):
    problem = Problem.random(torch.float32, 34, 4, (32, 16), SOFT[:3], v=v, u=u)
    check("tf32x3", problem, execute("tf32x3", problem))


@pytest.mark.parametrize("blocks", [1, 3, 8])
@pytest.mark.parametrize("kind", ["tf32x3", "float16"])
def test_any_number_of_blocks(kind, blocks):
    problem = Problem.random(DTYPES[kind], 150, 4, (32, 32), SOFT[:3])
    check(kind, problem, execute(kind, problem, blocks=blocks))


@pytest.mark.parametrize("kind", DTYPES)
def test_the_same_bits_in_every_order(kind):
    problem = Problem.random(DTYPES[kind], 75, 6, (32, 30), SOFT[:3])
    first = execute(kind, problem, seed=0)
    for seed in range(1, 5):
        for name, value in execute(kind, problem, seed=seed).items():
            assert torch.equal(value, first[name]), f"{name} with seed {seed}"


@pytest.mark.parametrize("mode", ["races", "memory"])
@pytest.mark.parametrize(("kind", "hidden"), [("tf32x3", (32, 20, 32)), ("bfloat16", (40, 64))])
def test_no_races_and_no_stray_accesses(kind, hidden, mode):
    problem = Problem.random(DTYPES[kind], 75, 7, hidden, SOFT[: len(hidden) + 1], inputs=5)
    check(kind, problem, execute(kind, problem, seed=2, mode=mode))


def test_three_passes_of_tf32_are_as_accurate_as_float32():
    """Tensor cores would lose two digits without the flush of the accumulator every 16 columns: csrc/cuda/fused.cuh."""
    problem = Problem.random(torch.float32, 64, 64, (128, 128), SOFT[:3], seed=5)
    ours, exact = execute("tf32x3", problem), problem.to(torch.float64).plain()
    for name in ("map", "grad of x", "grad of skip_weight", "grad of weights[0]"):
        error = (ours[name].double() - exact[name]).norm() / exact[name].norm()
        assert error < 8e-7, f"{name}: {float(error):.3g}"


def test_a_reduction_over_many_blocks():
    """More blocks than the reduction has warps, so that most warps add more than one part."""
    problem = Problem.random(torch.float32, 700, 2, (32,), SOFT[:2])
    check("tf32x3", problem, execute("tf32x3", problem, blocks=20))
