"""Accuracy of the operators on a GPU, by the tolerance rule with the worst of several eager computations, and PyTorch's
transformations there. Launches, graphs, streams and refusals: test_cuda_device.py.

ILVAE_FAST_TEST_DEVICE=cpu rehearses these tests without a GPU. test_small_set is for compute-sanitizer.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

import ilvae_fast as il
from benchmarks.gpu import matmul_precision
from cases import Case
from comparison import assert_as_accurate_as_eager, assert_equal_to_rounding
from ilvae_fast import Activation, functional, reference
from ilvae_fast.operators.activations import encode

DEVICE = os.environ.get("ILVAE_FAST_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU (benchmarks/gpu_acceptance.sh runs these)"
)

SOFTPLUS, CELU, SQUARED = Activation("softplus", 1.0), Activation("celu", 1.0), Activation("squared_leaky_relu", 0.2)
RELU, SMOOTH, IDENTITY = Activation("relu"), Activation("smooth_leaky_relu", 0.2), Activation("identity")

# width, hidden, rows, embedding: ragged widths and tiles, and shapes beyond the fused kernels
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
    (200, (128, 90, 128, 101), 150, "identity"),
    (3, (240, 255), 130, "none"),
]
SMALL = [SHAPES[0], SHAPES[2], SHAPES[5], SHAPES[12]]
STREAMED = SHAPES[14]  # in 16 bits its rows are odd, and packed
DTYPES = [torch.float64, torch.float32, torch.bfloat16, *([torch.float16] if DEVICE == "cuda" else [])]
TF32_EPS = 2.0**-10
COTANGENTS = [(True, True), (True, False), (False, True)]


def compiled_networks() -> list[tuple[int, tuple[int, ...]]]:
    """Networks that take every shape of csrc/cuda/fused_shapes.h on a GPU with the shared memory of an H100."""
    text = (Path(__file__).parent.parent / "csrc" / "cuda" / "fused_shapes.h").read_text()
    resident = re.findall(r"S\((\d+), (\d+), ([1-9])\)", text)
    # the layers: too many for resident weights, and so many that not even the map has them
    streamed = [(n, d, k) for n, d in re.findall(r"S\((\d+), (\d+), true\)", text) for k in ("3", "4")]
    return [(int(d), (int(n),) * int(k)) for n, d, k in resident + streamed]


def tensors_of(shape, dtype, activation=SOFTPLUS, seed=0, route="auto"):
    width, hidden, rows, embedding = shape
    first = SQUARED if activation is RELU else activation
    activations = (first, *[activation] * (len(hidden) - 1), IDENTITY)
    tensors = Case(width, hidden, activations, embedding, (rows,), 0.5, seed, route).tensors(dtype)
    tensors.named = {n: t.to(DEVICE) for n, t in tensors.named.items()}
    tensors.u, tensors.v = tensors.u.to(DEVICE), tensors.v.to(DEVICE)
    return tensors


def check(tensors, dtype, cotangents, restore_orders=3, eps=None):
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
        outputs = dict(zip(("potential", "map"), other.outputs(reference), strict=True))
        for name, t in restore(outputs).items():
            eager[name].append(t)
        for name, t in restore(other.gradients(reference, *cotangents)).items():
            eager[name].append(t.detach())
    for name, t in ours.items():
        exactly, several = truth[name].detach(), torch.stack(eager[name])
        assert_as_accurate_as_eager(name, t.detach(), several, exactly, terms.get(name), eps)


@pytest.mark.parametrize("cotangents", COTANGENTS, ids=["v and u", "v", "u"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, cotangents):
    check(tensors_of(shape, dtype), dtype, cotangents)


@pytest.mark.parametrize("activation", [SMOOTH, CELU, RELU], ids=lambda a: a.name)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_other_activations(shape, activation):
    # in 16 bits luck decides on which side of a kink of s or s' a pre-activation falls
    for dtype in DTYPES if activation is SMOOTH else DTYPES[:2]:
        check(tensors_of(shape, dtype, activation), dtype, (True, True))


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_tf32_is_as_accurate_as_eager_with_tf32(shape):
    with matmul_precision("tf32"):
        check(tensors_of(shape, torch.float32), torch.float32, (True, True), eps=TF32_EPS)


@pytest.mark.parametrize("kind", ["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("network", compiled_networks(), ids=str)
def test_every_compiled_shape(network, kind):
    width, hidden = network
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    try:
        il.plan(70, width, hidden, dtype=dtype, route="fused", device=DEVICE)
    except ValueError as refusal:
        pytest.skip(str(refusal))  # less shared memory than an H100's; in the rehearsal, 16 bits on the CPU
    with matmul_precision(kind):
        tensors = tensors_of((width, hidden, 70, "none"), dtype, route="fused")
        check(tensors, dtype, (True, True), eps=TF32_EPS if kind == "tf32" else None)


@pytest.mark.parametrize("shape", [*SMALL, STREAMED], ids=str)
def test_small_set(shape):
    for dtype in DTYPES[1:]:
        tensors = tensors_of(shape, dtype)
        assert all(t.isfinite().all() for t in tensors.gradients(functional, True, True).values())
    with matmul_precision("tf32"):
        tensors = tensors_of(shape, torch.float32)
        assert all(t.isfinite().all() for t in tensors.gradients(functional, True, True).values())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[12], STREAMED], ids=str)
def test_transformations_see_what_the_operators_do(shape, dtype):
    """Fake tensors, compiled regions and torch.func give what the operators give by themselves."""
    tensors = tensors_of(shape, dtype)
    x, *rest = tensors.positional()
    options = tensors.options()
    codes, parameters, _ = encode(options["activations"])
    operands = (x, *rest, tensors.named["inverse_lipschitz"], None)
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor"]
    opcheck(
        torch.ops.ilvae_fast.potential_and_map.default, (*operands, codes, parameters, True, True), test_utils=utilities
    )
    everything = 0b1111 | ((1 << len(shape[1])) - 1) << 5
    terms = (*operands, tensors.v, tensors.u, [], codes, parameters, everything)
    opcheck(torch.ops.ilvae_fast.training_terms.default, terms, test_utils=utilities)

    def loss(x):
        phi, t = functional.potential_and_map(x, *rest, **options)
        return (tensors.v * t).sum() + (tensors.u * phi).sum()

    leaf = x.detach().requires_grad_()
    expected = torch.autograd.grad(loss(leaf), leaf)[0]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    eps = torch.finfo(dtype).eps
    for name, result in {
        "compiled": torch.autograd.grad(compiled(leaf), leaf)[0],
        "func": torch.func.grad(loss)(x.detach()),
    }.items():
        assert result.dtype == expected.dtype, name
        assert result.device == expected.device, name
        error, scale = (result - expected).abs().max(), expected.abs().max()
        assert error <= 8 * eps * scale, (name, error, scale)


# there is no other device to be on; the rehearsal runs it on the CPU
@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_device_that_is_not_the_current_one():
    device = "cuda:1" if DEVICE == "cuda" else DEVICE
    tensors = tensors_of(STREAMED, torch.float32)
    expected = tensors.gradients(functional, True, True)
    tensors.named = {n: t.detach().to(device) for n, t in tensors.named.items()}
    tensors.u, tensors.v = tensors.u.to(device), tensors.v.to(device)
    for name, value in tensors.gradients(functional, True, True).items():
        assert value.device == torch.device(device), name
        torch.testing.assert_close(value.cpu(), expected[name].cpu(), rtol=1e-4, atol=1e-4)
