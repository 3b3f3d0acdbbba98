"""The CPU kernels on aarch64: cross-compiled, and run by an emulator.

tests/aarch64 makes a program of them without torch. Where the cross-compiler or the emulator is missing
(apt-get install g++-aarch64-linux-gnu qemu-user), the tests are skipped; .ci/run says so aloud.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cases import Case
from comparison import assert_as_accurate_as_eager, assert_equal_to_rounding
from ilvae_fast import Activation, reference
from ilvae_fast.operators.activations import encode

ROOT = Path(__file__).parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
BUILD = ROOT / "build" / "aarch64"
FLAGS = ["-std=c++20", "-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-UNDEBUG"]
FUSED, POINTWISE, IN_BFLOAT16, WEIGHTS = range(4)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"needs {COMPILER} and {EMULATOR}"
    ),
]


@pytest.fixture(scope="module")
def program() -> Path:
    """Compiled anew where a source has changed, by one of several test processes."""
    here, kernels = ROOT / "tests" / "aarch64", ROOT / "csrc" / "cpu"
    names = ("fused", "fused_baseline", "pointwise", "pointwise_baseline", "instruction_set")
    sources = [here / "kernels.cpp", *(kernels / f"{name}.cpp" for name in names)]
    version = subprocess.run([COMPILER, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(b"\0".join([version, *map(str.encode, FLAGS)]))
    for path in sorted(path for folder in (here, kernels, ROOT / "csrc" / "core") for path in folder.rglob("*.*")):
        digest.update(path.read_bytes())
    target = BUILD / f"kernels-{digest.hexdigest()[:16]}"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=BUILD) as folder:
                command = [COMPILER, *FLAGS, f"-I{here}", f"-I{ROOT / 'csrc'}", "-c"]
                running = [subprocess.Popen([*command, source], cwd=folder) for source in sources]
                assert [compilation.wait() for compilation in running] == [0] * len(sources)
                objects = [f"{source.stem}.o" for source in sources]
                link = [COMPILER, "-static", *objects, "-pthread", "-o", "kernels"]
                subprocess.run(link, cwd=folder, check=True)
                os.replace(Path(folder) / "kernels", target)
    return target


class Problem:
    """Input of the program: what kind of kernel, the dtype, threads, sizes, and tensors in its order."""

    def __init__(self, kind: int, dtype: torch.dtype, threads: int, deterministic: bool, sizes: Sequence[int]) -> None:
        header = (kind, dtype.itemsize, threads, deterministic, *sizes)
        self.content = struct.pack(f"<{len(header)}q", *header)

    def add(self, *tensors: Tensor) -> None:
        for t in tensors:
            self.content += t.detach().double().contiguous().numpy().tobytes()

    def add_activations(self, activations: Sequence[Activation]) -> None:
        encoded = encode([*activations, "identity"])
        for code, parameter in list(zip(encoded.codes, encoded.parameters, strict=True))[:-1]:
            self.content += struct.pack("<2d", code, parameter)

    def run(self, program: Path) -> Results:
        done = subprocess.run([EMULATOR, program], input=self.content, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return Results(torch.frombuffer(bytearray(done.stdout), dtype=torch.float64))


class Results:
    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    def take(self, *shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        taken, self.numbers = self.numbers[:count], self.numbers[count:]
        assert len(taken) == count
        return taken.reshape(shape)


CASES = [
    Case(3, (4, 5), tuple(map(Activation, ("softplus", "celu", "softplus"))), "none", (6,), 0.5, 1),
    Case(20, (17, 33, 9), tuple(map(Activation, ("leaky_relu", "smooth_leaky_relu", "softplus", "identity"))), "none",
         (101,), 0.3, 2),
    Case(12, (40, 24), tuple(map(Activation, ("squared_leaky_relu", "celu", "softplus"))), "identity", (70,), 1.0, 3),
    Case(30, (64, 50), tuple(map(Activation, ("softplus", "relu", "celu"))), "dense", (130,), 0.7, 4),
    Case(9, (96, 80), (Activation("softplus", 5.0), Activation("softplus"), Activation("softplus")), "none", (200,),
         0.0, 5),
]  # fmt: skip


@pytest.mark.parametrize(("threads", "deterministic"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.width}-{case.hidden}-{case.embedding}")
def test_the_fused_route(program, case, dtype, threads, deterministic):
    rows, inputs, width = case.leading[0], case.input, case.width
    tensors, tangent = case.tensors(dtype), torch.randn(rows, inputs, dtype=torch.float64).to(dtype)
    named, dense = tensors.named, case.embedding == "dense"
    sizes = (rows, inputs, width, dense, len(case.hidden), *case.hidden)
    problem = Problem(FUSED, dtype, threads, deterministic, sizes)
    problem.add_activations(case.activations)
    problem.add(named["inverse_lipschitz"], named["x"], tensors.v, tensors.u, tangent)
    weights = [name for name in named if name.startswith("weights")]
    problem.add(named["skip_weight"], named["bias"], *(named[name] for name in weights))
    if dense:
        problem.add(named["embedding"])
    results = problem.run(program)

    exact, terms = tensors.double(), tensors.absolute_terms(True, True)

    def values(t) -> dict[str, Tensor]:
        def of_x(x: Tensor) -> Tensor:
            return reference.brenier_map(x, *t.positional()[1:], **t.options(reference))

        along = tangent.to(t.u.dtype)
        potential, there = reference.potential_and_map(*t.positional(), **t.options(reference))
        return {"potential": potential, "map": there, "derivative": torch.func.jvp(of_x, (t.named["x"],), (along,))[1]}

    def check(name: str, ours: Tensor, eager: Tensor, wanted: Tensor, absolute: Tensor | None = None) -> None:
        if dtype == torch.float64:
            assert_equal_to_rounding(name, ours, wanted.detach(), absolute)
        else:
            assert_as_accurate_as_eager(name, ours.to(dtype), eager.detach(), wanted.detach(), absolute)

    eager, wanted = values(tensors), values(exact)
    check("potential", results.take(rows), eager["potential"], wanted["potential"])
    for name in ("map", "map", "derivative"):
        check(name, results.take(rows, width), eager[name], wanted[name])
    theirs, exactly = tensors.gradients(reference, True, True), exact.gradients(reference, True, True)
    for _ in ("recomputed", "saved"):
        ours = {"x": results.take(rows, inputs)}
        for name in ("skip_weight", "bias", "inverse_lipschitz", *weights):
            ours[name] = results.take(*named[name].shape)
        if dense:  # as csrc/cpu/fused_route.cpp completes it
            narrow = results.take(len(named["bias"]), inputs)
            ours["skip_weight"] = ours["skip_weight"] + narrow @ exact.named["embedding"].T
        for name, gradient in ours.items():
            check(f"gradient of {name}", gradient, theirs[name], exactly[name], terms.get(name))
    assert len(results.numbers) == 0


def _wanted(inner: Activation, outer: Activation, tensors: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The formulas of csrc/core/pointwise.h."""
    bias, weight, output_bias, a, a_tangent, g, g_tangent, o, o_tangent, u = tensors
    s, first, second = inner.derivatives(a + bias)
    yield from {"h": s, "h'": first * a_tangent}.items()
    yield from {"D": g * first, "D'": g_tangent * first + g * second * a_tangent}.items()
    complete, moved = o + s @ weight + output_bias, o_tangent + (first * a_tangent) @ weight
    phi, slope, curvature = outer.derivatives(complete)
    out, out_tangent = slope, curvature * moved + u * slope
    yield from {"o": complete, "o'": moved, "phi": phi, "D_out": out, "D'_out": out_tangent}.items()
    yield "D_K", out.unsqueeze(1) * weight * first
    yield "D'_K", out_tangent.unsqueeze(1) * weight * first + out.unsqueeze(1) * weight * second * a_tangent


