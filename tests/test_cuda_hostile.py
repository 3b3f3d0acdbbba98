"""The fused CUDA kernels executed on the host under hostile conditions: random networks, absent outputs, poisoned rows,
barriers taken away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import FIRST, LATER, SMOOTH
from cuda_cases import CODES, DTYPES, SOFT, Problem, Stacks, Sums, check, execute, launch, program
from executor import ROOT, ExecutorError, Program
from ilvae_fast import Activation

# ---- random networks, of shapes that other tests compile too


@st.composite
def networks(draw):
    kind = draw(st.sampled_from(["tf32x3", "bfloat16", "float16"]))
    depth = draw(st.integers(1, 3))
    hidden = tuple(draw(st.lists(st.integers(1, 32), min_size=depth, max_size=depth)))
    width = draw(st.integers(1, 16))
    parameters = {"softplus": (0.5, 1.0, 5.0), "celu": (0.5, 1.0, 2.0)}
    # in 16 bits, rounding decides on which side of a kink a pre-activation falls, and differently from eager's
    first, later = (FIRST, LATER) if kind == "tf32x3" else (SMOOTH, SMOOTH)
    activations = [draw(st.sampled_from(first)), *(draw(st.sampled_from(later)) for _ in range(depth))]
    problem = Problem.random(
        DTYPES[kind],
        draw(st.integers(1, 140)),
        width,
        hidden,
        tuple(Activation(a, draw(st.sampled_from(parameters[a])) if a in parameters else None) for a in activations),
        inputs=draw(st.integers(1, width)),
        seed=draw(st.integers(0, 2**16)),
    )
    if draw(st.booleans()):
        problem = Problem(problem.dtype, problem.activations, problem.named, problem.v, None)
    return kind, problem, draw(st.integers(1, 4)), draw(st.integers(0, 2**16))


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
@settings(max_examples=40)
@given(networks())
def test_random_networks(streamed, network):
    kind, problem, blocks, seed = network
    check(kind, problem, execute(kind, problem, blocks=blocks, seed=seed, streamed=streamed))


# ---- unwanted outputs


@pytest.mark.parametrize("kind", ["tf32x3", "bfloat16"])
@pytest.mark.parametrize("mode", ["plain", "races"])
def test_absent_outputs(kind, mode):
    hidden = (32, 20, 32) if kind == "tf32x3" else (40, 64)
    problem = Problem.random(DTYPES[kind], 150, 7, hidden, SOFT[: len(hidden) + 1], inputs=5)
    full = execute(kind, problem)
    there, back = program(kind, problem, False, mode), program(kind, problem, True, mode)
    for wanted in ("potential", "map"):
        out = torch.full_like(full[wanted], float("nan"))
        launch(there, problem, **{wanted: out}, seed=3)
        assert torch.equal(out, full[wanted]), f"{wanted} alone"
    sums = Sums.of(problem)
    launch(back, problem, sums=sums, seed=3)
    for name, value in sums.by_name().items():
        assert torch.equal(value, full[f"grad of {name}"]), name


# ---- non-finite and large values


@pytest.mark.parametrize("kind", sorted(DTYPES))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nonfinite_row_affects_no_other(kind, value):
    problem = Problem.random(DTYPES[kind], 75, 6, (32, 30), SOFT[:3])
    sound = execute(kind, problem)
    problem.named["x"][40, 2] = value
    spoilt = execute(kind, problem)
    rest = torch.arange(75) != 40
    for name in ("potential", "map", "grad of x"):
        assert torch.equal(spoilt[name][rest], sound[name][rest]), name
        assert not spoilt[name][40].isfinite().all(), name


def test_large_pre_activations_stay_finite():
    """Where softplus saturates, no intermediate value overflows."""
    for kind in ("tf32x3", "bfloat16"):
        problem = Problem.random(DTYPES[kind], 40, 6, (32, 30), SOFT[:3])
        problem.named["x"] = problem.named["x"] * 3e4
        for name, value in execute(kind, problem).items():
            assert value.isfinite().all(), f"{name} in {kind}"


# ---- barriers taken away


def source_of(name: str) -> Path:
    (path,) = (ROOT / "csrc" / "cuda").rglob(name)
    return path


def barriers() -> list[Any]:
    """Files and lines of the block barriers of the fused kernels."""
    found = []
    for name in ("fused.cuh", "tile.cuh", "streamed.cuh"):
        lines = source_of(name).read_text().splitlines()
        numbers = [number for number, line in enumerate(lines, 1) if "__syncthreads()" in line]
        assert numbers, f"{name} has no barriers"
        found += [pytest.param(name, number, id=f"{name} line {number}") for number in numbers]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "line"), barriers())
def test_the_absence_of_any_barrier_is_detected(name, line):
    streamed, fault = name == "streamed.cuh", {"without_barrier": (name, line)}
    problem = Problem.random(torch.bfloat16, 150 if streamed else 100, 7, (32, 30), SOFT[:3], inputs=5)
    with pytest.raises(ExecutorError, match=r"data race|uninitialised"):  # noqa: PT012 any launch may show it
        execute("bfloat16", problem, seed=2, mode="races", streamed=streamed, **fault)
        there, back = (program("bfloat16", problem, training, "races", streamed, **fault) for training in (False, True))
        launch(there, problem, potential=torch.zeros(len(problem.named["x"]), dtype=torch.bfloat16), blocks=1, seed=2)
        if streamed:  # without grad_x, A_k is not streamed on the way down
            sums, stacks = Sums.of(problem, streamed, blocks=1), Stacks.of(problem)
            launch(back, problem, sums=sums, stacks=stacks, blocks=1, seed=2)


# ---- other planted faults


def planted(folder: Path, name: str, *changes: tuple[str, str]) -> Path:
    """A folder to include, with a changed copy of one of the kernels' files; each changed text occurs once in it."""
    path = source_of(name)
    source = path.read_text()
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    copy = folder / path.relative_to(ROOT / "csrc")
    copy.parent.mkdir(parents=True)
    copy.write_text(source)
    return folder


