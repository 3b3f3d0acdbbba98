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

from ilvae_fast import Activation, BrenierDecoder, NonNegative, _files
from ilvae_fast.vae import (
    CONFIGURATIONS,
    LIKELIHOODS,
    VAE,
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiagonalGaussian,
    Gaussian,
    GaussianMixture,
    GaussianMixturePosterior,
    StandardNormal,
)
from ilvae_fast.vae import VAEConfig as Config

SMALL = {"data_dim": 7, "latent_dim": 3, "encoder_hidden": (11,)}
HIDDEN = {"mlp": (11,), "brenier": ((6,), (9, 5))}
TOKENS = 13
OPTIONS = {"categorical": {"num_categories": TOKENS}}
MIXTURES = [name for name in CONFIGURATIONS if "prior" in CONFIGURATIONS[name]]
SEQUENCES = [name for name in CONFIGURATIONS if "autoregressive_hidden" in CONFIGURATIONS[name]]
STATIC = [name for name in CONFIGURATIONS if name not in SEQUENCES]


def small(name: str = "il-lidvae", **fields) -> Config:
    decoder = fields.get("decoder", CONFIGURATIONS[name]["decoder"])
    sized = {**SMALL, "decoder_hidden": HIDDEN.get(decoder)}
    if name in SEQUENCES:
        sized.update(autoregressive_hidden=8, token_embedding=5, likelihood_options=OPTIONS["categorical"])
    if name in MIXTURES:
        sized["prior_options"] = {"num_components": 4}
    return Config.named(name, **{**sized, **fields})


def small_model(name: str = "il-lidvae", **fields) -> VAE:
    torch.manual_seed(0)
    return VAE(small(name, **fields)).double()


