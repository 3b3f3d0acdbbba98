"""Two processes on the CPU (gloo): DDP, FSDP2, whole runs by both, and one that dies."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType

from ilvae_fast.training import reproduce, train
from ilvae_fast.training.distributed import shard_options
from ilvae_fast.training.state import check, latest
from ilvae_fast.vae import VAE, DiagonalGaussian
from training_cases import state_of
from two_processes import config, same_noise

ROOT = Path(__file__).parents[2]
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def launch(task: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
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
def test_layers_take_a_batch_that_is_spread_over_the_processes(together):
    assert [(together / f"dtensors{rank}").read_text() for rank in (0, 1)] == ["equal"] * 2


@pytest.mark.slow
def test_measures_are_reduced(together):
    assert [(together / f"measures{rank}").read_text() for rank in (0, 1)] == ["equal"] * 2


@pytest.mark.slow
def test_only_the_first_process_writes_and_both_return_the_same(together):
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


# FSDP2 by the training loop


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    x = np.random.default_rng(0).normal(size=(1437, 6)).astype(np.float32)
    x[700] *= 100
    np.savez(folder / "outlier.npz", x_train=x)
    (folder / "killed").mkdir()
    assert "SIGKILL" in launch("killed", folder / "killed", **FSDP2).stderr
    assert [path.name for path in (folder / "killed" / "run" / "checkpoints").glob("step-*")] == ["step-000000007"]
    process = launch("sharded", folder, **FSDP2)
    assert process.returncode == 0, process.stderr[-4000:]
    return folder


@pytest.mark.slow
def test_a_sharded_run_matches_that_of_one_process(sharded, tmp_path, monkeypatch):
    monkeypatch.setattr(DiagonalGaussian, "_draw", DiagonalGaussian._draw)
    same_noise()
    alone = train(replace(config(tmp_path), batch_size=128))
    folder = sharded / "alike" / "run"
    losses = [json.loads((path / "history.json").read_text()) for path in (folder, tmp_path / "run")]
    assert losses[0] == [pytest.approx(epoch, rel=1e-5) for epoch in losses[1]]
    measures = json.loads((folder / "metrics.json").read_text())
    assert len(measures.pop("warnings", [])) == len(alone.pop("warnings", []))  # with rounded numbers in them
    assert measures == {k: v if isinstance(v, dict) else pytest.approx(v, rel=1e-3) for k, v in alone.items()}
    states = [state_of(VAE.from_pretrained(path / "model")) for path in (folder, tmp_path / "run")]
    for name, tensor in states[1].items():
        torch.testing.assert_close(states[0][name], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_each_process_holds_half_of_a_sharded_model(sharded):
    (units, here), (_, there) = (json.loads((sharded / f"held{rank}.json").read_text()) for rank in (0, 1))
    assert units == ["", "encoder", "decoder"]
    for (first, whole), (second, _) in zip(here, there, strict=True):
        assert first + second == whole
    for sizes in (here, there):
        assert sum(part for part, _ in sizes) == pytest.approx(sum(whole for _, whole in sizes) / 2, rel=0.05)


@pytest.mark.slow
def test_a_sharded_run_that_was_killed_ends_bitwise_the_same(sharded):
    for name in ("metrics.json", "history.json", "model/model.safetensors"):
        assert (sharded / "killed" / "run" / name).read_bytes() == (sharded / "run" / name).read_bytes()


@pytest.mark.slow
def test_a_diverging_sharded_run_is_reported_alike_and_reproduced(sharded):
    messages = [(sharded / f"diverged{rank}").read_text() for rank in (0, 1)]
    (stated,) = {re.search(r"gradient is that of (\S+), of norm (\S+);", message).groups() for message in messages}
    (path,) = (sharded / "out" / "diverged").glob("*.pt")
    rank = int(path.stem[-1])
    assert str(path) in messages[rank]
    assert "another process saved the state" in messages[1 - rank]

    model, outputs = reproduce(path)
    assert f"the loss is {max(output.loss.item() for output in outputs):g} nats" in messages[rank]
    sum(output.loss / len(outputs) for output in outputs).backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    assert stated[0] == max(norms, key=norms.get)
    assert float(stated[1]) == pytest.approx(norms[stated[0]] / 2, rel=0.01)  # of both, and the other's is small
    moments = torch.load(path, weights_only=True)["optimizer"]["state"]
    assert [moments[k]["exp_avg"].shape for k in moments] == [p.shape for p in model.parameters()]


@pytest.mark.parametrize("version", ["1", "3"])
def test_another_version_of_fsdp_is_refused(tmp_path, monkeypatch, version):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(ValueError, match=rf"fsdp_version: got {version}, wanted 2"):
        train(config(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"fsdp_version": 1}, "fsdp_version: got 1, wanted 2"),
        ({"activation_checkpointing": True}, "fsdp_activation_checkpointing: got true, wanted false"),
    ],
)
def test_plug_ins_with_other_options_are_refused(field, message):
    plugin = SimpleNamespace(**{"fsdp_version": 2, "activation_checkpointing": False, **field})
    state = SimpleNamespace(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    with pytest.raises(ValueError, match=message):
        shard_options(SimpleNamespace(state=state))


@pytest.mark.slow
def test_ctrl_c_saves_a_checkpoint_of_all_processes(tmp_path):
    """The terminal sends SIGINT to torchrun and to its processes, to which torchrun passes it on once more."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    given = ["--data", "toy", "--latent-dim", "2", "--epochs", "100000", "--cpu", "--output", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "stderr", "w") as errors:
        process = subprocess.Popen(
            [*command, "-m", "ilvae_fast", "train", *given], env=environment, stdout=subprocess.DEVNULL, stderr=errors,
            start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (first := latest(tmp_path / "run" / "checkpoints")):
            assert process.poll() is None, (tmp_path / "stderr").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    newest = latest(tmp_path / "run" / "checkpoints")
    assert newest.name > first.name
    assert len(list(newest.glob("random_states_*"))) == 2
    check(newest)
    printed = (tmp_path / "stderr").read_text()
    assert (
        f"interrupted: the run in {tmp_path / 'run'} goes on from step {int(newest.name[5:])} the next time" in printed
    )