WAIT, BARRIER, ISSUE = "    ptx::cp_async_wait<0>();\n", "    __syncthreads();\n", "    issue();\n    return slab;"
FAULTS = {
    "a slab read before it is there": [(WAIT + BARRIER, BARRIER)],
    "a slab overwritten before all have read it": [
        (WAIT + BARRIER, WAIT),
        (ISSUE, ISSUE.replace("\n", "\n" + BARRIER)),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", FAULTS.values(), ids=FAULTS)
def test_a_fault_in_streaming_is_detected(changes, tmp_path):
    include = planted(tmp_path, "streamed.cuh", *changes)
    problem = Problem.random(torch.float32, 40, 8, (40, 24), SOFT[:3])
    with pytest.raises(ExecutorError, match=r"data race|uninitialised"):
        execute("tf32x3", problem, seed=2, mode="races", streamed=True, include=include)


@pytest.mark.slow
def test_a_missing_flush_is_detected(tmp_path):
    changes = [("mma<kind>(sum, a.low[step], high[step]);", "mma<kind>(c, a.low[step], high[step]);")]
    changes += [("mma<kind>(sum, a.high[step], low[step]);", "mma<kind>(c, a.high[step], low[step]);")]
    changes += [("mma<kind>(sum, a.high[step], high[step]);", "mma<kind>(c, a.high[step], high[step]);")]
    include = planted(tmp_path, "fragments.cuh", *changes)
    problem = Problem.random(torch.float32, 32, 64, (256, 256), SOFT[:3], seed=5)
    with pytest.raises(AssertionError, match="error"):
        check("tf32x3", problem, execute("tf32x3", problem, streamed=True, include=include))


# ---- arrays of any type, stride and alignment


def strided(values: torch.Tensor, gap: int, offset: int) -> torch.Tensor:
    """The same rows within a larger array full of NaN, ``gap`` elements apart and starting at ``offset``."""
    rows = values.reshape(len(values), -1)
    room = torch.full((len(rows) * (rows.shape[1] + gap) + offset + 8,), float("nan"), dtype=values.dtype)
    view = room[offset:].as_strided(rows.shape, (rows.shape[1] + gap, 1))
    view.copy_(rows)
    return view


class Pointer:
    """A strided view by its address alone: the executor refuses tensors that are not contiguous."""

    def __init__(self, t):
        self.t, self.device = t, t.device

    def is_contiguous(self):
        return True

    def data_ptr(self):
        return self.t.data_ptr()


@pytest.mark.parametrize("gap", [0, 1, 4])
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_any_types_strides_and_alignments(gap, offset):
    problem = Problem.random(torch.bfloat16, 50, 12, (31, 32), (*SOFT[:2], Activation("identity")), inputs=8, seed=gap)
    exact = problem.to(torch.float64).plain()
    named = problem.named
    # every value is a bfloat16, which the wider types hold exactly
    arrays = [
        named["x"].float(),
        named["skip_weight"],
        named["bias"].half().float(),
        named["inverse_lipschitz"].double(),
    ]
    arrays += [problem.v, problem.u.float(), *(w.float() for w in problem.weights())]
    columns = [strided(a, gap if a.dim() > 1 else 0, offset) for a in arrays]
    formats = np.array([[CODES[a.dtype], c.stride(0)] for a, c in zip(arrays, columns, strict=True)])
    sizes = np.array([2, 12, 8, 50, 31, 32])
    pointers = [Pointer(c) for c in columns]
    result = {"potential": torch.zeros(50), "map": torch.zeros(50, 12), "grad of x": torch.zeros(50, 8)}
    names = [n for n in named if n not in ("x", "inverse_lipschitz")]
    count = sum(named[n].numel() for n in names)
    sums = torch.full((count + 1,), float("nan"))
    shape = {"KIND": "tf32x3", "WIDTH": 32, "INPUT": 16}
    there, back = (Program("fused_mixed", defines={**shape, "LAYERS": layers}) for layers in (0, 2))
    there.fused_mixed(sizes, formats, *pointers, result["potential"], result["map"], None, None, 1)
    back.fused_mixed(sizes, formats, *pointers, None, None, result["grad of x"], sums, 1)
    for name, part in zip(names, sums[:-1].split([named[n].numel() for n in names]), strict=True):
        result[f"grad of {name}"] = part.view_as(named[name])
    result["grad of inverse_lipschitz"] = sums[-1:]
    for name, value in result.items():
        error = (value.double() - exact[name]).abs().max() / exact[name].abs().max()
        assert error < 1e-5, f"{name}: {float(error):.3g}"
