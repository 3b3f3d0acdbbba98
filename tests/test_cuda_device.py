"""The operators on a CUDA device. Skipped where there is none; the kernels themselves run everywhere on the host
executor (test_cuda_fused.py, test_cuda_pointwise.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ilvae_fast as il
from cases import Case
from comparison import assert_as_accurate_as_eager
from ilvae_fast import functional, reference
from raw_operators import MATMUL, Operands, potential_and_map, training_terms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SOFT = il.Activation("softplus")
# Networks of up to 4 layers of 256 take the fused kernels, from 128x3 on with streamed weights; the others take cuBLAS
# and the pointwise kernels.
NETWORKS = {
    "2, 32x2": Case(2, (32, 32), (SOFT,) * 3, "none", (130,), 0.7, 1),
    "5, 40x4": Case(5, (40, 24, 40, 33), (SOFT,) * 5, "identity", (3, 50), 0.7, 2),
    "64, 64x3": Case(64, (64, 64, 64), (SOFT,) * 4, "none", (257,), 0.7, 3),
    "32, 128x2": Case(32, (128, 128), (SOFT,) * 3, "none", (1000,), 0.7, 4),
    "64, 256x3": Case(64, (256, 256, 256), (SOFT,) * 4, "none", (300,), 0.7, 9),
    "200, 128x4": Case(200, (128, 70, 128, 101), (SOFT,) * 5, "identity", (150,), 0.7, 10),
    "48, 300x2": Case(48, (300, 296), (SOFT,) * 3, "identity", (200,), 0.7, 5),
    "6, 32x6": Case(6, (32,) * 6, (SOFT,) * 7, "none", (70,), 0.7, 6),
    "9, 24x2, dense": Case(9, (24, 24), (SOFT,) * 3, "dense", (70,), 0.7, 7),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cotangents", [(True, False), (True, True), (False, True)], ids=str)
def test_values_and_gradients(name, dtype, cotangents):
    tensors = NETWORKS[name].tensors(dtype)
    exact = tensors.double()
    terms = tensors.absolute_terms(*cotangents)
    tensors = tensors.to("cuda")
    with torch.no_grad():
        values = dict(zip(("potential", "map"), tensors.outputs(), strict=True))
        eager = dict(zip(("potential", "map"), tensors.outputs(reference), strict=True))
        exacts = dict(zip(("potential", "map"), exact.outputs(reference), strict=True))
    values |= tensors.gradients(functional, *cotangents)
    eager |= tensors.gradients(reference, *cotangents)
    exacts |= exact.gradients(reference, *cotangents)
    for key, value in values.items():
        ours, theirs, truth = value.detach().cpu(), eager[key].detach().cpu(), exacts[key].detach()
        if dtype == torch.float64:
            torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-11 * float(1 + truth.abs().max()))
        else:
            assert_as_accurate_as_eager(key, ours, theirs, truth, terms.get(key) if key != "x" else None)


@pytest.mark.parametrize("name", ["2, 32x2", "64, 256x3", "48, 300x2"])
def test_the_same_bits_every_time(name):
    tensors = NETWORKS[name].tensors(torch.float32).to("cuda")
    first = tensors.gradients(functional, True, True)
    for _ in range(3):
        for key, value in tensors.gradients(functional, True, True).items():
            assert torch.equal(value, first[key]), key


@pytest.mark.parametrize("name", ["2, 32x2", "32, 128x2", "64, 256x3", "48, 300x2"])
def test_captured_in_a_graph_with_a_schedule_of_constants(name):
    tensors = NETWORKS[name].tensors(torch.float32).to("cuda")
    constant = tensors.named["inverse_lipschitz"]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            tensors.gradients(functional, True, False)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tensors.gradients(functional, True, False)
    for value in (0.1, 2.0):
        with torch.no_grad():
            constant.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        for key, expected in tensors.gradients(functional, True, False).items():
            assert torch.equal(captured[key], expected), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layers", [1, 2, 3, 5])
@pytest.mark.parametrize("width", [16, 256, 320])
def test_launches(dtype, layers, width):
    """The matmul route launches at most 4K + 4 kernels for the map and 6K + 8 for the training terms; the fused route
    one for the map and two for the training terms, and K products more where weights are streamed."""
    case = Case(8, (width,) * layers, (SOFT,) * (layers + 1), "none", (64,), 0.7, 8)
    tensors = case.tensors(dtype).to("cuda")
    operands = Operands.of(tensors)

    def launches(call):
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        # without the auxiliary launches of cuBLAS
        return sum(not any(part in n for part in ("splitK", "Memset", "Memcpy")) for n in names)

    fused, streamed = width <= 256 and layers <= 4, width > 128
    outputs = {"want_potential": True, "want_map": True}
    count = launches(lambda: potential_and_map(operands, **outputs))
    assert 1 <= count <= (1 if fused else 4 * layers + 4)  # 0 would mean a blind profiler
    gradients = {
        "map_cotangent": tensors.v,
        "potential_cotangent": tensors.u,
        "saved": [] if fused else potential_and_map(operands, **outputs, save=True)[2],
        "wanted": operands.wanted(),
    }
    count = launches(lambda: training_terms(operands, **gradients))
    assert 2 <= count <= (2 + streamed * layers if fused else 6 * layers + 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_in_chunks(dtype):
    """More rows than the last products take at a time: the gradients are the sums of those of two halves."""
    case = Case(64, (256, 256, 256), (SOFT,) * 4, "none", (70_000,), 0.7, 11)
    tensors = case.tensors(dtype).to("cuda")
    whole = tensors.gradients(functional, True, True)
    x, u, v = tensors.named["x"].detach(), tensors.u, tensors.v
    parts = []
    for rows in (slice(0, 35_000), slice(35_000, None)):
        tensors.named["x"], tensors.u, tensors.v = x[rows], u[rows], v[rows]
        parts.append(tensors.gradients(functional, True, True))
    for key, value in whole.items():
        first, second = (p[key].float() for p in parts)
        expected = torch.cat([first, second]) if key == "x" else first + second
        scale = 2e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(value.float(), expected, rtol=scale, atol=scale * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["2, 32x2", "64, 256x3", "48, 300x2"])
def test_empty_batches(name):
    case = NETWORKS[name]
    tensors = replace(case, leading=(0,)).tensors(torch.float32).to("cuda")
    phi, t = tensors.outputs()
    assert phi.shape == (0,)
    assert t.shape == (0, case.width)
    for key, value in tensors.gradients(functional, True, True).items():
        assert value.shape == tensors.named[key].shape, key
        assert not value.any(), key


def test_mixed_devices_and_dtypes_are_named():
    tensors = NETWORKS["2, 32x2"].tensors(torch.float32).to("cuda")
    x, skip, bias, weights = tensors.positional()
    with pytest.raises(ValueError, match="bias: got device cpu, wanted cuda"):
        functional.brenier_map(x, skip, bias.cpu(), weights, **tensors.options())
    with pytest.raises(ValueError, match="skip_weight: got dtype Half, wanted Float"):
        functional.brenier_map(x, skip.half(), bias, weights, **tensors.options())


def test_the_fused_route_refuses_to_save():
    operands = Operands.of(NETWORKS["2, 32x2"].tensors(torch.float32).to("cuda"))
    call = {"want_potential": True, "want_map": True, "save": True}
    with pytest.raises(
        ValueError, match=rf"save: got True, wanted False on the fused route .* matmul route \({MATMUL}\)"
    ):
        potential_and_map(operands, **call)
    assert len(potential_and_map(replace(operands, route=MATMUL), **call)[2]) == 3


def test_another_stream():
    tensors = NETWORKS["32, 128x2"].tensors(torch.float32).to("cuda")
    expected = tensors.outputs()[1]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        result = tensors.outputs()[1]
    stream.synchronize()
    assert torch.equal(result, expected)


@pytest.mark.parametrize("hidden", [(64, 64), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, hidden):
    layer = il.BrenierMap(16, hidden, device="cuda")
    x = torch.randn(100, 16, device="cuda")
    with torch.autocast("cuda", dtype):
        low = layer(x)
    assert low.dtype == dtype
    low.float().square().sum().backward()
    assert layer.skip_weight.grad is not None
    assert layer.skip_weight.grad.dtype == torch.float32
    torch.testing.assert_close(low.float(), layer(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["2, 32x2", "64, 256x3"])
def test_tf32_by_either_name(name):
    tensors, matmul = NETWORKS[name].tensors(torch.float32).to("cuda"), torch.backends.cuda.matmul
    matmul.allow_tf32 = True
    try:
        expected = tensors.gradients(functional, True, True)
    finally:
        matmul.allow_tf32 = False
    matmul.fp32_precision = "tf32"  # the newer name, after which the older one raises
    try:
        for key, value in tensors.gradients(functional, True, True).items():
            assert torch.equal(value, expected[key]), key
    finally:
        matmul.fp32_precision = "none"
