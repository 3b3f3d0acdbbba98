"""Configurations of the autoencoder: what they hold, refuse and survive."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from ilvae_fast import Activation, BrenierDecoder, NonNegative
from ilvae_fast.vae import CONFIGURATIONS, VAE
from ilvae_fast.vae import VAEConfig as Config
from vae_cases import SMALL, batch, small, small_model


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_survives_json(name):
    config = small(name, kl_weight=0.5, free_bits=0.1)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "options",
    [
        {"activation": Activation("smooth_leaky_relu", 0.3), "nonneg": NonNegative("clamp", 1e-6)},
        {
            "activation": ("celu", Activation("softplus", 2.0)),
            "first_activation": Activation("squared_leaky_relu", 0.1),
            "nonneg": ("exp", NonNegative("square")),
        },
    ],
    ids=["single", "pairs"],
)
def test_activations_and_parametrisations_survive_json_and_files(tmp_path, options):
    model, x = small_model(decoder_options=options), batch(4)
    plain = json.loads(json.dumps(model.config.to_dict()))
    assert Config.from_dict(plain) == model.config
    model.save_pretrained(tmp_path)
    loaded = VAE.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded.decode(x[:, :3]), model.decode(x[:, :3]))
    assert not torch.equal(small_model().decode(x[:, :3]), model.decode(x[:, :3]))


def test_a_parameter_may_be_given_as_json_has_it():
    config = small(decoder_options={"nonneg": {"name": "clamp", "parameter": 0.1}, "activation": {"name": "celu"}})
    assert config.decoder_options == {"nonneg": NonNegative("clamp", 0.1), "activation": Activation("celu")}


def test_the_published_models_differ_in_decoder_and_constant():
    models = {name: small_model(name) for name in CONFIGURATIONS}
    for letter, family in (("", ""), ("gm", "m"), ("s", "s")):
        decoders = [
            models[f"{letter}vae"].decoder,
            models[f"lid{family}vae"].decoder,
            models[f"il-lid{family}vae"].decoder,
        ]
        if letter == "s":
            decoders = [decoder.head for decoder in decoders]
        assert not isinstance(decoders[0], BrenierDecoder)
        assert decoders[1].inverse_lipschitz_bound() == 0
        assert float(decoders[2].inverse_lipschitz_bound()) == pytest.approx(1)


def test_a_single_constant_stands_for_both_maps():
    assert small(inverse_lipschitz=0.5).inverse_lipschitz == (0.5, 0.5)
    assert float(small_model(inverse_lipschitz=(0.5, 3)).decoder.inverse_lipschitz_bound()) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"decoder": "brennier"}, ValueError, "decoder: got 'brennier'.*nearest: 'brenier'"),
        ({"likelihood": "gauss"}, ValueError, "likelihood: got 'gauss'.*nearest: 'gaussian'"),
        ({"embedding": "ortho"}, ValueError, "embedding: got 'ortho'.*nearest: 'orthogonal'"),
        ({"latent_dims": 2}, ValueError, "field: got 'latent_dims'.*nearest: 'latent_dim'"),
        ({"latent_dim": 0}, ValueError, "latent_dim: got 0"),
        ({"data_dim": 7.0}, TypeError, "data_dim: got float"),
        ({"inverse_lipschitz": (1.0, -1.0)}, ValueError, "inverse_lipschitz: got -1.0"),
        ({"inverse_lipschitz": (1.0, 1.0, 1.0)}, ValueError, "inverse_lipschitz: got 3 values"),
        ({"inverse_lipschitz": math.nan}, ValueError, "inverse_lipschitz: got nan"),
        ({"encoder_hidden": 8}, TypeError, "encoder_hidden: got int"),
        ({"encoder_hidden": (8, 0)}, ValueError, r"encoder_hidden\[1\]: got 0"),
        ({"decoder_hidden": ((8,), (8, -1))}, ValueError, r"decoder_hidden\[1\]\[1\]: got -1"),
        ({"kl_weight": -1}, ValueError, "kl_weight: got -1"),
        ({"kl_weight": "1"}, TypeError, "kl_weight: got str"),
        ({"decoder_options": {"nonneg": {"parameter": 1.0}}}, ValueError, "nonneg: 'name' is missing"),
        ({"decoder_options": {"activation": {"name": "celu", "alpha": 1}}}, ValueError, "activation: got 'alpha'"),
        (
            {"decoder_options": {"activation": ["celu", {"name": "celu", "parameter": "1e-3"}]}},
            TypeError,
            r"decoder_options\.activation\.parameter: got str '1e-3'.*YAML",
        ),
        ({"likelihood_options": 3}, TypeError, "likelihood_options: got 3"),
        ({"prior": "mixture"}, ValueError, "prior: got 'mixture'.*nearest: 'gaussian_mixture'"),
        ({"encoder": "convolution"}, ValueError, "encoder: got 'convolution'.*nearest: 'conv'"),
        ({"data_shape": (2, 3)}, ValueError, r"data_shape: got \(2, 3\), wanted data_dim, 7"),
        ({"free_bits": -0.1}, ValueError, "free_bits: got -0.1"),
        ({"autoregressive_hidden": 4}, ValueError, "likelihood: got 'gaussian', wanted 'categorical'"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, error, message):
    with pytest.raises(error, match=message):
        small(**{"decoder": "brenier", **fields})


def test_fields_that_are_no_mapping_are_refused():
    with pytest.raises(TypeError, match="fields: got list, wanted names with values"):
        Config.from_dict([1])


def test_an_unknown_model_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"name: got 'il-lid'.*nearest: 'il-lidvae'"):
        Config.named("il-lid", **SMALL)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("vae", {"decoder_hidden": ((4,), (4,))}, "decoder_hidden: got .*'mlp'"),
        ("vae", {"decoder_options": {"activation": "celu"}}, "decoder_options: got .*'mlp'"),
        ("lidvae", {"decoder_hidden": (4, 4)}, "decoder_hidden: got .*'brenier'"),
        ("lidvae", {"latent_dim": 8}, "latent_dim: got 8, wanted at most data_dim"),
        ("vae", {"likelihood_options": {"scale": 0.0}}, "scale: got 0.0"),
        ("vae", {"likelihood_options": {"scal": 1.0}}, "likelihood_options: got 'scal'.*nearest: 'scale'"),
        ("vae", {"likelihood_options": {"variance": "learned"}}, "variance: got 'learned', wanted one of"),
        ("vae", {"prior_options": {"minimum_rate": -1.0}}, "minimum_rate: got -1.0"),
        ("gmvae", {"prior_options": {"num_components": 0}}, "num_components: got 0"),
        ("gmvae", {"prior_options": {"minimum_rate": 1.0}}, "prior_options: got 'minimum_rate'"),
        ("vae", {"encoder": "conv"}, "data_shape: got None"),
        ("vae", {"encoder": "user"}, r"encoder: got 'user', wanted the module too.*6 outputs"),
        ("vae", {"encoder": "lstm"}, "encoder: got 'lstm' with likelihood 'gaussian'"),
        ("svae", {"likelihood_options": {}}, "likelihood_options: 'num_categories' is missing"),
        ("svae", {"encoder": "mlp"}, "encoder: got 'mlp' with a categorical likelihood"),
        ("lidsvae", {"autoregressive_hidden": 11}, "autoregressive_hidden: got 11 with latent_dim 3, wanted at most"),
    ],
)
def test_parts_refuse_what_they_cannot_be_built_from(name, fields, message):
    with pytest.raises(ValueError, match=message):
        VAE(small(name, **fields))


def test_sizes_may_be_numpy_integers_and_are_saved(tmp_path):
    config = small(
        data_dim=np.prod((7, 1)), latent_dim=np.int32(3), encoder_hidden=(np.int64(11),), data_shape=torch.Size([7])
    )
    VAE(config).save_pretrained(tmp_path)
    assert VAE.from_pretrained(tmp_path).config == small(data_shape=(7,))
