"""Backends, build information, plans, and the messages of a mismatched installation."""

import os
import re
import subprocess
import sys

import pytest
import torch

import ilvae_fast as il
from cases import WAYS, Case
from ilvae_fast.operators import backend as _backend
from raw_operators import Operands, map_jvp, potential_and_map, training_terms


def test_use_backend_switches_and_restores():
    layer, x = il.BrenierMap(3, (4,)), torch.randn(2, 3, requires_grad=True)
    assert "PotentialAndMap" in layer(x).grad_fn.name()
    with il.use_backend("reference"):
        assert "PotentialAndMap" not in layer(x).grad_fn.name()
        with il.use_backend("native"):
            assert _backend.current_backend() == "native"
        assert _backend.current_backend() == "reference"
    with pytest.raises(KeyError), il.use_backend("reference"):
        raise KeyError
    assert _backend.current_backend() == "native"
    with pytest.raises(ValueError, match="backend: got 'numpy'"), il.use_backend("numpy"):
        pass


def _python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_the_environment_variable_sets_the_backend():
    code = "import ilvae_fast as il, ilvae_fast.operators.backend as b; print(b.current_backend())"
    assert _python(code, ILVAE_FAST_BACKEND="reference").stdout.strip() == "reference"
    assert "ILVAE_FAST_BACKEND: got 'fast'" in _python(code, ILVAE_FAST_BACKEND="fast").stderr


def test_build_info_describes_this_build():
    info = il.build_info()
    assert info["version"] == il.__version__
    assert info["torch"] == str(torch.__version__)
    assert info["cpu"] in ("avx512", "avx2", "baseline")
    assert (info["cuda"] is None) == (info["cuda_architectures"] == "")


VALUES = """
import torch, ilvae_fast as il
def numbers(*shape): return torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
x = numbers(9, 5).requires_grad_()
t = il.functional.brenier_map(
    x,
    numbers(51, 5),
    numbers(51),
    [numbers(17, 33).abs(), numbers(1, 17).abs()],
    activations=("softplus", "celu", "softplus"),
)
(g,) = torch.autograd.grad(t.square().sum(), x)
print(il.build_info()["cpu"], *t.flatten().tolist(), *g.flatten().tolist())
"""


@pytest.mark.skipif(il.build_info()["cpu"] == "baseline", reason="nothing to lower: this processor has no AVX2")
def test_every_instruction_set_computes_the_same():
    results = {}
    capabilities = ["default", "avx2", "avx512"]
    for capability in capabilities[: capabilities.index(il.build_info()["cpu"]) + 1]:  # what this processor has
        name, *numbers = _python(VALUES, ATEN_CPU_CAPABILITY=capability).stdout.split()
        results[name] = torch.tensor([float(n) for n in numbers], dtype=torch.float64)
    assert list(results)[:2] == ["baseline", "avx2"]
    for values in results.values():
        torch.testing.assert_close(values, results["baseline"], rtol=1e-12, atol=1e-13)


def test_a_mismatched_torch_is_named_with_the_cure():
    code = "import torch; torch.__version__ = '2.3.1'; import ilvae_fast"
    message = _python(code).stderr
    assert "was built for torch" in message
    assert re.search(r"and torch 2\.3\.1( with CUDA \S+)? is running", message)
    assert "pip install --no-build-isolation" in message


@pytest.mark.skipif(il.build_info()["cuda"] is not None, reason="this build has CUDA kernels")
def test_a_cuda_tensor_without_cuda_kernels_names_the_cure():
    tensors = Case(3, (4,), (il.Activation("softplus"),) * 2, "none", (2,), 0.5, 1).tensors(torch.float32)
    operands = Operands.of(tensors)
    calls = [
        (potential_and_map, {"want_potential": True, "want_map": True}),
        (training_terms, {"map_cotangent": tensors.v, "potential_cotangent": None, "saved": [], "wanted": 1}),
        (map_jvp, {"tangent": operands.x}),
    ]
    on_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)  # as the dispatcher has it for a CUDA tensor
    for operator, own in calls:
        with pytest.raises(NotImplementedError, match=r"no CUDA kernels.*use_backend"):
            operator.overload.redispatch(on_cuda, **operator.arguments(operands, **own))


# plans


def test_plan_counts_flops_and_bytes():
    forward = 2 * 510 * (2 * 129 + 64 * 64 + 64)  # multiply-adds of the map, counted as two
    kept = il.plan(510, 2, (64, 64), recompute=False)
    assert kept.map_flops == 2 * forward
    assert kept.training_flops == 4 * forward
    assert (kept.route, kept.recompute) == ("fused", False)
    assert kept.saved_bytes == 4 * 512 * (129 + 64)  # rows of whole vectors
    assert "Mflop" in str(kept)
    recomputed = il.plan(510, 2, (64, 64))
    assert (recomputed.route, recomputed.recompute) == ("fused", True)
    assert recomputed.training_flops == 6 * forward
    assert recomputed.saved_bytes == 0
    matmul = il.plan(510, 2, (64, 64), route="matmul")
    assert (matmul.route, matmul.recompute) == ("matmul", False)
    assert matmul.saved_bytes == 4 * 510 * (136 + 64)  # rows start at 16-byte boundaries
    assert il.plan(510, 2, (512, 512)).recompute is False
    assert "so few rows: matmul" in il.plan(1, 784, (512, 512)).reason
    assert "few" not in il.plan(1, 2, (64, 64)).reason
    assert il.plan(510, 2, (64, 64), dtype=torch.bfloat16).route == "matmul"


