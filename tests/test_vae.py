"""The variational autoencoder, its parts and its files."""

from __future__ import annotations

import json
import math
import os
import stat
import sys

import pytest
import torch
from torch import distributions

from ilvae_fast import BrenierDecoder, _files
from ilvae_fast.vae import CONFIGURATIONS, LIKELIHOODS, VAE, Bernoulli, DiagonalGaussian, Gaussian, StandardNormal
from ilvae_fast.vae import VAEConfig as Config

SMALL = {"data_dim": 7, "latent_dim": 3, "encoder_hidden": (11,)}
HIDDEN = {"mlp": (11,), "brenier": ((6,), (9, 5))}


def small(name: str = "il-lidvae", **fields) -> Config:
    decoder = fields.get("decoder", CONFIGURATIONS[name]["decoder"])
    return Config.named(name, **{**SMALL, "decoder_hidden": HIDDEN.get(decoder), **fields})


def small_model(name: str = "il-lidvae", **fields) -> VAE:
    torch.manual_seed(0)
    return VAE(small(name, **fields)).double()


def batch(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# configurations


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_survives_json(name):
    config = small(name, likelihood_options={"scale": 0.3}, kl_weight=0.5)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_published_models_differ_in_decoder_and_constant():
    models = {name: small_model(name) for name in CONFIGURATIONS}
    assert not isinstance(models["vae"].decoder, BrenierDecoder)
    assert models["lidvae"].decoder.inverse_lipschitz_bound() == 0
    assert models["il-lidvae"].decoder.inverse_lipschitz_bound() == 1


def test_a_single_constant_stands_for_both_maps():
    assert small(inverse_lipschitz=0.5).inverse_lipschitz == (0.5, 0.5)
    assert float(small_model(inverse_lipschitz=(0.5, 3)).decoder.inverse_lipschitz_bound()) == 1.5


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
        ({"likelihood_options": 3}, TypeError, "likelihood_options: got 3"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, error, message):
    with pytest.raises(error, match=message):
        small(**{"decoder": "brenier", **fields})


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
    ],
)
def test_parts_refuse_what_they_cannot_be_built_from(name, fields, message):
    with pytest.raises(ValueError, match=message):
        VAE(small(name, **fields))


# parts, against torch.distributions


def test_gaussian_likelihood():
    x, f = batch(4), batch(5, 4)
    ours = Gaussian(scale=0.7)
    theirs = distributions.Normal(f, 0.7)
    torch.testing.assert_close(ours.log_prob(x, f), theirs.log_prob(x).sum(-1))
    assert ours.log_prob(x, f).shape == (5, 4)
    assert torch.equal(ours.mean(f), f)
    samples = ours.sample(f.new_zeros(20000, 1) + 2, torch.Generator().manual_seed(0))
    assert abs(samples.mean() - 2) < 0.02
    assert abs(samples.std() - 0.7) < 0.02


def test_bernoulli_likelihood():
    x, f = batch(4).round(), 4 * batch(5, 4) - 2
    ours = Bernoulli()
    theirs = distributions.Bernoulli(logits=f)
    torch.testing.assert_close(ours.log_prob(x, f), theirs.log_prob(x.expand_as(f)).sum(-1))
    torch.testing.assert_close(ours.mean(f), theirs.mean)
    samples = ours.sample(f.new_zeros(20000, 1) + 1, torch.Generator().manual_seed(0))
    assert set(samples.unique().tolist()) == {0, 1}
    assert abs(samples.mean() - theirs.mean.new_tensor(1.0).sigmoid()) < 0.02


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_score_is_the_gradient_of_the_log_density(name):
    likelihood, x = LIKELIHOODS[name](), batch(4)
    f = (4 * batch(5, 4) - 2).requires_grad_()
    (gradient,) = torch.autograd.grad(likelihood.log_prob(x, f).sum(), f)
    torch.testing.assert_close(likelihood.score(x, f), gradient)