@pytest.mark.parametrize("operand", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["softplus", "leaky_relu", "relu", "celu", "smooth_leaky_relu", "identity"])
def test_the_pointwise_kernels(program, operand, name):
    torch.manual_seed(0)
    inner, outer, rows, width = Activation(name), Activation("softplus", 2.0), 300, 37
    dtype = torch.float64 if operand == torch.float64 else torch.float32
    shapes = [(width,), (width,), (1,), *[(rows, width)] * 4, *[(rows,)] * 3]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    problem = Problem(IN_BFLOAT16 if operand == torch.bfloat16 else POINTWISE, dtype, 2, False, (rows, width))
    problem.add_activations([inner, outer])
    problem.add(*tensors)
    results = problem.run(program)
    rounding = 16 * torch.finfo(operand).eps
    for what, wanted in _wanted(inner, outer, [t.double() for t in tensors]):
        stays = what in ("o", "o'", "phi")  # in the type of the arithmetic
        tolerance = 64 * torch.finfo(dtype).eps if stays else rounding
        torch.testing.assert_close(
            results.take(*wanted.shape), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()), msg=what
        )
    assert len(results.numbers) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_softplus_of_weights(program, dtype):
    raw = torch.linspace(-60, 60, 1003, dtype=torch.float64).to(dtype)
    cotangent = torch.linspace(-1, 1, 1003, dtype=torch.float64).to(dtype)
    problem = Problem(WEIGHTS, dtype, 2, False, (1003,))
    problem.add(raw, cotangent)
    results = problem.run(program)
    exact = raw.double()
    rounding = 8 * torch.finfo(dtype).eps
    # of log1p(exp(x)) for x << 0 torch itself keeps no digit
    torch.testing.assert_close(results.take(1003), -torch.nn.functional.logsigmoid(-exact), rtol=rounding, atol=0)
    torch.testing.assert_close(results.take(1003), cotangent.double() * exact.sigmoid(), rtol=rounding, atol=0)
