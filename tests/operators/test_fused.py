"""The fused CPU route where property tests do not reach: many tiles, panels, chunks, threads, instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch

import ilvae_fast as il
from cases import Case, Tensors
from comparison import assert_equal_to_rounding
from ilvae_fast import functional, reference

# width, hidden, embedding, rows: tiles and panels whole and ragged, wide and narrow gradients, one layer and four
SHAPES = [
    (2, (32, 32), "none", 128),
    (3, (65,), "none", 1),
    (8, (64, 130), "identity", 100),
    (9, (7, 64, 5, 33), "dense", 300),
    (130, (70, 66), "none", 150),
    (130, (40, 129), "identity", 257),
    (70, (20, 30), "dense", 65),
    (5, (96, 96), "none", 3000),
]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _case(width, hidden, embedding, rows, recompute=None, output="softplus", later="celu") -> Case:
    names = ("softplus", *([later] * (len(hidden) - 1)), output)
    return Case(width, hidden, tuple(map(il.Activation, names)), embedding, (rows,), 0.8, 5, "fused", recompute)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("recompute", "output"), [(False, "softplus"), (True, "softplus"), (True, "identity")])
@pytest.mark.parametrize("count", [1, 2])
def test_values_and_gradients_equal_the_reference(shape, recompute, output, count):
    tensors = _case(*shape, recompute, output).tensors(torch.float64)
    with threads(count):
        ours = [*tensors.outputs(), *tensors.gradients(functional, True, True).values()]
        only_map = tensors.gradients(functional, True, False)
        only_potential = tensors.gradients(functional, False, True)
    terms = tensors.absolute_terms(True, True)
    theirs = [*tensors.outputs(reference), *tensors.gradients(reference, True, True).values()]
    for name, a, b in zip(["potential", "map", *tensors.named], ours, theirs, strict=True):
        assert_equal_to_rounding(name, a, b, terms.get(name))
    for one, arguments in ((only_map, (True, False)), (only_potential, (False, True))):
        for name, value in tensors.gradients(reference, *arguments).items():
            assert_equal_to_rounding(name, one[name], value, terms.get(name))


@pytest.mark.parametrize("shape", SHAPES)
def test_jvp_equals_the_reference(shape):
    tensors = _case(*shape).tensors(torch.float64)
    x, *rest = tensors.positional()
    ours = functional.brenier_map_jvp(x, x.cos(), *rest, **tensors.options())
    with il.use_backend("reference"):
        theirs = functional.brenier_map_jvp(x, x.cos(), *rest, **tensors.options())
    for name, a, b in zip(("map", "derivative"), ours, theirs, strict=True):
        assert_equal_to_rounding(name, a, b)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_same_bits_for_the_same_number_of_threads(shape, count):
    tensors = _case(*shape).tensors(torch.float32)
    with threads(count):
        first, second = (tensors.gradients(functional, True, True) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("route", ["fused", "matmul"])
@pytest.mark.parametrize("shape", [*SHAPES, (784, (512, 512), "none", 128), (300, (128, 128), "dense", 300)])
def test_the_same_bits_for_any_number_of_threads_where_algorithms_must_be_deterministic(shape, route):
    case = replace(_case(*shape), route=route)
    dtypes = (torch.float32, torch.float64) + ((torch.bfloat16,) if route == "matmul" else ())
    for dtype in dtypes:
        tensors = case.tensors(dtype).requires_grad()  # recorded or not, a product may be another
        results = []
        for count in range(1, 9):
            with threads(count), deterministic():
                x, *rest = tensors.positional()
                results.append(
                    {
                        **dict(zip(("potential", "map"), tensors.outputs(), strict=True)),
                        **tensors.gradients(functional, True, True),
                        "jvp": functional.brenier_map_jvp(x, x.cos(), *rest, **tensors.options())[1],
                    }
                )
                assert torch.get_num_threads() == count
        for result in results[1:]:
            for name, value in results[0].items():
                assert torch.equal(result[name], value), (dtype, name)


@pytest.mark.parametrize("route", ["fused", "matmul"])
@pytest.mark.parametrize("must_be_deterministic", [False, True])
def test_sixteen_python_threads_at_once_get_the_bits_of_one(route, must_be_deterministic):
    """They share the operands and torch's threads; what a call keeps from one to the next is of its thread."""
    shapes = SHAPES[2:5]
    problems = [replace(_case(*shape), route=route).tensors(torch.float32).requires_grad() for shape in shapes]

    def results(tensors: Tensors) -> list[torch.Tensor]:
        x, *rest = tensors.positional()
        jvp = functional.brenier_map_jvp(x, x.cos(), *rest, **tensors.options())[1]
        return [*tensors.outputs(), *tensors.gradients(functional, True, True).values(), jvp]

    start = threading.Barrier(16)

    def work(k: int) -> list[bool]:
        torch.set_num_threads(2)  # of new Python threads
        start.wait()
        pairs = [(results(problems[(k + i) % 3]), expected[(k + i) % 3]) for i in range(6)]
        return [torch.equal(a, b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)]

    with threads(2), deterministic() if must_be_deterministic else nullcontext():
        expected = [results(tensors) for tensors in problems]
        with ThreadPoolExecutor(16) as pool:
            assert all(all(same) for same in pool.map(work, range(16)))