def test_plan_counts_the_embedding():
    wide, narrow = il.plan(128, 784, (512, 512)), il.plan(128, 784, (512, 512), embedding_features=10)
    skip = 2 * 128 * 784 * 1025
    assert wide.training_flops - narrow.training_flops == pytest.approx(2 * skip * (1 - 10 / 784))
    dense = il.plan(128, 784, (512, 512), embedding_features=10, embedding="dense")
    assert dense.map_flops > narrow.map_flops
    assert dense.saved_bytes == narrow.saved_bytes + 4 * 1025 * 10


@pytest.mark.parametrize(
    ("width", "hidden", "embedding"), [(5, (8, 7, 6), None), (9, (8,), "identity"), (9, (8, 3), "dense")]
)
@pytest.mark.parametrize(
    ("dtype", "way"),
    [*((torch.float64, way) for way in WAYS), (torch.float32, ("auto", False)), (torch.bfloat16, ("auto", None))],
)
def test_plan_predicts_what_is_saved(width, hidden, embedding, dtype, way):
    how = dict(zip(("route", "recompute"), way, strict=True))
    m = 4 if embedding else None
    layer = il.BrenierMap(width, hidden, dtype=dtype)
    b = {"dense": torch.randn(width, 4, dtype=dtype), "identity": width, None: None}[embedding]
    x = torch.randn(32, m or width, dtype=dtype)
    weights = layer.nonneg_weights()
    tensors = [x, *layer.parameters(), *weights, layer.inverse_lipschitz, *([b] if embedding == "dense" else [])]
    own = {t.untyped_storage().data_ptr() for t in tensors}
    sizes = []

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            sizes.append(t.numel() * t.itemsize)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        il.functional.brenier_map(
            x,
            layer.skip_weight,
            layer.bias,
            weights,
            activations=["softplus"] * len(hidden) + ["identity"],
            inverse_lipschitz=layer.inverse_lipschitz,
            embedding=b,
            **how,
        )
    plan = il.plan(32, width, hidden, embedding_features=m, embedding=embedding or "identity", dtype=dtype, **how)
    assert sum(sizes) == plan.saved_bytes


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((-1, 2, (3,)), {}, "batch: got -1"),
        ((1, 0, (3,)), {}, "in_features: got 0"),
        ((1, 2, ()), {}, "hidden_features: got"),
        ((1, 2, (3,)), {"embedding_features": 3}, "embedding_features: got 3, wanted 1 to 2"),
        ((1, 2, (3,)), {"embedding": "sparse"}, "embedding: got 'sparse'"),
        ((1, 2, (3,)), {"route": "fusd"}, "route: got 'fusd'"),
        ((1, 2, (3,)), {"route": "fused", "dtype": torch.bfloat16}, "route: got 'fused', wanted 'matmul' for bfloat16"),
    ],
)
def test_plan_refusals(arguments, options, words):
    with pytest.raises(ValueError, match=words):
        il.plan(*arguments, **options)


def test_plans_for_a_gpu():
    if not il.build_info()["cuda"]:
        pytest.skip("needs a build with CUDA")
    for hidden, how in (
        ((32, 32), "stay in"),
        ((64,) * 4, "stay in"),
        ((128,) * 3, "streamed"),
        ((256,) * 4, "streamed"),
    ):
        fused = il.plan(510, 64, hidden, device="cuda")
        assert (fused.route, fused.recompute, fused.saved_bytes) == ("fused", True, 0)
        assert how in fused.reason
    for shape, why in (((2, (32,) * 5), "4 hidden layers"), ((2, (512, 512)), "too wide")):
        matmul = il.plan(510, *shape, device="cuda")
        assert matmul.route == "matmul"
        assert why in matmul.reason
        with pytest.raises(ValueError, match=why):
            il.plan(510, *shape, device="cuda", route="fused")
    assert "float64" in il.plan(510, 2, (32, 32), dtype=torch.float64, device="cuda").reason
    dense = il.plan(510, 8, (32, 32), embedding_features=4, embedding="dense", device="cuda")
    assert "embedding" in dense.reason
    low = il.plan(510, 8, (304, 256), dtype=torch.bfloat16, device="cuda")
    assert low.saved_bytes == 2 * 510 * (568 + 304)


@pytest.mark.parametrize(
    ("name", "value", "off"), [("allow_tf32", True, False), ("fp32_precision", "tf32", "none")], ids=str
)
def test_plans_for_a_gpu_with_single_tf32_products(name, value, off):
    shape, matmul = (510, 256, (256, 256)), torch.backends.cuda.matmul
    before = il.plan(*shape, device="cuda")
    setattr(matmul, name, value)
    try:
        plan, forced = il.plan(*shape, device="cuda"), il.plan(*shape, device="cuda", route="fused")
    finally:
        setattr(matmul, name, off)
    if not il.build_info()["cuda"]:
        pytest.skip("needs a build with CUDA")
    assert before.route == "fused"
    assert plan.route == "matmul"
    assert "predicted" in plan.reason
    assert forced.route == "fused"
