"""Saved states and configurations keep their meaning when defaults change, those of version 1 too."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

import ilvae_fast as il
from ilvae_fast.training import TrainConfig
from ilvae_fast.vae import VAE, VAEConfig
from vae_cases import batch, small_model

FIRST = {"activation": "softplus", "nonneg": "softplus"}  # the defaults of version 1


def without_version(state: dict) -> dict:
    """As version 1 wrote it."""
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


# states


def test_a_state_records_its_function():
    layer = il.BrenierMap(3, (4, 5), activation="celu", first_activation=il.Activation("squared_leaky_relu", 0.3))
    state = layer.state_dict()
    same = il.BrenierMap(3, (4, 5), activation="celu", first_activation=il.Activation("squared_leaky_relu", 0.3))
    same.load_state_dict(state)
    x = torch.randn(2, 3)
    torch.testing.assert_close(same(x), layer(x), rtol=0, atol=0)
    assert all(isinstance(value, torch.Tensor) for value in state.values())  # as safetensors wants them


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"activation": "softplus"}, r"il\.Activation\('softplus', 1\)"),
        ({"activation": il.Activation("softplus", 5.0)}, r"il\.Activation\('softplus', 5\)"),
        ({"first_activation": "squared_leaky_relu"}, "squared_leaky_relu"),
        ({"output_activation": "softplus"}, "identity"),
        ({"nonneg": "exp"}, "nonneg='exp'"),
        ({"nonneg": il.NonNegative("clamp", 0.01)}, r"il\.NonNegative\('clamp', 0\.01\)"),
    ],
)
def test_a_state_of_another_function_is_refused(options, named):
    state = il.BrenierMap(3, (4, 5)).state_dict()
    with pytest.raises(RuntimeError, match=named):
        il.BrenierMap(3, (4, 5), **options).load_state_dict(state)
    with pytest.raises(RuntimeError, match=named):
        il.BrenierMap(3, (4, 5), **options).load_state_dict(state, strict=False)


@pytest.mark.parametrize(
    "damaged", [[], [2.0], [2.0, -7.0, 0.0], [2.0, 1e30] * 4, [float("nan")] * 9, [[2.0]]], ids=str
)
def test_a_state_whose_function_cannot_be_told_is_refused(damaged):
    layer, decoder = il.BrenierMap(3, (4, 5)), il.BrenierDecoder(2, 4, ((3,), (5,)))
    for module in (layer, decoder):
        state = {**module.state_dict(), "_extra_state": torch.tensor(damaged, dtype=torch.float64)}
        with pytest.raises(
            RuntimeError, match=r"a function that this version does not|the state has embedding='unknown'"
        ):
            module.load_state_dict(state)


def test_a_state_without_a_version_needs_its_original_options():
    old = without_version(il.BrenierMap(3, (4, 5), **FIRST).state_dict())
    with pytest.raises(RuntimeError, match=r"Pass activation=\.\., nonneg=\.\."):
        il.BrenierMap(3, (4, 5)).load_state_dict(old)
    with pytest.raises(RuntimeError, match=r"Pass nonneg=\.\. as"):
        il.BrenierMap(3, (4, 5), activation="softplus").load_state_dict(old)
    il.BrenierMap(3, (4, 5), **FIRST).load_state_dict(old)


def test_parameters_alone_load_into_anything():
    """Moving averages and pruned copies carry no version."""
    source, target = (il.BrenierMap(3, (4, 5)) for _ in range(2))
    target.load_state_dict(dict(source.named_parameters()), strict=False)
    torch.testing.assert_close(target.skip_weight, source.skip_weight)


@pytest.mark.parametrize("embedding", ["identity", "orthogonal", "full_rank"])
@pytest.mark.parametrize("other", ["identity", "orthogonal", "full_rank"])
def test_a_decoder_state_of_another_embedding_is_refused(embedding, other):
    state = il.BrenierDecoder(2, 5, ((4,), (6,)), embedding=embedding).state_dict()
    decoder = il.BrenierDecoder(2, 5, ((4,), (6,)), embedding=other)
    if embedding == other:
        decoder.load_state_dict(state)
    else:
        with pytest.raises(RuntimeError, match=f"construct it with embedding='{embedding}'"):
            decoder.load_state_dict(state)


def test_a_decoder_state_without_a_version_names_its_embedding():
    old = without_version(il.BrenierDecoder(2, 5, ((4,), (6,)), embedding="identity", **FIRST).state_dict())
    with pytest.raises(RuntimeError, match="construct it with embedding='identity'"):
        il.BrenierDecoder(2, 5, ((4,), (6,)), **FIRST).load_state_dict(old)
    il.BrenierDecoder(2, 5, ((4,), (6,)), embedding="identity", **FIRST).load_state_dict(old)


def test_an_averaged_model_keeps_its_state():
    layer = il.BrenierMap(3, (4, 5))
    averaged = torch.optim.swa_utils.AveragedModel(layer)
    averaged.update_parameters(layer)
    restored = torch.optim.swa_utils.AveragedModel(il.BrenierMap(3, (4, 5)))
    restored.load_state_dict(averaged.state_dict())
    half = {name: value.half() for name, value in layer.state_dict().items()}
    il.BrenierMap(3, (4, 5)).load_state_dict(half)  # 0.2 is not 0.2 in 16 bits, but the same activation


def test_meta_models_take_a_state():
    state = il.BrenierDecoder(2, 5, ((4,), (6,))).state_dict()
    decoder = il.BrenierDecoder(2, 5, ((4,), (6,)), device="meta")
    decoder.load_state_dict(state, assign=True)
    assert decoder(torch.zeros(1, 2)).shape == (1, 5)


# configurations


def test_a_configuration_of_an_earlier_version_keeps_its_meaning(tmp_path):
    """config.json and model.safetensors as version 1 wrote them."""
    model = small_model(
        "il-lidvae", embedding="identity", decoder_options={**FIRST, "initialization": "random"}
    ).float()  # fmt: skip
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields.pop("version") == 2
    fields["decoder_options"] = {}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.torch.save(without_version(safetensors.torch.load(path.read_bytes()))))

    restored, x = VAE.from_pretrained(tmp_path), batch(5).float()
    torch.testing.assert_close(restored.reconstruct(x), model.reconstruct(x), rtol=0, atol=0)
    assert restored.config.decoder_options["activation"] == "softplus"


def test_missing_fields_of_a_configuration_take_the_current_defaults():
    config = VAEConfig.from_dict({"data_dim": 4, "latent_dim": 2})
    assert config.embedding == "orthogonal"
    assert config.decoder_options == {}
    assert VAEConfig.from_dict(config.to_dict()) == config


def test_a_run_of_an_earlier_version_keeps_its_meaning():
    fields = TrainConfig(model="lidvae", model_options={"decoder_options": {"activation": "celu"}}).to_dict()
    assert fields.pop("initialize") is True
    old = TrainConfig.from_dict(fields)
    assert old.initialize is False
    assert old.model_options["embedding"] == "identity"
    assert old.model_options["decoder_options"]["activation"] == "celu"
    assert old.model_options["decoder_options"]["nonneg"] == "softplus"
    assert TrainConfig.from_dict(old.to_dict()) == old
    fields["model"], fields["model_options"] = "vae", {}
    assert TrainConfig.from_dict(fields).model_options == {}


def test_missing_fields_of_a_run_take_the_current_defaults():
    assert TrainConfig.from_dict({"data": "digits"}).initialize is True
