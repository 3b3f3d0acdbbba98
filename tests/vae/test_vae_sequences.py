"""Encoders and decoders of images and sequences."""

from __future__ import annotations

import math

import pytest
import torch

from ilvae_fast.vae import VAE
from ilvae_fast.vae import VAEConfig as Config
from vae_cases import SEQUENCES, TOKENS, batch, small, small_model, tokens


@pytest.mark.parametrize("data_shape", [(5, 7), (2, 5, 7)])
def test_a_convolutional_encoder(data_shape):
    model = VAE(Config(math.prod(data_shape), 3, encoder="conv", encoder_hidden=(4, 6), data_shape=data_shape))
    x = torch.rand(2, 3, math.prod(data_shape))
    whole = model.inference(x)
    assert whole.mean.shape == (2, 3, 3)
    torch.testing.assert_close(model.inference(x[1, 2]).mean, whole.mean[1, 2])
    assert not torch.allclose(whole.mean[0], whole.mean[1])


@pytest.mark.parametrize("data_shape", [(28, 28, 3), (28, 28, 1), (32, 30, 4)])
def test_channels_that_come_last_are_refused(data_shape):
    with pytest.raises(ValueError, match=r"^data_shape: got .* wanted \(channels, height, width\): numpy.moveaxis"):
        VAE(Config(math.prod(data_shape), 3, encoder="conv", encoder_hidden=(4,), data_shape=data_shape))


def test_a_module_of_the_users_own_encodes(tmp_path):
    config = small(prior="gaussian_mixture", prior_options={"num_components": 4})
    own = torch.nn.Linear(7, 4 * (1 + 2 * 3))
    model = VAE(config, encoder=own)
    assert model.prior.num_posterior_parameters == own.out_features
    assert model.inference(batch(4).float()).logits.shape == (4, 4)
    model.save_pretrained(tmp_path)
    again = VAE.from_pretrained(tmp_path, encoder=torch.nn.Linear(7, 28))
    assert torch.equal(again.encoder.weight, own.weight)
    with pytest.raises(ValueError, match="encoder: got 'user'"):
        VAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_token_depends_on_those_before_it_and_on_z(name):
    model, x = small_model(name), tokens(4).clamp(min=0)
    z = torch.randn(4, 3, dtype=torch.float64)
    f = model.generative(z, x).unflatten(-1, (7, TOKENS))
    changed = x.clone()
    changed[:, 3] = (x[:, 3] + 1) % TOKENS
    g = model.generative(z, changed).unflatten(-1, (7, TOKENS))
    assert torch.equal(f[:, :4], g[:, :4])
    assert not torch.isclose(f[:, 4:], g[:, 4:]).all(-1).any()
    h = model.generative(z + 0.1, x).unflatten(-1, (7, TOKENS))
    assert not torch.isclose(f, h).all(-1).any()


@pytest.mark.parametrize("name", SEQUENCES)
def test_what_is_generated_is_the_likeliest_token_given_those_before(name):
    model = small_model(name)
    z = torch.randn(2, 5, 3, dtype=torch.float64)
    x = model.decode(z)
    assert x.shape == (2, 5, 7)
    assert torch.equal(model.likelihood.mean(model.generative(z, x)), x)


@pytest.mark.parametrize("name", SEQUENCES)
def test_the_jacobian_of_a_sequence_is_that_of_its_logits(name):
    model, x = small_model(name), tokens(2)
    z = torch.randn(3, 2, 3, dtype=torch.float64)
    rows = model.decoder.given(x).jacobian(z)
    assert rows.shape == (3, 2, 7 * TOKENS, 3)
    expected = torch.autograd.functional.jacobian(lambda latent: model.generative(latent, x[1]), z[2, 1])
    present = (x[1] >= 0).repeat_interleave(TOKENS)
    torch.testing.assert_close(rows[2, 1][present], expected[present])
    assert (rows[2, 1][~present] == 0).all()


def test_a_sequence_is_inverse_lipschitz_in_z_by_the_root_of_its_length():
    model, x = small_model("il-lidsvae", inverse_lipschitz=(0.7, 2.0)), tokens(30).clamp(min=0)
    z, other = torch.randn(2, 30, 3, dtype=torch.float64)
    stretch = (model.generative(z, x) - model.generative(other, x)).norm(dim=-1) / (z - other).norm(dim=-1)
    assert stretch.min() >= 1.4 * math.sqrt(7)


def test_an_encoder_of_sequences_reads_no_absent_token():
    model, x = small_model("svae"), tokens(4)
    longer = torch.where(x < 0, 0, x)
    assert (x < 0).any()
    short = [VAE.inference(model, row).mean for row in x]
    torch.testing.assert_close(torch.stack(short), model.inference(x).mean)
    assert not torch.allclose(model.inference(longer).mean, model.inference(x).mean)
