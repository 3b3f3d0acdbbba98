"""The host side of the fused CUDA route (csrc/cuda/fused_route.cpp) on CPU tensors, with the kernels on the host
executor: views, chunks, types, and what is not wanted. Allocation and streams are the business of test_cuda_device.py.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_cuda_fused import SOFT, Problem, check
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from executor import BUILD, COMPILER, FLAGS, HERE, KERNEL_FLAGS, ROOT, RUNTIME, Program, _built
from ilvae_fast.operators.activations import encode

KINDS = {"tf32x3": torch.float32, "bfloat16": torch.bfloat16}
RESIDENT, STREAMED = (9, (20, 32)), (41, (100, 71, 128))  # width, hidden
MOST = 256 << 20


@pytest.fixture(scope="module")
def route():
    """The operators of tests/executor/route/route.cpp."""
    folder, constant = HERE / "route", "constexpr int64_t most_stacked_bytes"
    text = (ROOT / "csrc" / "cuda" / "fused_route.cpp").read_text()
    assert text.count(constant) == 1
    text = text.replace(constant, "int64_t most_stacked_bytes")
    source = BUILD / f"fused_route-{hashlib.sha256(text.encode()).hexdigest()[:16]}.inc"
    if not source.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as temporary:
            copy = Path(temporary) / source.name
            copy.write_text(text)
            os.replace(copy, source)  # other test processes do the same
    torch_flags = [f for path in include_paths() for f in ("-isystem", path)]
    torch_flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    objects = [_built(HERE / f"{part}.cpp", ".o", [COMPILER, *FLAGS, "-c"]) for part in RUNTIME]
    objects.append(_built(folder / "kernels.cpp", ".o", [COMPILER, *FLAGS, *KERNEL_FLAGS, "-c"]))
    command = [COMPILER, f"-I{folder}", *FLAGS, "-O0", *torch_flags, f'-DSOURCE="{source}"', "-c"]
    route = _built(folder / "route.cpp", ".o", command)
    libraries = ["-Wl,--no-as-needed", *(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
    torch.ops.load_library(Program("route")._link(route, objects, libraries))
    return torch.ops.ilvae_route


@pytest.fixture(autouse=True)
def _one_chunk(route) -> Iterator[None]:
    yield
    route.stack_at_most(MOST)


def as_it_is(t: Tensor) -> Tensor:
    return t


def sliced(t: Tensor) -> Tensor:
    """The same in an odd place of a larger tensor full of NaN; vectors with gaps."""
    room = torch.full((t.shape[0] + 1, *(3 * s + 4 for s in t.shape[1:])), float("nan"), dtype=t.dtype)
    view = room[1:, 3 : 3 + t.shape[1]] if t.dim() > 1 else room.new_full((3 * len(t) + 1,), float("nan"))[1::3]
    return view.copy_(t)


def transposed(t: Tensor) -> Tensor:
    return t.t().contiguous().t() if t.dim() > 1 else t


def everything(problem: Problem) -> int:
    return 0b1111 | ((1 << len(problem.weights())) - 1) << 5


def run(
    route,
    problem: Problem,
    *,
    layout: Callable[[Tensor], Tensor] = as_it_is,
    operands: torch.dtype | None = None,
    outputs: tuple[bool, bool] = (True, True),
    wanted: int | None = None,
) -> dict[str, Tensor]:
    """What is wanted of potential, map and gradients, named as by :meth:`Problem.plain`."""
    named, weights = problem.named, problem.weights()
    x, skip_weight, bias, *weights = map(layout, (named["x"], named["skip_weight"], named["bias"], *weights))
    codes, parameters, _ = encode(problem.activations)
    arguments = (x, skip_weight, bias, weights, named["inverse_lipschitz"], codes, parameters, operands)
    v, u = (None if t is None else layout(t) for t in (problem.v, problem.u))
    wanted = everything(problem) if wanted is None else wanted
    gradients = route.terms(*arguments, v, u, wanted)
    names = ["x", "skip_weight", "bias", "inverse_lipschitz", "", *(n for n in named if n.startswith("weights"))]
    values = zip(("potential", "map"), route.map(*arguments, *outputs), outputs, strict=True)
    result = {n: t for n, t, is_wanted in values if is_wanted}
    for i, (name, gradient) in enumerate(zip(names, gradients, strict=True)):
        if (wanted >> i) & 1:
            assert (gradient.dtype, gradient.shape) == (named[name].dtype, named[name].shape), name
            result[f"grad of {name}"] = gradient
        else:
            assert gradient.numel() == 0, name
    return result


def random(kind: str, shape, rows: int, **options) -> Problem:
    width, hidden = shape
    return Problem.random(KINDS[kind], rows, width, hidden, SOFT[: len(hidden) + 1], **options)


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in ours.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [RESIDENT, STREAMED], ids=["resident", "streamed"])
@pytest.mark.parametrize("cotangents", [(True, True), (True, False), (False, True)], ids=str)
def test_values_and_gradients(route, kind, shape, cotangents):
    v, u = cotangents
    problem = random(kind, shape, 77, inputs=shape[0] - 3, v=v, u=u)
    check(kind, problem, run(route, problem))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [150, 128, 97])
def test_chunks(route, kind, rows):
    """The same gradients, but for the order of sums; what belongs to a row bit for bit."""
    problem = random(kind, STREAMED, rows, inputs=30)
    whole = run(route, problem)
    route.stack_at_most(rows * 600)  # 2 (48 + 176 + 304) elements a row
    parts = run(route, problem)
    assert_same({n: parts[n] for n in ("potential", "map", "grad of x")}, whole)
    for name, value in parts.items():
        scale = float(whole[name].abs().max())
        tolerance = 2e-6 if kind == "tf32x3" else 2e-2
        torch.testing.assert_close(value, whole[name], rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [RESIDENT, STREAMED], ids=["resident", "streamed"])
@pytest.mark.parametrize("layout", [sliced, transposed])
def test_any_strides(route, kind, shape, layout):
    problem = random(kind, shape, 60)
    route.stack_at_most(40_000)
    assert_same(run(route, problem, layout=layout), run(route, problem))


def test_expanded_cotangents(route):
    problem = random("tf32x3", STREAMED, 40)
    problem.v, problem.u = torch.ones(40, 41), torch.full((40,), 0.5)
    expected = run(route, problem)
    problem.v, problem.u = torch.ones(()).expand(40, 41), torch.tensor(0.5).expand(40)
    assert_same(run(route, problem), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [RESIDENT, STREAMED], ids=["resident", "streamed"])
def test_what_is_not_wanted(route, kind, shape):
    problem = random(kind, shape, 60, inputs=5)
    route.stack_at_most(20_000)
    full = run(route, problem)
    gradients = [i for i in range(5 + len(shape[1])) if i != 4]
    subsets = [sum(1 << i for i in some) for n in (1, 2) for some in itertools.combinations(gradients, n)]
    for wanted in [0, *subsets]:
        outputs = (wanted % 2 == 0, wanted % 2 == 1)
        ours = run(route, problem, outputs=outputs, wanted=wanted)
        # fewer operands to keep: fewer chunks, so other sums over them
        for name, value in ours.items():
            exact = name in ("potential", "map", "grad of x") or shape is RESIDENT
            scale = 0.0 if exact else 2e-6 if kind == "tf32x3" else 2e-2
            torch.testing.assert_close(value, full[name], rtol=0, atol=scale * float(full[name].abs().max()), msg=name)


@pytest.mark.parametrize("shape", [RESIDENT, STREAMED], ids=["resident", "streamed"])
@pytest.mark.parametrize(
    ("tensors", "operands"),
    [
        (torch.float32, torch.bfloat16),  # autocast
        (torch.float64, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_products_in_another_type(route, shape, tensors, operands):
    """Whatever torch.ops.ilvae_fast.* take."""
    # values that both types hold
    problem = random("bfloat16", shape, 77, inputs=shape[0] - 3).to(tensors)
    route.stack_at_most(100_000)
    ours, exact = run(route, problem, operands=operands), problem.to(torch.float64).plain()
    for name, value in ours.items():
        if not name.startswith("grad"):
            assert value.dtype == operands, name
        coarse = torch.bfloat16 in (operands, value.dtype)
        error = (value.double() - exact[name]).abs().max() / exact[name].abs().max()
        assert error < (2e-2 if coarse else 1e-5), f"{name}: {float(error):.3g}"


@pytest.mark.parametrize("shape", [RESIDENT, STREAMED], ids=["resident", "streamed"])
def test_tf32_by_either_name(route, shape):
    problem, matmul = random("tf32x3", shape, 40), torch.backends.cuda.matmul
    full = run(route, problem)
    matmul.allow_tf32 = True
    try:
        expected = run(route, problem)
    finally:
        matmul.allow_tf32 = False
    matmul.fp32_precision = "tf32"  # the newer name; the older one then raises
    try:
        assert_same(run(route, problem), expected)
    finally:
        matmul.fp32_precision = "none"
    assert not torch.equal(full["map"], expected["map"])
    check("tf32", problem, expected)


@pytest.mark.parametrize("shape", [RESIDENT, STREAMED], ids=["resident", "streamed"])
def test_empty_batches(route, shape):
    problem = random("tf32x3", shape, 0)
    for name, value in run(route, problem).items():
        assert not value.any(), name
