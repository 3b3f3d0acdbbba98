"""Checkpoints: resuming after an interruption or SIGKILL, and refusing what does not fit."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from ilvae_fast.training import TrainConfig, reproduce, train
from ilvae_fast.training.state import Batches, Clock, Interrupts, Position, latest
from ilvae_fast.vae import VAE
from training_cases import OPTIONS, interrupted, small
from vae_cases import small_model

ROOT = Path(__file__).parents[2]


def test_the_position_survives_a_checkpoint():
    position = Position(torch.arange(6.0).view(3, 2))
    position.add(torch.tensor([1.0, 2.0, 3.0]))
    position.add(torch.tensor([1.0, 2.0, 3.0]))
    other = Position(torch.arange(6.0).view(3, 2))
    other.load_state_dict(position.state_dict())
    other.add(torch.tensor([1.0, 2.0, 3.0]))
    assert (other.step, other.step_in_epoch) == (3, 3)
    assert other.sums.tolist() == [3, 6, 9]
    assert position.step == 2
    assert other.data == position.data
    state = position.state_dict()
    with pytest.raises(ValueError, match=r"data: got training data with the checksum .*, wanted those of the check"):
        Position(torch.zeros(3, 2)).load_state_dict(state)
    del state["data"]  # as earlier versions had it
    earlier = Position(torch.zeros(3, 2))
    earlier.load_state_dict(state)
    assert earlier.data == Position(torch.zeros(3, 2)).data


def test_a_run_with_annealed_constants_resumes_without_a_warning(tmp_path):
    schedule = {"L1": {"kind": "linear", "start": 3.0, "end": 0.5, "steps": 10}, "L2": 0.8}
    config = small(tmp_path, annealing=schedule, checkpoint_every=4)
    interrupted(config)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the loaded state has")
        train(config)
        model = VAE.from_pretrained(tmp_path / "model")
    assert float(model.decoder.inverse_lipschitz_bound()) == pytest.approx(0.4)


def test_a_run_does_not_resume_with_other_data(tmp_path):
    x = np.random.default_rng(0).normal(size=(330, 4)).astype(np.float32)
    config = small(tmp_path / "run", data=f"npz:{tmp_path / 'x.npz'}", data_options={}, checkpoint_every=5)
    np.savez(tmp_path / "x.npz", x_train=x)
    interrupted(config)
    np.savez(tmp_path / "x.npz", x_train=x + 1)
    with pytest.raises(ValueError, match=r"data: got training data with the checksum"):
        train(config, lambda *_: pytest.fail("trained"))
    np.savez(tmp_path / "x.npz", x_train=x)
    assert train(config)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "contents.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_a_damaged_checkpoint_is_named(tmp_path, name, damage):
    config = small(tmp_path, checkpoint_every=4)
    checkpoint = interrupted(config)
    path = checkpoint / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-9] + (b"" if damage == "cut" else b"x" * 9))
    elif name == "contents.json":
        assert train(config)  # of an earlier version
        return
    with pytest.raises(ValueError, match=rf"output: {path} is not as it was written; remove {checkpoint} to go on"):
        train(config, lambda *_: pytest.fail("trained"))
    shutil.rmtree(checkpoint)
    assert train(config)


@pytest.mark.parametrize("content", ["", "[]", "{}", "3", '{"model.safetensors": 1}', '{"../x": [1, 2]}'])
def test_a_list_of_contents_that_is_none_is_named(tmp_path, content):
    config = small(tmp_path, checkpoint_every=4)
    checkpoint = interrupted(config)
    (checkpoint / "contents.json").write_text(content)
    with pytest.raises(ValueError, match=rf"output: {checkpoint}/.* is not as it was written; remove {checkpoint} to"):
        train(config, lambda *_: pytest.fail("trained"))


@pytest.mark.parametrize("content", ["", '{"nll": 1.5', "[1]"])
def test_damaged_measures_of_a_run_are_named(tmp_path, content):
    config = small(tmp_path, epochs=1)
    measures = train(config)
    path = tmp_path / "metrics.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"^{path}: .*; remove it, and the same command measures the model anew"):
        train(config)
    path.unlink()
    assert train(config) == measures


def test_a_damaged_configuration_of_a_run_is_named(tmp_path):
    config = small(tmp_path, epochs=1)
    train(config)
    path = tmp_path / "config.yaml"
    whole = path.read_bytes()
    for content in (b"", b"- 1", b"epochs: {", b"\xff\xfe", b"epochs: -3", b"epoch: 3", b"seed: 2001-99-99"):
        path.write_bytes(content)
        with pytest.raises((ValueError, TypeError), match=rf"^{path}: "):
            train(config)
    path.write_bytes(whole)
    assert train(config)


def test_a_damaged_state_of_a_diverged_run_is_named(tmp_path):
    path = tmp_path / "process0.pt"
    # the last two are programs that torch's reader starts, and fails within
    contents = (b"", b"PK\x03\x04", pickle.dumps(print), torch_bytes({"x": 3})[:-50], b"\x80\x02s.", b"\x80\x02M\x01")
    for content in (*contents, torch_bytes({"config": small_model().config.to_dict(), "model": {"x": torch.ones(1)}})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"^{path}: is not a state that a diverged run left"):
            reproduce(path)


def torch_bytes(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_tensorboard_shows_each_step_once(tmp_path):
    config = small(tmp_path, checkpoint_every=5, log_every=1)
    interrupted(config)
    train(config)
    shown: list[int] = []
    for path in sorted((tmp_path / "tensorboard").glob("events*"), key=lambda p: p.stat().st_mtime_ns):
        for event in EventFileLoader(str(path)).Load():
            if event.HasField("session_log"):  # a restart hides earlier events from this step on
                shown = [step for step in shown if step < event.step]
            shown += [event.step for value in event.summary.value if value.tag == "train/loss"]
    assert shown == list(range(1, 13))


def test_the_end_of_a_short_epoch_is_saved(tmp_path):
    assert interrupted(small(tmp_path)).name == "step-000000006"  # of 12, long before checkpoint_every


def test_checkpoints_follow_the_clock(tmp_path):
    assert interrupted(small(tmp_path, checkpoint_minutes=1e-9)).name == "step-000000008"


def test_the_clock_waits_for_minutes_and_for_epochs_worth_their_writing(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock(minutes=2)
    assert clock.due(end_of_epoch=True)
    assert not clock.due(end_of_epoch=False)
    with clock:
        now[0] += 3  # seconds of writing
    for waited, epoch, step in ((59, False, False), (61, True, False), (119, True, False), (120, True, True)):
        now[0] = 103 + waited
        assert (clock.due(True), clock.due(False)) == (epoch, step), waited


def ctrl_c(*at: int):
    """Progress that sends SIGINT to the process after steps ``at``, and notes the steps."""
    steps = []

    def progress(step, steps_in_all, values):
        steps.append(step)
        if step in at:
            os.kill(os.getpid(), signal.SIGINT)

    return progress, steps


def test_ctrl_c_saves_and_the_run_ends_bitwise_the_same(tmp_path):
    whole = train(small(tmp_path / "whole"))
    config = small(tmp_path / "run")
    progress, steps = ctrl_c(7)
    where = rf"^interrupted: the run in {tmp_path / 'run'} goes on from step 8 the next time$"
    with pytest.raises(KeyboardInterrupt, match=where):
        train(config, progress)
    assert steps[-1] == 8  # the step that was under way
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    seen = []
    assert train(config, lambda step, *_: seen.append(step)) == whole
    assert seen[0] == 9


def test_a_second_ctrl_c_does_not_wait(tmp_path, monkeypatch):
    def twice(*arguments):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")

    monkeypatch.setattr("ilvae_fast.training.loop._step", twice)
    with pytest.raises(KeyboardInterrupt, match="has no checkpoint yet and starts anew the next time"):
        train(small(tmp_path))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_launchers_may_pass_ctrl_c_on_to_those_that_had_it():
    interrupts = Interrupts(patient=True)
    interrupts.__enter__()
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGINT)
    assert interrupts.asked
    with pytest.raises(KeyboardInterrupt):
        interrupts.__exit__(None)


def test_a_handler_of_the_program_stays(tmp_path):
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(True))
    try:
        progress, steps = ctrl_c(3)
        train(small(tmp_path), progress)
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [True]
    assert steps[:12] == list(range(1, 13))


def test_epochs_may_be_raised(tmp_path):
    whole = train(small(tmp_path / "whole", epochs=3))
    config = small(tmp_path / "run")
    train(replace(config, epochs=1))
    interrupted(config)  # a finished run, then an interrupted one
    (tmp_path / "run" / "eval.json").write_text("{}")
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert train(config)["train_loss"] != whole["train_loss"]
    more = replace(config, epochs=3, num_importance_samples=4)
    seen = []
    assert train(more, lambda step, *_: seen.append(step))["train_loss"] == whole["train_loss"]
    assert seen[0] == 13
    assert not (tmp_path / "run" / "eval.json").exists()  # it was of two epochs
    states = [VAE.from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "run")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    for fields, change in (({"epochs": 2}, "epochs was 3, is 2"), ({"epochs": 4, "seed": 1}, "seed was 0, is 1")):
        with pytest.raises(ValueError, match=f"output: .* holds another run: {change}"):
            train(replace(more, **fields))


@pytest.mark.parametrize("most", [1500, 9000])
def test_a_checkpoint_that_cannot_be_written_is_named_and_gone(tmp_path, most):
    """Files may have so many bytes; torch and safetensors have errors of their own for that."""
    config = small(tmp_path, checkpoint_every=4)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step, steps, values):
        if step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))

    try:
        with pytest.raises(
            OSError, match=rf"checkpoint was not written, .* MiB are free .*'{tmp_path}/checkpoints/step-"
        ):
            train(config, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000004"]
    steps = []
    train(config, lambda step, *_: steps.append(step))
    assert steps[0] == 5


def refuse_with(number: int):
    def refuse(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, number):
    monkeypatch.setattr("fcntl.flock", refuse_with(number))
    with pytest.warns(UserWarning, match=rf"{tmp_path}: files cannot be locked there .*: make sure that only one"):
        assert train(small(tmp_path))


def test_folders_without_fsync_are_warned_of(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse(descriptor):
        return refuse_with(errno.EINVAL)() if stat.S_ISDIR(os.fstat(descriptor).st_mode) else fsync(descriptor)

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.warns(UserWarning, match=rf"{tmp_path}.*: its file system has no fsync .* may be lost"):
        assert train(small(tmp_path))
    assert latest(tmp_path / "checkpoints").name == "step-000000012"


# Imports once, then forks for each configuration that it reads and prints the number of the child; for an empty line it
# prints how the child ended.
RUNNER = """
import os, sys, torch, torch.utils.tensorboard
from ilvae_fast.training import TrainConfig, reproduce, train
torch.set_num_threads(1)
for line in sys.stdin:
    if line.strip():
        child = os.fork()
        if child == 0:
            train(TrainConfig.from_yaml(line.strip()))
            os._exit(0)
        print(child, flush=True)
    else:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Runner:
    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", RUNNER], env=environment, **pipes)

    def _ask(self, line: str) -> int:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, config: TrainConfig, folder: Path) -> int:
        path = folder / f"{config.folder.name}.yaml"
        path.write_text(config.to_yaml())
        return self._ask(str(path))

    def status(self) -> int:
        return self._ask("")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(10)