def test_deterministic_gradients_equal_the_reference():
    """They are added up in more parts than there are threads."""
    for shape in SHAPES:
        tensors = _case(*shape).tensors(torch.float64)
        with threads(2), deterministic():
            ours = tensors.gradients(functional, True, True)
        terms, theirs = tensors.absolute_terms(True, True), tensors.gradients(reference, True, True)
        for name, value in theirs.items():
            assert_equal_to_rounding(name, ours[name], value, terms.get(name))


def test_saved_panels_outlive_a_change_of_the_number_of_threads():
    tensors = _case(9, (80, 64), "none", 200, recompute=False).tensors(torch.float64).requires_grad()
    with threads(1):
        t = functional.brenier_map(*tensors.positional(), **tensors.differentiable_options(functional))
    with threads(2):
        gradient = torch.autograd.grad(t, tensors.named["x"], tensors.v)[0]
    assert_equal_to_rounding("x", gradient, tensors.gradients(reference, True, False)["x"])


def test_overflow_in_padded_rows_is_harmless():
    # finite on the batch, where x = 1; infinite in float32 on padded rows, where x = 0
    x = torch.ones(3, 4)
    skip, bias = torch.full((9, 4), -1e20 / 4), torch.full((9,), 1e20)
    skip[8], bias[8] = 0.0, 0.0
    weights = [torch.full((1, 8), 0.5, requires_grad=True)]
    activations = ("squared_leaky_relu", "softplus")
    gradients = []
    for route in ("fused", "matmul"):
        t = functional.brenier_map(x, skip, bias, weights, activations=activations, route=route)
        gradients.append(torch.autograd.grad(t.sum(), weights)[0])
    assert bool(gradients[0].isfinite().all())
    torch.testing.assert_close(*gradients)


def test_a_large_bias_is_rounded_once():
    torch.manual_seed(0)
    x, row = torch.randn(64, 30), torch.randn(30)
    skip_weight, bias = torch.stack([row, torch.zeros(30)]), torch.tensor([1000.0, -1000.0])
    options = {"activations": ["identity", "identity"], "inverse_lipschitz": 0.0, "route": "fused"}
    phi = functional.potential(x, skip_weight, bias, [torch.ones(1, 1)], **options)
    half_a_unit = 2.0**-15  # in the last place of 1000
    assert (phi.double() - x.double() @ row.double()).abs().max() <= 1.1 * half_a_unit


def test_a_call_that_ran_out_of_memory_does_not_harm_the_next():
    code = """
import resource, torch, ilvae_fast as il
torch.set_num_threads(1)
def run(width):
    with torch.no_grad():
        return il.functional.brenier_map(torch.ones(64, 2), torch.ones(width + 1, 2), torch.ones(width + 1),
            [torch.ones(1, width)], activations=["softplus"] * 2, route="fused")
before = run(1000)
_, hard = resource.getrlimit(resource.RLIMIT_AS)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), hard))
try:
    run(1_000_000)
    raise SystemExit("was to run out of memory")
except (MemoryError, RuntimeError):
    pass
assert torch.equal(run(1000), before)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("rows", [1, 8, 9])
def test_the_map_of_few_rows_of_a_large_network(rows):
    tensors = replace(_case(200, (300, 300), "none", rows), route="auto").tensors(torch.float64)
    for name, a, b in zip(("potential", "map"), tensors.outputs(), tensors.outputs(reference), strict=True):
        assert_equal_to_rounding(name, a, b)


@pytest.mark.slow
def test_operands_above_the_budget_are_processed_in_chunks():
    case = _case(1500, (1500, 1500), "none", 1600, later="softplus")  # without kinks: float32 against float32
    with threads(2):
        ours = case.tensors(torch.float32).gradients(functional, True, False)
    matmul = replace(case, route="matmul").tensors(torch.float32)
    for name, value in matmul.gradients(functional, True, False).items():
        assert float((ours[name] - value).abs().max()) < 1e-5 * float(value.abs().max()), name


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_instruction_sets(capability):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            __file__,
            "-k",
            "reference or bits",
        ],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        check=True,
    )
