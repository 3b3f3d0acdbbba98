"""Loading anything runs nothing: a pickle that makes a folder is planted in every file that the package reads."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from ilvae_fast import data
from ilvae_fast.training import TrainConfig, reproduce, state, train
from ilvae_fast.vae import VAE
from training_cases import interrupted, small
from vae_cases import small_model


class Planted:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def _zip_of_torch(planted: Planted) -> bytes:
    content = io.BytesIO()
    torch.save({"model": planted}, content)
    return content.getvalue()


def _legacy_of_torch(planted: Planted) -> bytes:
    content = io.BytesIO()
    torch.save({"model": planted}, content, _use_new_zipfile_serialization=False)
    return content.getvalue()


def _npy(planted: Planted) -> bytes:
    content = io.BytesIO()
    np.save(content, np.array([planted], dtype=object), allow_pickle=True)
    return content.getvalue()


def _npz(planted: Planted) -> bytes:
    content = io.BytesIO()
    np.savez(content, x_train=np.array([[planted]], dtype=object))
    return content.getvalue()


FORMS: dict[str, Callable[[Planted], bytes]] = {
    "pickle": pickle.dumps, "torch": _zip_of_torch, "old torch": _legacy_of_torch, "npy": _npy, "npz": _npz,
}  # fmt: skip


@pytest.fixture(params=FORMS)
def planted(request, tmp_path) -> tuple[bytes, Path]:
    """Bytes, and what is there when they have run."""
    trace = tmp_path / "trace"
    return FORMS[request.param](Planted(trace)), trace


@pytest.mark.parametrize("form", FORMS)
def test_the_planted_pickles_run_where_they_are_let(tmp_path, form):
    trace = tmp_path / "trace"
    content = io.BytesIO(FORMS[form](Planted(trace)))
    if form in ("npy", "npz"):
        loaded = np.load(content, allow_pickle=True)
        _ = loaded["x_train"] if form == "npz" else loaded
    elif form == "pickle":
        pickle.load(content)
    else:
        torch.load(content, weights_only=False)
    assert trace.is_dir()


def test_data_files_run_nothing(tmp_path, planted):
    content, trace = planted
    path = tmp_path / "data"
    path.write_bytes(content)
    for read in (data.npz, data.text, data.images.read_idx):
        with suppress(ValueError):
            read(path)
        assert not trace.exists(), read.__name__
    (tmp_path / "mnist").mkdir()
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (tmp_path / "mnist" / f"{part}-{kind}-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match="ubyte"):
        data.mnist(tmp_path, verify=False)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_saved_model_runs_nothing(tmp_path, planted, name):
    content, trace = planted
    small_model().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        VAE.from_pretrained(tmp_path / "model")
    assert not trace.exists()


def test_the_state_of_a_diverged_run_runs_nothing(tmp_path, planted):
    content, trace = planted
    (tmp_path / "process0.pt").write_bytes(content)
    with pytest.raises(ValueError, match="is not a state that a diverged run left"):
        reproduce(tmp_path / "process0.pt")
    assert not trace.exists()


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os.mkdir"]
)
def test_yaml_runs_nothing(tmp_path, tag):
    trace = tmp_path / "trace"
    value = f"{tag} [{trace}]" if "name" not in tag else tag
    (tmp_path / "config.yaml").write_text(f"data: {value}\n")
    with pytest.raises(ValueError, match="could not determine a constructor"):
        TrainConfig.from_yaml(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="could not determine a constructor"):
        TrainConfig().updated([f"data={value}"])
    assert not trace.exists()


def test_checkpoints_run_nothing(tmp_path):
    """Their list of contents, which anybody can write, fits what was planted."""
    config = small(tmp_path / "run", checkpoint_every=4)
    checkpoint = interrupted(config)
    names = [path.name for path in checkpoint.iterdir() if path.name != "contents.json"]
    assert {"model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"} <= set(names)
    for name in names:
        path, whole = checkpoint / name, (checkpoint / name).read_bytes()
        for form in ("pickle", "torch", "old torch"):
            trace = tmp_path / f"{name}-{form}"
            path.write_bytes(FORMS[form](Planted(trace)))
            listed = {n: state._summary(checkpoint / n) for n in names}
            (checkpoint / "contents.json").write_text(json.dumps(listed))
            with suppress(Exception):  # accelerate leaves out random states that it cannot read
                train(config, _stop)
            assert not trace.exists(), name
        path.write_bytes(whole)


def _stop(*_: object) -> None:
    raise RuntimeError("loaded")
