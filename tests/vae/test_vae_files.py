"""Saving and loading models."""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from ilvae_fast import BrenierDecoder
from ilvae_fast._support import files as _files
from ilvae_fast.vae import (
    CONFIGURATIONS,
    VAE,
)
from vae_cases import SEQUENCES, data_for, small_model


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_model_is_saved_and_loaded(tmp_path, name):
    options = {} if name in SEQUENCES else {"likelihood_options": {"scale": 0.5, "variance": "optimal"}}
    model, x = small_model(name, **options), data_for(name, 4)
    model(x)
    model.save_pretrained(tmp_path)
    loaded = VAE.from_pretrained(tmp_path)
    assert loaded.config == model.config
    torch.testing.assert_close(
        loaded.eval()(x, torch.Generator().manual_seed(0)).loss, model.eval()(x, torch.Generator().manual_seed(0)).loss
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("embedding", ["identity", "orthogonal", "full_rank"])
def test_loading_restores_every_tensor(tmp_path, dtype, embedding):
    model = small_model(embedding=embedding, inverse_lipschitz=0.1).to(dtype)
    model.decoder.data_map.inverse_lipschitz = 0.7  # moved since it was configured
    model.kl_weight.fill_(0.25)
    model.save_pretrained(tmp_path / "deep" / "folder")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # loading a changed L does not warn
        loaded = VAE.from_pretrained(tmp_path / "deep" / "folder")
    assert loaded.config == model.config
    state, other = model.state_dict(), loaded.state_dict()
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name
    assert sorted(p.name for p in (tmp_path / "deep" / "folder").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["il-lidvae", "il-lidmvae", "il-lidsvae"])
@pytest.mark.parametrize(("wanted", "pair"), [((0.5, 0.25), (0.5, 0.25)), (2.0, (2.0, 2.0)), (0.0, (0.0, 0.0))])
def test_an_explicit_constant_wins_over_the_saved_one(tmp_path, name, wanted, pair):
    model = small_model(name, inverse_lipschitz=0.1)
    model.save_pretrained(tmp_path)
    loaded = VAE.from_pretrained(tmp_path, inverse_lipschitz=wanted)
    assert loaded.config.inverse_lipschitz == pair
    decoder = next(module for module in loaded.modules() if isinstance(module, BrenierDecoder))
    assert tuple(float(constant) for constant in decoder.inverse_lipschitz) == pair
    other = {k for k, v in model.state_dict().items() if not torch.equal(v, loaded.state_dict()[k])}
    assert {k.rpartition(".")[2] for k in other} == {"inverse_lipschitz"}
    loaded.save_pretrained(tmp_path)
    assert VAE.from_pretrained(tmp_path).config.inverse_lipschitz == pair


def test_an_explicit_constant_that_no_part_uses_is_refused(tmp_path):
    small_model("vae").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"inverse_lipschitz: got 0\.5, wanted None for decoder='mlp'"):
        VAE.from_pretrained(tmp_path, inverse_lipschitz=0.5)
    small_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="inverse_lipschitz: got 3 values"):
        VAE.from_pretrained(tmp_path, inverse_lipschitz=(1.0, 2.0, 3.0))


def test_what_is_missing_or_unknown_in_a_saved_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json in"):
        VAE.from_pretrained(tmp_path)
    small_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "encoder_hiden": [3]}))
    with pytest.raises(ValueError, match=r"field: got 'encoder_hiden'.*nearest: 'encoder_hidden'"):
        VAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "latent_dim": 2}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        VAE.from_pretrained(tmp_path)


DAMAGED = {"empty": lambda c: b"", "cut": lambda c: c[: len(c) // 2], "zeros": lambda c: bytes(len(c))}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_of_a_model_is_named(tmp_path, name, damage):
    small_model().save_pretrained(tmp_path)
    path = tmp_path / name
    path.write_bytes(DAMAGED[damage](path.read_bytes()))
    state = "is empty" if damage == "empty" else "is damaged, not .*"
    with pytest.raises(ValueError, match=rf"^{path}: {state}; copy both files of the model anew"):
        VAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"data_dim": 3}', '{"data_dim": [], "latent_dim": 2}', "[1]", '"x"'])
def test_a_configuration_of_something_else_is_named(tmp_path, content):
    small_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises((ValueError, RuntimeError), match=rf"{tmp_path / 'config.json'}: "):
        VAE.from_pretrained(tmp_path)


class Tied(torch.nn.Module):
    """An encoder with tied weights and buffers, and a view into a larger tensor."""

    def __init__(self, width: int, parameters: int, tied: bool = True) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(width, width), torch.nn.Linear(width, width)
        self.head = torch.nn.Linear(width, parameters)
        self.register_buffer("scale", torch.arange(1.0, 2 * width + 1)[::2].contiguous())
        self.register_buffer("again", self.scale if tied else torch.zeros(width))
        self.register_buffer("slice", torch.linspace(0, 1, 3 * width)[width : 2 * width])
        self.register_buffer("whole", torch.ones(2 * width))
        if tied:
            self.second.weight = self.first.weight
            self.slice = self.whole[:width]

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()) * self.scale + self.again + self.slice)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_of_an_encoder_are_saved_once_and_tied_again(tmp_path, tied):
    config = replace(small_model().config, encoder="user")
    width, parameters = config.data_dim, 2 * config.latent_dim
    model = VAE(config, encoder=Tied(width, parameters))
    x = torch.randn(5, width)
    model.save_pretrained(tmp_path)
    fresh = Tied(width, parameters, tied)
    loaded = VAE.from_pretrained(tmp_path, encoder=fresh)
    assert torch.equal(loaded.encode(x), model.encode(x))
    assert loaded.encoder.second.weight is loaded.encoder.first.weight
    assert loaded.encoder.again is loaded.encoder.scale
    assert len(list(loaded.parameters())) == len(list(model.parameters()))
    loaded.encoder.first.weight.grad = None
    loaded(x).loss.backward()
    assert loaded.encoder.first.weight.grad is not None
    state = load_file(tmp_path / "model.safetensors")
    assert "encoder.first.weight" in state
    assert "encoder.second.weight" not in state
    assert state["encoder.slice"].numel() == width


def test_without_safetensors_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"safetensors is needed.*pip install 'ilvae_fast\[train\]'"):
        small_model().save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_configuration_that_json_cannot_hold_leaves_no_file(tmp_path):
    model = small_model(decoder_options={"route": "auto"})
    model.config.decoder_options["route"] = object()
    with pytest.raises(TypeError, match="not JSON serializable"):
        model.save_pretrained(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    _files.write_atomically(path, "old")

    def die(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        _files.write_atomically(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_after_the_replacement_does_not_fail_the_write(tmp_path, monkeypatch):
    replace = os.replace

    def replaced(*paths):
        replace(*paths)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replaced)
    with pytest.raises(KeyboardInterrupt):
        _files.write_atomically(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "pathlib.Path.mkdir"])
def test_an_error_names_the_file_that_could_not_be_written(tmp_path, monkeypatch, call):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(call, full)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / 'deep' / 'file'}'"):
        _files.write_atomically(tmp_path / "deep" / "file", "new")
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*file*"))


def test_names_may_be_as_long_as_the_file_system_takes(tmp_path):
    path = tmp_path / ("ß" * 127)
    _files.write_atomically(path, "new")
    assert path.read_text() == "new"


def test_a_written_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").write_text("")
    _files.write_atomically(tmp_path / "ours", "")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
