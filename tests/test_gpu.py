"""The operators on a GPU: accuracy by the tolerance rule, launches, CUDA graphs, streams, refusals.

ILVAE_FAST_TEST_DEVICE=cpu rehearses what makes sense without a GPU. test_small_set is for compute-sanitizer.
"""

from __future__ import annotations

import os

import pytest
import torch

from cases import Case
from comparison import assert_as_accurate_as_eager, assert_equal_to_rounding
from ilvae_fast import Activation, functional, reference

DEVICE = os.environ.get("ILVAE_FAST_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU (benchmarks/gpu_acceptance.sh runs these)"
)
needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")

SOFTPLUS, CELU, SQUARED = Activation("softplus", 1.0), Activation("celu", 1.0), Activation("squared_leaky_relu", 0.2)
RELU, IDENTITY = Activation("relu"), Activation("identity")

# width, hidden, rows, embedding: every padded width of the fused kernels, ragged tiles, and shapes beyond them
SHAPES = [
    (2, (32, 32), 130, "none"),
    (1, (5,), 1, "none"),
    (3, (17, 9, 30, 4), 65, "none"),
    (2, (64, 64), 512, "none"),
    (20, (33, 64, 50), 77, "identity"),
    (32, (128, 128), 200, "none"),
    (64, (128, 100), 97, "none"),
    (128, (128,), 33, "identity"),
    (10, (100, 128, 90, 128), 64, "dense"),
    (64, (256, 256, 256), 128, "none"),
    (100, (300, 20), 70, "dense"),
    (784, (512,), 65, "identity"),
    (5, (6, 7, 8, 9, 10, 11), 40, "none"),
]
SMALL = [SHAPES[0], SHAPES[2], SHAPES[5], SHAPES[12]]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
COTANGENTS = [(True, True), (True, False), (False, True)]


def tensors_of(shape, dtype, activation=SOFTPLUS, seed=0):
    width, hidden, rows, embedding = shape
    first = SQUARED if activation is RELU else activation
    activations = (first, *[activation] * (len(hidden) - 1), SOFTPLUS if activation is CELU else IDENTITY)
    tensors = Case(width, hidden, activations, embedding, (rows,), 0.5, seed).tensors(dtype)
    tensors.named = {n: t.to(DEVICE) for n, t in tensors.named.items()}
    tensors.u, tensors.v = tensors.u.to(DEVICE), tensors.v.to(DEVICE)
    return tensors


def check(tensors, dtype, cotangents, restore_orders=3):
    exact = tensors.double()
    truth = dict(zip(("potential", "map"), exact.outputs(reference), strict=True))
    ours = dict(zip(("potential", "map"), tensors.outputs(functional), strict=True))
    truth |= exact.gradients(reference, *cotangents)
    ours |= tensors.gradients(functional, *cotangents)
    terms = {n: t.to(DEVICE) for n, t in tensors.absolute_terms(*cotangents).items()}
    if dtype == torch.float64:
        for name, t in ours.items():
            assert_equal_to_rounding(name, t.detach(), truth[name].detach(), terms.get(name))
        return
    eager = {name: [] for name in ours}
    for seed in range(restore_orders):
        other, restore = tensors.rearranged(seed)
        other.named = {n: t.detach() for n, t in other.named.items()}
        for name, t in zip(("potential", "map"), other.outputs(reference), strict=True):
            eager[name].append(t.detach())
        for name, t in restore(other.gradients(reference, *cotangents)).items():
            eager[name].append(t.detach())
    for name, t in ours.items():
        assert_as_accurate_as_eager(name, t.detach(), torch.stack(eager[name]), truth[name].detach(), terms.get(name))


@pytest.mark.parametrize("cotangents", COTANGENTS, ids=["v and u", "v", "u"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, cotangents):
    check(tensors_of(shape, dtype), dtype, cotangents)


@pytest.mark.parametrize("activation", [CELU, RELU], ids=["celu", "relu"])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_other_activations(shape, activation):
    for dtype in DTYPES:
        check(tensors_of(shape, dtype, activation), dtype, (True, True))


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_tf32_is_as_accurate_as_eager_with_tf32(shape):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        check(tensors_of(shape, torch.float32), torch.float32, (True, True))
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_small_set(shape):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = tensors_of(shape, dtype)
        assert all(t.isfinite().all() for t in tensors.gradients(functional, True, True).values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_every_time(dtype):
    for shape in SMALL:
        tensors = tensors_of(shape, dtype)
        first = tensors.gradients(functional, True, True)
        for _ in range(3):
            again = tensors.gradients(functional, True, True)
            for name, t in first.items():
                assert torch.equal(t, again[name]), f"{name} of {shape} differs between runs"


def test_an_empty_batch():
    tensors = tensors_of((3, (8, 8), 0, "none"), torch.float32)
    phi, t = tensors.outputs(functional)
    assert phi.shape == (0,)
    assert t.shape == (0, 3)
    for name, gradient in tensors.gradients(functional, True, True).items():
        assert (gradient == 0).all(), name


@needs_gpu
def test_mixed_devices_are_refused():
    tensors = tensors_of(SHAPES[0], torch.float32)
    tensors.named["bias"] = tensors.named["bias"].cpu()
    with pytest.raises(ValueError, match="bias: got device cpu"):
        tensors.outputs(functional)


@needs_gpu
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[5], SHAPES[9]], ids=str)
def test_graphs_replay_with_new_inputs_and_a_new_constant(shape):
    tensors = tensors_of(shape, torch.float32)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            tensors.gradients(functional, True, True)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = tensors.outputs(functional)
        gradients = tensors.gradients(functional, True, True)
    with torch.no_grad():
        tensors.named["x"].mul_(-0.5)
        tensors.named["inverse_lipschitz"].fill_(2.0)
    graph.replay()
    torch.cuda.synchronize()
    for ours, expected in zip(outputs, tensors.outputs(functional), strict=True):
        assert torch.equal(ours, expected)
    for name, expected in tensors.gradients(functional, True, True).items():
        assert torch.equal(gradients[name], expected), name


@needs_gpu
def test_work_goes_to_the_current_stream():
    tensors = tensors_of(SHAPES[5], torch.float32)
    expected = tensors.outputs(functional)[1]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # a wait that work on another stream would not see
        tensors.named["x"] = tensors.named["x"].detach() * 1.0
        result = tensors.outputs(functional)[1]
    side.synchronize()
    assert torch.equal(result, expected)


def launches(call) -> list[str]:
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    kernels = [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    internal = ("splitK", "Memset", "memset")  # of cuBLAS: second halves of one product
    return [name for name in kernels if not any(word in name for word in internal)]


@needs_gpu
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[3] == "none"], ids=str)
def test_launches(shape):
    tensors = tensors_of(shape, torch.float32)
    depth = len(shape[1])

    def brenier_map(route):
        with torch.no_grad():
            functional.brenier_map(*tensors.positional(), **tensors.options(), route=route)

    def training_terms(route):
        with torch.no_grad():
            functional.brenier_map_vjp(*tensors.positional(), **tensors.options(), route=route, map_cotangent=tensors.v)

    there, back = launches(lambda: brenier_map("matmul")), launches(lambda: training_terms("matmul"))
    assert len(there) <= 4 * depth + 4, there
    assert len(back) <= 6 * depth + 8 + 3 * depth + 1, back  # without anything saved the way up is walked again
    there, back = launches(lambda: brenier_map("auto")), launches(lambda: training_terms("auto"))
    if any("tile_kernel" in name for name in there):
        assert len(there) == 1, there
    if any("tile_kernel" in name for name in back):
        assert len(back) == 2, back
