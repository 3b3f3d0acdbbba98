"""The fused CUDA kernels with streamed weights, executed on the host (tests/executor) against float64."""

from __future__ import annotations

import pytest
import torch

from cuda_cases import DTYPES, SOFT, Problem, Stacks, Sums, check, execute, launch, program

# rows, width, hidden, input: every compiled shape, with widths that do not fill it
SHAPES = [
    (37, 64, (256, 256, 256), None),
    (21, 100, (130, 256), 40),
    (70, 12, (128, 100, 72, 128), None),
    (33, 200, (61, 128, 128), None),
]


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_networks(kind, shape):
    rows, width, hidden, inputs = shape
    problem = Problem.random(DTYPES[kind], rows, width, hidden, SOFT[: len(hidden) + 1], inputs=inputs)
    check(kind, problem, execute(kind, problem, streamed=True))


@pytest.mark.parametrize("kind", ["tf32x3", "bfloat16"])
@pytest.mark.parametrize("hidden", [(20,), (128, 96)])
@pytest.mark.parametrize(("v", "u"), [(True, False), (False, True)])
def test_shallow_networks_and_absent_cotangents(kind, hidden, v, u):
    problem = Problem.random(DTYPES[kind], 50, 8, hidden, SOFT[: len(hidden) + 1], v=v, u=u)
    check(kind, problem, execute(kind, problem, streamed=True))


def small(kind: str, rows: int = 150) -> Problem:
    """Several tiles for each of two blocks."""
    return Problem.random(DTYPES[kind], rows, 8, (40, 128, 24), SOFT[:4], inputs=5, seed=7)


@pytest.mark.parametrize("kind", ["tf32x3", "bfloat16"])
def test_the_same_bits_in_every_order_and_in_any_number_of_blocks(kind):
    problem = small(kind, 100)
    first = execute(kind, problem, seed=0, streamed=True)
    for seed in range(1, 4):
        for name, value in execute(kind, problem, seed=seed, streamed=True).items():
            assert torch.equal(value, first[name]), f"{name} with seed {seed}"
    for blocks in (1, 5):
        check(kind, problem, execute(kind, problem, blocks=blocks, streamed=True))


@pytest.mark.parametrize("mode", ["races", "memory"])
@pytest.mark.parametrize("kind", ["tf32x3", "bfloat16"])
def test_no_races_and_no_stray_accesses(kind, mode):
    problem = small(kind, 70 if kind == "tf32x3" else 140)
    check(kind, problem, execute(kind, problem, seed=2, mode=mode, streamed=True))


@pytest.mark.parametrize("kind", ["tf32x3", "bfloat16"])
@pytest.mark.parametrize("mode", ["plain", "races"])
def test_absent_outputs(kind, mode):
    problem = small(kind)
    full = execute(kind, problem, streamed=True)
    there, back = (program(kind, problem, training, mode, streamed=True) for training in (False, True))
    for wanted in ("potential", "map"):
        out = torch.full_like(full[wanted], float("nan"))
        launch(there, problem, **{wanted: out}, seed=3)
        assert torch.equal(out, full[wanted]), f"{wanted} alone"
    # parameters alone: A_k is streamed only once
    sums, stacks = Sums.of(problem, streamed=True), Stacks.of(problem)
    launch(back, problem, sums=sums, stacks=stacks, seed=3)
    gradients, left = sums.by_name(), stacks.gradients(problem)
    gradients["skip_weight"] = torch.cat([left.pop("skip_weight"), gradients["skip_weight"]])
    for name, value in (gradients | left).items():
        assert torch.equal(value, full[f"grad of {name}"]), name
    # x alone: no operands of products are written
    grad_x = torch.full_like(full["grad of x"], float("nan"))
    launch(back, problem, grad_x=grad_x, sums=Sums.of(problem, streamed=True), seed=3)
    assert torch.equal(grad_x, full["grad of x"])


@pytest.mark.parametrize(
    ("kind", "width", "hidden", "packed"),
    [
        ("tf32x3", 9, (33, 17), 0),  # in pieces of 4 bytes
        ("bfloat16", 8, (40, 24), 0),
        ("bfloat16", 10, (38, 22), 0),  # in pieces of 4 bytes
        ("float16", 9, (40, 24), 1),
        ("bfloat16", 9, (33, 24), 2),
    ],
)
def test_only_odd_rows_of_16_bits_are_packed(kind, width, hidden, packed):
    """All other weights are streamed from where they are, which saves a launch."""
    problem = Problem.random(DTYPES[kind], 20, width, hidden, SOFT[:3])
    potential = torch.zeros(20, dtype=problem.dtype)
    there = program(kind, problem, False, streamed=True)
    assert launch(there, problem, potential=potential, blocks=1) == packed
    check(kind, problem, execute(kind, problem, streamed=True))


def test_three_passes_of_tf32_are_as_accurate_as_float32():
    """Tensor cores would lose two digits without the flush of the accumulator: csrc/cuda/fragments.cuh."""
    problem = Problem.random(torch.float32, 32, 64, (256, 256), SOFT[:3], seed=5)
    ours, exact = execute("tf32x3", problem, streamed=True), problem.to(torch.float64).plain()
    for name in ("map", "grad of x", "grad of skip_weight", "grad of weights[0]"):
        error = (ours[name].double() - exact[name]).norm() / exact[name].norm()
        assert error < 8e-7, f"{name}: {float(error):.3g}"
