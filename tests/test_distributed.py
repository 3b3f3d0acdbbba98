"""Two processes on the CPU (gloo): DDP, FSDP2, whole runs, and one that dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ilvae_fast.vae import VAE

ROOT = Path(__file__).parents[1]


def launch(task: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    script = [str(ROOT / "tests" / "two_processes.py"), task, str(folder)]
    return subprocess.run(
        [*command, *script], env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    process = launch("together", folder)
    assert process.returncode == 0, process.stderr[-4000:]
    return folder


@pytest.mark.slow
def test_gradients_are_those_of_one_process_with_ddp_and_fsdp2(together):
    assert [(together / f"gradients{rank}").read_text() for rank in (0, 1)] == ["equal"] * 2


@pytest.mark.slow
def test_measures_are_reduced(together):
    assert [(together / f"measures{rank}").read_text() for rank in (0, 1)] == ["equal"] * 2


@pytest.mark.slow
def test_a_run_of_two_processes_is_written_by_the_first_and_ends_alike_in_both(together):
    results = [json.loads((together / f"run{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0] == results[1] == json.loads((together / "run" / "metrics.json").read_text())
    assert len(json.loads((together / "run" / "history.json").read_text())) == 2
    assert len(list((together / "run" / "checkpoints").glob("step-*"))) == 2
    assert {p.name for p in (together / "run" / "checkpoints" / "step-000000022").glob("random_states*")} == {
        "random_states_0.pkl",
        "random_states_1.pkl",
    }
    assert VAE.from_pretrained(together / "run" / "model").sample(2).isfinite().all()
    assert torch.isfinite(torch.tensor(results[0]["nll"]))


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job_with_a_message(tmp_path):
    process = launch("killed", tmp_path)
    assert process.returncode != 0
    assert "SIGKILL" in process.stderr
    assert "rank" in process.stderr
    assert not list(tmp_path.glob("finished*"))
    assert not (tmp_path / "run" / "metrics.json").exists()
