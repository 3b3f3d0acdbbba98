"""The acceptance script, rehearsed without a GPU: every stage runs its steps, and says what failed or was cut off."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEPS = {
    "check": {
        "build": "rehearsed",
        "import": "rehearsed",
        "device_tests": "ok",
        "memcheck": "rehearsed",
        "racecheck": "rehearsed",
    },
    "bench": {"build": "rehearsed", "bench": "ok"},
    "profile": {
        "build": "rehearsed",
        "breakdown": "ok",
        "target0": "ok",
        "ncu0": "rehearsed",
        "target1": "ok",
        "ncu1": "rehearsed",
    },
}


def run(tmp_path, *arguments, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_acceptance.sh"), *arguments],
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "ILVAE_FAST_ACCEPTANCE": str(tmp_path),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", STEPS)
def test_a_stage_runs_all_its_steps(stage, tmp_path):
    result = run(tmp_path, stage, "--dry-run")
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / stage / "stage.json").read_text())
    assert {step["step"]: step["status"] for step in found["steps"]} == STEPS[stage]
    commands = {step["step"]: step["command"] for step in found["steps"]}
    if stage == "check":
        assert "compute-sanitizer --tool racecheck" in commands["racecheck"]
    if stage == "profile":
        assert "--set detailed" in commands["ncu0"]
        assert "--clock-control none" in commands["ncu0"]
        assert json.loads((tmp_path / stage / "breakdown.json").read_text())["rows"]
    if stage == "bench":
        rows = json.loads((tmp_path / stage / "bench.json").read_text())
        assert rows["rehearsal"] is True
        assert not rows["failed"]
        for row in rows["rows"]:
            assert row["predicted_microseconds"] > 0
            assert set(row["called"]) >= {"ours", "eager double backward", "closed form, compiled"}


def test_what_is_cut_off_is_named(tmp_path):
    result = run(tmp_path, "bench", "--dry-run", ILVAE_FAST_STAGE_SECONDS="3")
    assert result.returncode == 0, result.stderr
    assert "bench: CUT OFF, no time left" in result.stdout
    found = json.loads((tmp_path / "bench" / "stage.json").read_text())
    assert [step["status"] for step in found["steps"]] == ["rehearsed", "cut off"]


def test_a_step_that_fails_fails_the_stage(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('planted')\n")
    result = run(tmp_path, "bench", "--dry-run", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert "bench: failed" in result.stdout
    assert "planted" in result.stdout


def test_a_step_that_failed_before_it_was_cut_off_has_failed(tmp_path):
    (tmp_path / "pytest.py").write_text("import time\nprint('1 failed', flush=True)\ntime.sleep(60)\n")
    result = run(tmp_path, "check", "--dry-run", PYTHONPATH=str(tmp_path), ILVAE_FAST_STAGE_SECONDS="8")
    assert result.returncode == 1, result.stdout
    assert "device_tests: failed" in result.stdout
    assert (tmp_path / "check.tar.gz").stat().st_size > 0


@pytest.mark.parametrize("arguments", [[], ["everything"], ["check", "--dry"]])
def test_usage(tmp_path, arguments):
    result = run(tmp_path, *arguments)
    assert result.returncode == 2
    assert "check      build, tests on the device" in result.stderr
