"""Configurations of runs, and the models that they describe."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import ilvae_fast as il
from ilvae_fast.annealing import SCHEDULES, Constant, Cosine, Cyclical, Linear, Piecewise, as_schedule
from ilvae_fast.data import load
from ilvae_fast.training import TrainConfig, build_model, load_dataset
from ilvae_fast.vae import CONFIGURATIONS
from training_cases import OPTIONS, SMALL, small


def test_a_configuration_survives_yaml(tmp_path):
    config = small(tmp_path, L=0.5, annealing={"L1": {"kind": "linear", "start": 2.0, "end": 1.0, "steps": 5}})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert TrainConfig.from_yaml(tmp_path / "config.yaml") == config


def test_schedules_and_activations_are_saved_by_their_fields(tmp_path):
    schedules = {
        "L1": Piecewise(((0, 2.0), (5, 1.0))), "L2": Cosine(2.0, 1.0, 5), "kl_weight": Cyclical(0.0, 1.0, 9),
    }  # fmt: skip
    options = {"activation": il.Activation("celu", 0.5), "nonneg": il.NonNegative("clamp", 1e-3)}
    config = small(tmp_path, annealing=schedules, model_options={**OPTIONS, "decoder_options": options})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    read = TrainConfig.from_yaml(tmp_path / "config.yaml")
    assert read.to_dict() == config.to_dict()
    assert {name: as_schedule(fields) for name, fields in read.annealing.items()} == schedules
    models = [build_model(c, load("toy", **SMALL["data_options"])) for c in (config, read)]
    assert models[0].config == models[1].config
    for schedule in (Constant(1.0), Linear(2.0, 1.0, 5), *schedules.values()):
        fields = small(tmp_path, annealing={"L1": schedule}).to_dict()["annealing"]["L1"]
        assert type(schedule) is SCHEDULES[fields["kind"]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data_options": {"sigma": np.float64(2)}}, r"data_options\.sigma: got np\.float64\(2\.0\), wanted what YAML"),
        ({"data_options": {"x": {("a", "b"): 1}}}, r"data_options\.x: got \{\('a', 'b'\): 1\}"),
        ({"model_options": {"encoder_hidden": [torch.tensor(3)]}}, r"model_options\.encoder_hidden: got tensor\(3\)"),
        ({"annealing": {"L1": {"kind": "constant", "start": np.float64(2)}}}, r"annealing\.L1\.start: got np\.float64"),
    ],
)
def test_what_yaml_cannot_hold_is_refused(tmp_path, fields, message):
    with pytest.raises(TypeError, match=message):
        small(tmp_path, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_options": {"latent_dim": 3}}, "model_options: got latent_dim, wanted it as the field latent_dim"),
        ({"L": 0.5, "model_options": {"inverse_lipschitz": 1}}, r"L: got 0\.5 besides model_options\.inverse_lip"),
        ({"accumulation": 2, "model_options": {"free_bits": 0.1}}, r"accumulation: got 2 with model_options\.free"),
    ],
)
def test_fields_that_contradict_one_another_are_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **fields)
    for name in fields:
        rest = {k: v for k, v in fields.items() if k != name}
        assert small(tmp_path, **rest)  # each by itself is fine


def test_fields_are_set_by_name(tmp_path):
    config = small(tmp_path).updated(
        [
            "epochs=7",
            "L=0.25",
            "data_options.sigma=3.5",
            "annealing.kl_weight={kind: cyclical, start: 0, end: 1, period: 9}",
        ]
    )
    assert (config.epochs, config.L, config.data_options["sigma"]) == (7, 0.25, 3.5)
    assert config.data_options["num_train"] == 300
    assert config.annealing == {"kl_weight": {"kind": "cyclical", "start": 0, "end": 1, "period": 9}}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("annealing={kind", "set: annealing={kind: is not valid YAML"),
        ("epoch=3", r"field: got 'epoch'.*nearest: 'epochs'"),
        ("epochs", "set: got 'epochs', wanted FIELD=VALUE"),
        ("epochs.x=3", "epochs has no fields"),
        ("model_options.latent_dims=3", r"model_options: got 'latent_dims'.*nearest: 'latent_dim'"),
        ("model=il_lidvae", r"model: got 'il_lidvae'.*nearest: 'il-lidvae'"),
        ("precision=fp8", "precision: got 'fp8'"),
        ("annealing.L1={kind: liner}", r"kind: got 'liner'.*nearest: 'linear'"),
        ("L=-1", "L: got -1, wanted a finite number >= 0"),
        ("batch_size=0", "batch_size: got 0"),
        ("accumulation=3", "accumulation: got 3, wanted a divisor of batch_size, 50"),
    ],
)
def test_bad_fields_are_refused(tmp_path, assignment, message):
    with pytest.raises(ValueError, match=message):
        small(tmp_path).updated([assignment])


def test_a_value_that_contains_itself_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got a value that contains itself"):
        small(tmp_path).updated(["data_options.x=&a [*a]"])


def test_assignments_that_are_no_texts_are_refused(tmp_path):
    with pytest.raises(TypeError, match="set: got 3, wanted FIELD=VALUE"):
        small(tmp_path).updated([3])
    assert small(tmp_path).updated("epochs=3").epochs == 3


@pytest.mark.parametrize("name", ["data", "model", "output", "data_options", "model_options", "annealing", "cpu"])
def test_values_of_the_wrong_type_are_refused(tmp_path, name):
    with pytest.raises(TypeError, match=rf"{name}: got 3, wanted"):
        small(tmp_path).updated([f"{name}=3"])


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("learning_rate=1e-3", 1e-3),
        ("learning_rate=.5E-2", 5e-3),
        ("epochs=7", 7),
        ("precision=no", "no"),
        ("cpu=true", True),
        ("cpu=False", False),
        ("output=on", "on"),
        ("model_options.likelihood_options={scale: 2e-1}", {"likelihood_options": {"scale": 0.2}}),
        ("model_options.decoder_hidden=[[4], [5, 6]]", {"decoder_hidden": [[4], [5, 6]]}),
    ],
)
def test_values_are_yaml_as_people_write_it(tmp_path, assignment, value):
    config = small(tmp_path).updated([assignment])
    name = assignment.partition("=")[0].partition(".")[0]
    found = getattr(config, name)
    if isinstance(value, dict):
        found = {key: found[key] for key in value}
    assert found == value
    assert type(found) is type(value)


def test_every_field_comes_back_from_yaml(tmp_path):
    """Also words that look like numbers, or like yes and no to YAML 1.1."""
    config = replace(small(tmp_path), output="1e-3", learning_rate=1e-7, precision="no", data="npz:off")
    for word in ("1e-3", "no", "off", "true", "12", ".5", "1_000", "2001-01-01", "~", ""):
        config = replace(config, data_options={"level": word})
        (tmp_path / "config.yaml").write_text(config.to_yaml())
        assert TrainConfig.from_yaml(tmp_path / "config.yaml") == config, word


def test_a_word_for_a_number_is_explained(tmp_path):
    with pytest.raises(TypeError, match=r"learning_rate: got str 'fast'"):
        small(tmp_path).updated(["learning_rate=fast"])


@pytest.mark.parametrize("name", ["output", "data_root"])
def test_an_empty_path_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"^{name}: got '', wanted the path of a folder"):
        small(tmp_path, **{name: ""})


def test_the_folder_of_a_file_with_a_long_path_has_a_short_name():
    names = [f"npz:/{'deep/' * 60}ß{k}.npz" for k in (1, 2)]
    folders = [TrainConfig(data=name).folder for name in names]
    assert folders[0] != folders[1]
    assert all(len(os.fsencode(folder.name)) < 200 for folder in folders)
    assert folders[0].name.endswith("-ß1.npz-il-lidvae-seed0")
    assert TrainConfig(data="npz:/data/x.npz").folder.name == "npz--data-x.npz-il-lidvae-seed0"


SCALES = {
    "uint16": np.arange(256).astype(np.uint16),
    "int64": np.arange(256),
    "float32": np.arange(256).astype(np.float32),
    "a few grey values": np.arange(256) % 7,
    "signed": np.linspace(-1, 1, 256).astype(np.float32),
}


@pytest.mark.parametrize("name", SCALES)
def test_the_likelihood_of_pixels_on_another_scale_is_not_guessed(tmp_path, name):
    np.savez(tmp_path / "x.npz", x_train=SCALES[name].reshape(16, 4, 4))
    config = TrainConfig(data=f"npz:{tmp_path / 'x.npz'}", model="vae", latent_dim=2)
    bounds = "[-1, 1]" if name == "signed" else "[0, 255]"
    with pytest.raises(ValueError, match=rf"^likelihood: none is named .*data_options.range={re.escape(bounds)}"):
        build_model(config, load_dataset(config))
    scaled = config.updated([f"data_options.range={bounds}"])
    assert build_model(scaled, load_dataset(scaled)).config.likelihood == "bernoulli"
    for likelihood in ("gaussian",) if name == "signed" else ("gaussian", "poisson"):
        named = config.updated([f"model_options.likelihood={likelihood}"])
        assert build_model(named, load_dataset(named)).config.likelihood == likelihood


def test_flat_pixels_are_known_by_their_largest_value(tmp_path):
    np.savez(tmp_path / "x.npz", x_train=np.arange(256).reshape(64, 4))
    config = TrainConfig(data=f"npz:{tmp_path / 'x.npz'}", model="vae", latent_dim=2)
    with pytest.raises(ValueError, match=r"^likelihood: none is named for values from 0 to 255"):
        build_model(config, load_dataset(config))
    np.savez(tmp_path / "x.npz", x_train=np.arange(200).reshape(50, 4))  # whole numbers of a table
    assert build_model(config, load_dataset(config)).config.likelihood == "gaussian"


def test_models_are_sized_for_their_data(tmp_path):
    digits, text = load("digits"), load("synthetic_text", num_sentences=20, vocabulary_size=150)
    for name in CONFIGURATIONS:
        sequence = "autoregressive_hidden" in CONFIGURATIONS[name]
        config = TrainConfig(data="synthetic_text" if sequence else "digits", model=name, latent_dim=3)
        dataset = text if sequence else digits
        model = build_model(config, dataset)
        assert model(dataset.train[:2]).loss.isfinite()
        assert model.config.likelihood == ("categorical" if sequence else "bernoulli")
    constant = build_model(TrainConfig(model="il-lidvae", L=0.25), digits).decoder.inverse_lipschitz_bound()
    assert float(constant) == pytest.approx(0.25)
    assert build_model(TrainConfig(model="vae", model_options={"encoder": "conv", "encoder_hidden": [3]}), digits)
    with pytest.raises(ValueError, match=r"model: got 'svae', which models sequences.*for digits try '.*vae'"):
        build_model(TrainConfig(model="svae"), digits)
    with pytest.raises(ValueError, match=r"model: got 'il-lidvae'.*for text try 'il-lidsvae'"):
        build_model(TrainConfig(data="text", model="il-lidvae"), text)
    with pytest.raises(ValueError, match=r"L: got 1\.0 for 'vae'"):
        build_model(TrainConfig(model="vae", L=1.0), digits)
    with pytest.raises(ValueError, match=r"L: got 1\.0 for 'il-lidvae'"):
        build_model(TrainConfig(model="il-lidvae", L=1.0, model_options={"decoder": "mlp"}), digits)
    injective = TrainConfig(model="vae", L=0.25, model_options={"decoder": "brenier"})
    assert build_model(injective, digits).decoder.inverse_lipschitz_bound().item() == pytest.approx(0.25)


def test_the_likelihood_fits_the_range_of_the_data(tmp_path):
    images = np.linspace(0, 1, 40 * 6 * 6, dtype=np.float32).reshape(40, 6, 6)
    for name, x, wanted in (("grey", images, "bernoulli"), ("standardised", 4 * images - 2, "gaussian")):
        np.savez(tmp_path / f"{name}.npz", x_train=x)
        config = TrainConfig(data=f"npz:{tmp_path / name}.npz", model="vae")
        assert build_model(config, load(config.data)).config.likelihood == wanted
    asked = replace(config, model_options={"likelihood": "bernoulli"})
    with pytest.raises(ValueError, match=r"data: npz:.*standardised.npz: x: got values from -2 to 2, wanted .* 0 to 1"):
        build_model(asked, load(config.data))


@pytest.mark.parametrize("likelihood", ["poisson", "negative_binomial"])
def test_counts_of_a_file_reach_their_likelihood(tmp_path, likelihood):
    counts = np.arange(40 * 5, dtype=np.int32).reshape(40, 5) // 30
    np.savez(tmp_path / "counts.npz", x_train=counts)
    np.savez(tmp_path / "bytes.npz", x_train=counts.astype(np.uint8))  # scaled to [0, 1]
    config = TrainConfig(data=f"npz:{tmp_path / 'counts.npz'}", model="vae", model_options={"likelihood": likelihood})
    dataset = load(config.data)
    model = build_model(config, dataset)
    assert dataset.train.dtype == torch.float32
    assert model(dataset.train).loss.isfinite()
    assert torch.equal(model.sample(3, noise=True).frac(), torch.zeros(3, 5))
    config = replace(config, data=f"npz:{tmp_path / 'bytes.npz'}")
    with pytest.raises(ValueError, match=r"data: npz:.*bytes.npz: x: got values such as 0\.0.*, wanted counts"):
        build_model(config, load(config.data))