def test_a_run_resumes_with_more_processes_but_not_unsharded(tmp_path, monkeypatch):
    config = small(tmp_path, checkpoint_every=5)
    sharded = interrupted(config) / "pytorch_model_fsdp_0"
    sharded.mkdir()
    with pytest.raises(ValueError, match=r"output: .*step-000000005 is of a run that was sharded, wanted unsharded"):
        train(config)
    sharded.rmdir()
    # of two processes, with 3 steps instead of 6 to an epoch
    monkeypatch.setattr(
        "ilvae_fast.training.state.Batches", lambda x, size, seed, *_, **__: Batches(x, size, seed, 0, 2)
    )
    train(config)
    assert len(json.loads((tmp_path / "history.json").read_text())) == 2


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_bitwise_the_same(tmp_path):
    """Every step writes a checkpoint, so that most kills fall into the writing of one."""
    fields = {
        "epochs": 25, "checkpoint_every": 1, "model": "il-lidmvae", "L": 0.5, "warmup_steps": 10,
        "annealing": {"L1": {"kind": "cosine", "start": 3.0, "end": 0.7, "steps": 100}},
        "model_options": {**OPTIONS, "likelihood_options": {"variance": "optimal"}},
    }  # fmt: skip
    whole, killed = small(tmp_path / "whole", **fields), small(tmp_path / "killed", **fields)
    runner, checkpoints = Runner(), tmp_path / "killed" / "checkpoints"
    runner.start(whole, tmp_path)
    assert runner.status() == 0
    moments, steps = random.Random(0), []
    for _ in range(4):
        before, child = latest(checkpoints), runner.start(killed, tmp_path)
        deadline = time.monotonic() + 300
        while latest(checkpoints) == before:
            assert time.monotonic() < deadline, f"no checkpoint after {before} in five minutes"
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        assert runner.status() == -signal.SIGKILL, "the run was over before it was killed: make it longer"
        steps.append(latest(checkpoints).name)
    assert steps == sorted(set(steps))  # each resumed where the one before it was
    assert steps[-1] < "step-000000150"
    runner.start(killed, tmp_path)
    assert runner.status() == 0
    runner.close()
    for name in ("metrics.json", "history.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    models = [VAE.from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "killed")]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*"))