def test_posterior_and_prior():
    posterior, prior = DiagonalGaussian(batch(4), batch(4) - 1), StandardNormal(7)
    theirs = distributions.Normal(posterior.mean, (posterior.log_variance / 2).exp())
    z = posterior.sample(6, torch.Generator().manual_seed(0))
    assert z.shape == (6, 4, 7)
    assert posterior.sample().shape == (4, 7)
    torch.testing.assert_close(posterior.log_prob(z), theirs.log_prob(z).sum(-1))
    standard = distributions.Normal(torch.zeros_like(posterior.mean), 1.0)
    torch.testing.assert_close(prior.log_prob(z), standard.log_prob(z).sum(-1))
    torch.testing.assert_close(prior.kl(posterior), distributions.kl_divergence(theirs, standard))
    many = posterior.sample(40000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(many.mean(0), theirs.mean, atol=0.03, rtol=0)
    torch.testing.assert_close(many.var(0), theirs.variance, atol=0.03, rtol=0)
    drawn = prior.sample(40000, torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(drawn.T.cov(), torch.eye(7, dtype=torch.float64), atol=0.03, rtol=0)


# the model


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_loss_is_the_negative_elbo(name, likelihood):
    model, x = small_model(name, likelihood=likelihood, kl_weight=0.3), batch(2, 4)
    output = model(x)
    assert output.f.shape == x.shape
    assert (
        output.z.shape == output.mean.shape == output.log_variance.shape == output.kl_per_dimension.shape == (2, 4, 3)
    )
    assert output.reconstruction.shape == output.kl.shape == (2, 4)
    torch.testing.assert_close(output.reconstruction, -model.likelihood.log_prob(x, model.decoder(output.z)))
    torch.testing.assert_close(output.kl, output.kl_per_dimension.sum(-1))
    weight = float(torch.tensor(0.3))  # the buffer was float32 first
    torch.testing.assert_close(output.loss, (output.reconstruction + weight * output.kl).mean())


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_parameter_is_trained(name):
    model = small_model(name)
    model(batch(4)).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


def test_a_schedule_fills_the_kl_weight_in_place():
    model, x = small_model(), batch(4)
    model.kl_weight.fill_(0)
    output = model(x)
    torch.testing.assert_close(output.loss, output.reconstruction.mean())
    assert "kl_weight" in model.state_dict()


def test_training_lowers_the_loss():
    model, x = small_model("il-lidvae", inverse_lipschitz=0.3), batch(64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = model(x).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < sum(losses[:10]) - 1


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_evaluation_keeps_no_graph(name):
    model, x = small_model(name), batch(4)
    z = model.encode(x)
    assert z.shape == (4, 3)
    assert torch.equal(z, model.inference(x).mean)
    assert torch.equal(model.decode(z), model.reconstruct(x))
    assert torch.equal(model.decode(z), model.likelihood.mean(model.decoder(z)))
    assert model.sample(5).shape == (5, 7)
    assert model.sample(5).dtype == torch.float64
    results = [z, model.decode(z), model.reconstruct(x), model.sample(5), model.log_likelihood(x, 3)]
    assert not any(result.requires_grad for result in results)


def test_noisy_samples_spread_by_the_likelihood():
    model = small_model(likelihood_options={"scale": 2.0})
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    noise = model.sample(5000, generators[0], noise=True) - model.sample(5000, generators[1])
    assert abs(noise.std() - 2) < 0.05


def test_the_log_likelihood_is_the_mean_of_the_weights():
    model, x = small_model("vae"), batch(3)
    ours = model.log_likelihood(x, 50, torch.Generator().manual_seed(4))
    samples = model.importance_sample(x, 50, torch.Generator().manual_seed(4))
    assert samples.z.shape == (50, 3, 3)
    assert samples.f.shape == (50, 3, 7)
    torch.testing.assert_close(ours, samples.log_weights.exp().mean(0).log())


def test_the_log_likelihood_does_not_depend_on_how_samples_are_cut(monkeypatch):
    model, x = small_model("vae", latent_dim=4), batch(4)  # 16 values a draw: torch's generator goes by sixteens
    whole = model.log_likelihood(x, 20000, torch.Generator().manual_seed(4))
    monkeypatch.setattr("ilvae_fast.vae.model._ROWS", 1000)
    pieces = model.log_likelihood(x, 20000, torch.Generator().manual_seed(4))
    torch.testing.assert_close(whole, pieces)


def test_bad_inputs_are_refused_by_name():
    model = small_model()
    with pytest.raises(ValueError, match=r"x: got shape \(4, 6\), wanted \(\.\.\., 7\)"):
        model(torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"z: got shape \(4, 2\), wanted \(\.\.\., 3\)"):
        model.decode(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="num_importance_samples: got 0"):
        model.log_likelihood(batch(4), 0)


# files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("embedding", ["identity", "orthogonal", "full_rank"])
def test_a_saved_model_comes_back_the_same(tmp_path, dtype, embedding):
    model = small_model(embedding=embedding, inverse_lipschitz=0.1).to(dtype)
    model.decoder.data_map.inverse_lipschitz = 0.7  # moved since it was configured
    model.kl_weight.fill_(0.25)
    model.save_pretrained(tmp_path / "deep" / "folder")
    loaded = VAE.from_pretrained(tmp_path / "deep" / "folder")
    assert loaded.config == model.config
    state, other = model.state_dict(), loaded.state_dict()
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name
    assert sorted(p.name for p in (tmp_path / "deep" / "folder").iterdir()) == ["config.json", "model.safetensors"]


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


def test_without_safetensors_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"safetensors is needed.*pip install ilvae_fast\[train\]"):
        small_model().save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_write_that_dies_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    _files.write_atomically(path, "old")

    def die(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        _files.write_atomically(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").write_text("")
    _files.write_atomically(tmp_path / "ours", "")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