def batch(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def tokens(*shape: int) -> torch.Tensor:
    """Sequences of 4 to 7 tokens."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(TOKENS, (*shape, 7), generator=generator)
    lengths = torch.randint(4, 8, (*shape, 1), generator=generator)
    return torch.where(torch.arange(7) < lengths, x, -1)


def data_for(name: str, *shape: int) -> torch.Tensor:
    return tokens(*shape) if name in SEQUENCES else batch(*shape)


# configurations


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
        assert decoders[2].inverse_lipschitz_bound() == 1


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
        ({"decoder_options": {"nonneg": {"parameter": 1.0}}}, ValueError, "nonneg: got none called 'name'"),
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
        ("svae", {"likelihood_options": {}}, "likelihood_options: got none called 'num_categories'"),
        ("svae", {"encoder": "mlp"}, "encoder: got 'mlp' with a categorical likelihood"),
        ("lidsvae", {"autoregressive_hidden": 11}, "autoregressive_hidden: got 11 with latent_dim 3, wanted at most"),
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


def test_bernoulli_logits_are_exact_in_float64_whatever_their_size():
    f = torch.tensor([-50.0, 0.0, 19.5, 20.5, 25.0, 35.0, 800.0], dtype=torch.float64).unsqueeze(-1).requires_grad_()
    log_prob = Bernoulli().log_prob(torch.zeros_like(f), f)
    expected = [-max(v, 0.0) - math.log1p(math.exp(-abs(v))) for v in f.flatten().tolist()]
    torch.testing.assert_close(log_prob, f.new_tensor(expected), rtol=1e-15, atol=0)
    (gradient,) = torch.autograd.grad(log_prob.sum(), f)
    torch.testing.assert_close(gradient, -f.detach().sigmoid(), rtol=1e-15, atol=0)


def test_data_outside_a_likelihoods_range_are_refused_with_theirs():
    for likelihood in (Bernoulli(), ContinuousBernoulli()):
        likelihood.check(batch(4).round())
        with pytest.raises(ValueError, match=r"x: got values from -0\.5 to 3, wanted .*grey values in \[0, 1\]"):
            likelihood.check(torch.tensor([[0.0, -0.5], [1.0, 3.0]]))
        with pytest.raises(ValueError, match="x: got values from nan"):
            likelihood.check(torch.tensor([0.5, math.nan]))
    Gaussian().check(torch.tensor([-1e9, 1e9]))
    Categorical(TOKENS).check(tokens(4))
    with pytest.raises(ValueError, match=r"x: got values from -1 to 13, wanted int64 tokens.*: -1 to 12"):
        Categorical(TOKENS).check(torch.tensor([-1, TOKENS]))


def test_continuous_bernoulli_likelihood():
    ours, x = ContinuousBernoulli(), batch(4)
    theirs_of = distributions.ContinuousBernoulli
    f = 40 * batch(5, 4) - 20
    torch.testing.assert_close(ours.log_prob(x, f), theirs_of(logits=f).log_prob(x.expand_as(f)).sum(-1))
    torch.testing.assert_close(ours.mean(f), theirs_of(logits=f).mean)
    for logit in (-30.0, -0.5, 1e-4, 3.0):
        samples = ours.sample(f.new_full((20000, 1), logit), torch.Generator().manual_seed(0))
        assert 0 <= samples.min() < samples.max() <= 1
        assert samples.mean().item() == pytest.approx(ours.mean(f.new_tensor(logit)).item(), abs=0.01)


def test_continuous_bernoulli_is_normalised_across_the_switch_to_series():
    ours = ContinuousBernoulli()
    x = torch.linspace(0, 1, 20001, dtype=torch.float64).unsqueeze(-1)
    for f in (0.0, 1e-8, 0.0999999, 0.1000001, -0.1000001, 700.0, -700.0):
        density = ours.log_prob(x, x.new_tensor([f])).exp()
        if abs(f) < 1:
            assert torch.trapezoid(density, x.squeeze(-1)).item() == pytest.approx(1, abs=1e-8)
            mean = torch.trapezoid(density * x.squeeze(-1), x.squeeze(-1)).item()
            assert ours.mean(x.new_tensor(f)).item() == pytest.approx(mean, abs=1e-8)
        else:
            assert density.isfinite().all()
    near = torch.tensor([[0.1 - 1e-16], [0.1 + 1e-16]], dtype=torch.float64)
    for value in (ours.log_prob(x[3], near), ours.mean(near)):
        torch.testing.assert_close(value[0], value[1], rtol=1e-11, atol=1e-13)


def test_categorical_likelihood_and_its_absent_tokens():
    ours, x = Categorical(TOKENS), tokens(4)
    f = torch.randn(5, 4, 7 * TOKENS, dtype=torch.float64)
    theirs = distributions.Categorical(logits=f.unflatten(-1, (7, TOKENS)))
    each = theirs.log_prob(x.clamp(min=0).expand(5, 4, 7))
    assert (x < 0).any()
    torch.testing.assert_close(ours.log_prob(x, f), (each * (x >= 0)).sum(-1))
    assert torch.equal(ours.mean(f), theirs.probs.argmax(-1))
    logits = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    drawn = Categorical(3).sample(logits.repeat(9000, 2), torch.Generator().manual_seed(0))
    assert drawn.shape == (9000, 2)
    torch.testing.assert_close(
        drawn.flatten().bincount() / 18000, logits.softmax(-1), atol=0.02, rtol=0, check_dtype=False
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_an_optimal_variance_follows_the_mean_squared_error(weighted):
    likelihood = Gaussian(scale=5.0, variance="optimal").double()
    x, f = batch(50), batch(2, 50) if weighted else batch(50) + 0.1
    weights = torch.tensor([[0.25], [0.75]], dtype=torch.float64).expand(2, 50) if weighted else None
    square = (x - f).square().mean(-1)
    expected = square.mean() if weights is None else (weights * square).sum(0).mean()
    likelihood.adapt(x, f, weights)
    torch.testing.assert_close(likelihood.scale.square().squeeze(0), expected)  # at once the first time
    likelihood.adapt(x, x if weights is None else x.expand(2, 50, 7), weights)
    torch.testing.assert_close(likelihood.scale.square().squeeze(0), 0.95 * expected)
    # and there the likelihood is largest
    likelihood.log_scale.copy_(0.5 * expected.log()).requires_grad_()
    log_prob = likelihood.log_prob(x, f) if weights is None else (weights * likelihood.log_prob(x, f)).sum(0)
    (slope,) = torch.autograd.grad(log_prob.mean(), likelihood.log_scale)
    assert abs(slope.item()) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_optimal_variance_of_no_error_stays_above_zero(dtype):
    likelihood, x = Gaussian(scale=5.0, variance="optimal").to(dtype), batch(4).to(dtype)
    for _ in range(2):
        likelihood.adapt(x, x, None)
        assert float(likelihood.scale) == pytest.approx(5e-6, rel=1e-5)
        assert likelihood.log_prob(x, x).isfinite().all()
    likelihood.adapt(x, x + 0.1, None)  # and moves on
    assert float(likelihood.scale) == pytest.approx(math.sqrt(0.05) * 0.1, rel=1e-4)


def test_variances_move_only_as_they_are_told():
    x = batch(64)
    for variance, moves in (("fixed", False), ("trained", True), ("optimal", True)):
        model = small_model(likelihood_options={"scale": 2.0, "variance": variance})
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        model(x).loss.backward()
        optimizer.step()
        assert (float(torch.as_tensor(model.likelihood.scale).detach()) != 2.0) == moves
        at = float(torch.as_tensor(model.likelihood.scale).detach())
        model.eval()
        model(x)
        assert float(torch.as_tensor(model.likelihood.scale).detach()) == at


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_score_is_the_gradient_of_the_log_density(name):
    likelihood, x = LIKELIHOODS[name](**OPTIONS.get(name, {})), tokens(4) if name == "categorical" else batch(4)
    f = (4 * torch.rand(5, 4, 7 * likelihood.parameters_per_value, dtype=torch.float64) - 2).requires_grad_()
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_variance", [-1.0, -32.0, -90.0])
def test_the_density_of_a_sample_is_that_of_its_noise(log_variance, dtype):
    q = DiagonalGaussian(torch.full((3, 2), 5.0, dtype=dtype), torch.full((3, 2), log_variance, dtype=dtype))
    z, log_q = q.sample_with_log_prob(1000, torch.Generator().manual_seed(0))
    assert torch.equal(z, q.sample(1000, torch.Generator().manual_seed(0)))
    noise = torch.randn(1000, 3, 2, dtype=dtype, generator=torch.Generator().manual_seed(0))
    expected = distributions.Normal(0.0, 1.0).log_prob(noise.double()).sum(-1) - log_variance
    torch.testing.assert_close(log_q.double(), expected, rtol=1e-6, atol=1e-6)
    assert q.log_prob(z).isfinite().all()  # of a rounded z, but a number
    assert q.log_prob(q.mean)[0].item() == pytest.approx(-log_variance - math.log(2 * math.pi), rel=1e-6)
    # the same for a mixture of two such, and a third so far away that it does not count
    shifts = torch.tensor([0.0, 0.0, 100.0], dtype=dtype).view(3, 1)
    means, log_variances = q.mean.unsqueeze(-2) + shifts, q.log_variance.unsqueeze(-2).expand(3, 3, 2)
    mixture = GaussianMixturePosterior(means.new_tensor([0.0, 1.0, -100.0]).expand(3, 3), means, log_variances)
    _, log_q = mixture.sample_with_log_prob(1000, torch.Generator().manual_seed(0))
    entropy = 1 + log_variance + math.log(2 * math.pi)
    assert log_q.mean().item() == pytest.approx(-entropy, abs=0.1)


def test_the_density_of_a_samples_own_mixture_is_its_log_prob():
    posterior = GaussianMixture(3, 4).double().posterior(torch.randn(5, 4 * 7, dtype=torch.float64))
    for count in (None, 1, 6):
        z, log_q = posterior.sample_with_log_prob(count, torch.Generator().manual_seed(0))
        assert torch.equal(z, posterior.sample(count, torch.Generator().manual_seed(0)))
        torch.testing.assert_close(log_q, posterior.log_prob(z))


# the model


@pytest.mark.parametrize("likelihood", [name for name in LIKELIHOODS if name != "categorical"])
@pytest.mark.parametrize("name", ["vae", "lidvae", "il-lidvae"])
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
    model(data_for(name, 4)).loss.backward()
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
    model, x = small_model(name), data_for(name, 4)
    z = model.encode(x)
    assert z.shape == (4, 3)
    assert torch.equal(z, model.inference(x).mean)
    assert torch.equal(model.decode(z), model.reconstruct(x))
    if name in STATIC:
        assert torch.equal(model.decode(z), model.likelihood.mean(model.decoder(z)))
    assert model.sample(5).shape == (5, 7)
    assert model.sample(5, noise=True).dtype == x.dtype
    line = model.interpolate(x[0], x[1], 5)
    assert line.shape == (5, 7)
    torch.testing.assert_close(line[0], model.reconstruct(x[:1])[0])
    torch.testing.assert_close(line[-1], model.reconstruct(x[1:2])[0])
    results = [z, model.decode(z), model.reconstruct(x), model.sample(5), model.log_likelihood(x, 3), line]
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


@pytest.mark.parametrize("name", ["vae", "gmvae"])
def test_importance_weights_are_right_where_the_posterior_is_narrower_than_rounding(name):
    class Own(torch.nn.Module):
        def forward(self, x):
            means = x.new_full((*x.shape[:-1], 3), 5.0)
            if name == "vae":
                return DiagonalGaussian(means, torch.full_like(means, -32.0))
            means = means.unsqueeze(-2).expand(*x.shape[:-1], 4, 3)
            return GaussianMixturePosterior(torch.zeros_like(means[..., 0]), means, torch.full_like(means, -32.0))

    torch.manual_seed(0)
    model, x = VAE(small(name), encoder=Own()), batch(4).float()
    log_weights = model.importance_sample(x, 2000, torch.Generator().manual_seed(0)).log_weights
    z = torch.full((4, 3), 5.0)
    entropy = 1.5 * (1 - 32 + math.log(2 * math.pi))
    elbo = model.likelihood.log_prob(x, model.generative(z)) + model.prior.log_prob(z) + entropy
    torch.testing.assert_close(log_weights.mean(0), elbo.detach(), rtol=0, atol=0.15)  # half a chi^2 of three, averaged


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


# mixtures


@pytest.mark.parametrize("trained", [False, True])
def test_a_mixture_prior_and_its_posterior(trained):
    prior = GaussianMixture(3, 4, trained_variances=trained).double()
    if trained:
        prior.log_variances.data.normal_()
    z = torch.randn(6, 5, 3, dtype=torch.float64)
    components = distributions.Independent(distributions.Normal(prior.means, (prior.log_variances / 2).exp()), 1)
    theirs = distributions.MixtureSameFamily(distributions.Categorical(logits=torch.zeros(4).double()), components)
    torch.testing.assert_close(prior.log_prob(z), theirs.log_prob(z))
    drawn = prior.sample(40000, torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(drawn.mean(0), theirs.mean, atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.var(0), theirs.variance, atol=0.1, rtol=0.05)

    posterior = prior.posterior(torch.randn(5, prior.num_posterior_parameters, dtype=torch.float64))
    q_y = distributions.Categorical(logits=posterior.logits)
    q_z = distributions.Normal(posterior.means, (posterior.log_variances / 2).exp())
    q = distributions.MixtureSameFamily(q_y, distributions.Independent(q_z, 1))
    torch.testing.assert_close(posterior.log_prob(z), q.log_prob(z))
    torch.testing.assert_close(posterior.mean, q.mean)
    torch.testing.assert_close(posterior.log_variance.exp(), q.variance)
    many = posterior.sample(40000, torch.Generator().manual_seed(0))
    assert many.shape == (40000, 5, 3)
    assert posterior.sample().shape == (5, 3)
    torch.testing.assert_close(many.mean(0), q.mean, atol=0.1, rtol=0)
    torch.testing.assert_close(many.var(0), q.variance, atol=0.1, rtol=0.1)

    p_z = distributions.Normal(prior.means, (prior.log_variances / 2).exp())
    given_y = distributions.kl_divergence(q_z, p_z)
    torch.testing.assert_close(prior.kl(posterior), (q_y.probs.unsqueeze(-1) * given_y).sum(-2))
    uniform = distributions.Categorical(logits=torch.zeros(4).double())
    torch.testing.assert_close(prior.assignment_kl(posterior), distributions.kl_divergence(q_y, uniform))


@pytest.mark.parametrize("name", MIXTURES)
def test_the_loss_of_a_mixture_sums_over_its_components(name):
    model, x = small_model(name, kl_weight=0.5), batch(2, 4)
    output = model(x)
    assert isinstance(output.posterior, GaussianMixturePosterior)
    assert output.z.shape == (4, 2, 4, 3)
    assert output.f.shape == (4, 2, 4, 7)
    q_y = output.posterior.logits.softmax(-1)
    expected = sum(-q_y[..., k] * model.likelihood.log_prob(x, model.decoder(output.z[k])) for k in range(4))
    torch.testing.assert_close(output.reconstruction, expected)
    assignment = model.prior.assignment_kl(output.posterior)
    torch.testing.assert_close(output.kl, output.kl_per_dimension.sum(-1) + assignment)
    torch.testing.assert_close(output.loss, (output.reconstruction + 0.5 * output.kl).mean())
    # and is a bound of the likelihood that importance weights of the marginal q(z|x) tighten
    model.kl_weight.fill_(1)
    many = torch.stack([model(x).loss.detach() for _ in range(50)]).mean()
    assert many > -model.log_likelihood(x, 2000).mean() - 0.01


# against collapse


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("free_bits", [0.0, 0.1])
def test_a_single_datum_needs_no_batch(name, free_bits):
    model, x = small_model(name, free_bits=free_bits), data_for(name)
    assert x.dim() == 1
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    torch.testing.assert_close(model(x, seeds[0]).loss.squeeze(), model(x.unsqueeze(0), seeds[1]).loss)
    assert model.log_likelihood(x, 3).shape == ()
    assert model.reconstruct(x).shape == x.shape


def test_free_bits_charge_no_less_than_their_number_for_each_latent():
    model, x = small_model(free_bits=0.05, kl_weight=0.5), batch(8)
    output = model(x)
    means = output.kl_per_dimension.mean(0)
    assert means.min() < 0.05 < means.max()
    torch.testing.assert_close(output.loss, output.reconstruction.mean() + 0.5 * means.clamp(min=0.05).sum())
    none = small_model(free_bits=1e-12, kl_weight=0.5)
    none.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        none.loss(x, output.posterior, output.z, output.f).loss, (output.reconstruction + 0.5 * output.kl).mean()
    )


@pytest.mark.parametrize("rate", [0.01, 1.0, 40.0])
def test_a_minimum_rate_is_kept_whatever_the_encoder_says(rate):
    prior = StandardNormal(3, minimum_rate=rate)
    least = prior.posterior(torch.cat([torch.zeros(1, 3), torch.full((1, 3), 60.0)], -1).double())
    assert prior.kl(least).sum().item() == pytest.approx(rate, rel=1e-6)
    assert (prior.kl(prior.posterior(5 * torch.randn(100, 6))).sum(-1) >= rate * (1 - 1e-4)).all()
    # exact in float64 far below the ceiling too
    ceiling = prior.posterior(torch.full((6,), 1e3, dtype=torch.float64)).log_variance[0].item()
    below = prior.posterior(torch.full((6,), ceiling - 22, dtype=torch.float64)).log_variance[0].item()
    assert below == pytest.approx(ceiling - 22 - math.log1p(math.exp(-22)), rel=0, abs=1e-13)


# encoders and sequences


@pytest.mark.parametrize("data_shape", [(5, 7), (2, 5, 7)])
def test_a_convolutional_encoder(data_shape):
    model = VAE(Config(math.prod(data_shape), 3, encoder="conv", encoder_hidden=(4, 6), data_shape=data_shape))
    x = torch.rand(2, 3, math.prod(data_shape))
    whole = model.inference(x)
    assert whole.mean.shape == (2, 3, 3)
    torch.testing.assert_close(model.inference(x[1, 2]).mean, whole.mean[1, 2])
    assert not torch.allclose(whole.mean[0], whole.mean[1])


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


# precision


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_autocast_leaves_likelihood_and_kl_in_float32(name):
    model, x = small_model(name).float(), data_for(name, 4)
    x = x if name in SEQUENCES else x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
    assert output.loss.dtype == output.reconstruction.dtype == output.kl.dtype == torch.float32
    output.loss.backward()


def test_autocast_widens_the_posterior_of_a_users_own_encoder_too():
    class Own(torch.nn.Linear):
        def forward(self, x):
            return DiagonalGaussian(*super().forward(x).chunk(2, -1))

    model = VAE(small(), encoder=Own(7, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(batch(4).float())
    assert output.posterior.mean.dtype == output.loss.dtype == torch.float32


# files


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_model_comes_back(tmp_path, name):
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


def test_a_configuration_that_json_cannot_hold_leaves_no_file(tmp_path):
    model = small_model(decoder_options={"route": "auto"})
    model.config.decoder_options["route"] = object()
    with pytest.raises(TypeError, match="not JSON serializable"):
        model.save_pretrained(tmp_path / "run")
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


@pytest.mark.parametrize("shape", [(), (0,), (2, 0)])
@pytest.mark.parametrize("name", [*CONFIGURATIONS, "conv"])
def test_any_leading_shape_even_an_empty_one(name, shape):
    conv = {"encoder": "conv", "encoder_hidden": (3,), "data_shape": (4, 4), "data_dim": 16}
    model = small_model(**conv) if name == "conv" else small_model(name)
    x = tokens(4)[0].expand(*shape, -1) if name in SEQUENCES else torch.ones(*shape, model.config.data_dim).double()
    assert model(x).reconstruction.shape == shape
    assert model.encode(x).shape == (*shape, 3)
