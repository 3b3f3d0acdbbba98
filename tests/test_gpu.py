"""Accuracy of the operators on a GPU, by the tolerance rule with the worst of several eager computations. Launches,
graphs, streams and refusals: test_cuda_device.py.

ILVAE_FAST_TEST_DEVICE=cpu rehearses these tests without a GPU. test_small_set is for compute-sanitizer.
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

SOFTPLUS, CELU, SQUARED = Activation("softplus", 1.0), Activation("celu", 1.0), Activation("squared_leaky_relu", 0.2)
RELU, SMOOTH, IDENTITY = Activation("relu"), Activation("smooth_leaky_relu", 0.2), Activation("identity")

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
    (200, (128, 90, 128, 101), 150, "identity"),
    (3, (240, 255), 130, "none"),
]
SMALL = [SHAPES[0], SHAPES[2], SHAPES[5], SHAPES[12]]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, *([torch.float16] if DEVICE == "cuda" else [])]
COTANGENTS = [(True, True), (True, False), (False, True)]


def tensors_of(shape, dtype, activation=SOFTPLUS, seed=0):
    width, hidden, rows, embedding = shape
    first = SQUARED if activation is RELU else activation
    activations = (first, *[activation] * (len(hidden) - 1), IDENTITY)
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


@pytest.mark.parametrize("activation", [SMOOTH, CELU, RELU], ids=lambda a: a.name)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_other_activations(shape, activation):
    # in 16 bits luck decides on which side of a kink of s or s' a pre-activation falls
    for dtype in DTYPES if activation is SMOOTH else DTYPES[:2]:
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
