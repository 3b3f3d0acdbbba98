"""The variational autoencoder: objective, measures, precision and shapes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions

from ilvae_fast.vae import (
    CONFIGURATIONS,
    LIKELIHOODS,
    VAE,
    DiagonalGaussian,
    GaussianMixture,
    GaussianMixturePosterior,
    StandardNormal,
)
from vae_cases import MIXTURES, SEQUENCES, STATIC, batch, data_for, small, small_model, tokens

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
    torch.testing.assert_close(
        log_weights.mean(0), elbo.detach(), rtol=0, atol=0.15
    )  # the noise of an averaged half chi^2 of three


def test_the_log_likelihood_does_not_depend_on_how_samples_are_cut(monkeypatch):
    model, x = small_model("vae", latent_dim=4), batch(4)  # 16 values a draw: PyTorch's generator draws 16 at a time
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
    with pytest.raises(TypeError, match=r"x: got ndarray, wanted a tensor; torch\.as_tensor makes one"):
        model(torch.zeros(4, 7).numpy())
    with pytest.raises(TypeError, match="x: got list, wanted a tensor"):
        model.log_likelihood([[0.0] * 7])
    with pytest.raises(TypeError, match="z: got NoneType, wanted a tensor"):
        model.decode(None)
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


def test_a_component_that_the_encoder_rules_out():
    prior = GaussianMixture(2, num_components=3)
    logits = torch.tensor([[0.3, -torch.inf, 0.1]], requires_grad=True)
    posterior = GaussianMixturePosterior(logits, torch.zeros(1, 3, 2), torch.zeros(1, 3, 2))
    kl = prior.assignment_kl(posterior)
    q = torch.tensor([0.3, 0.1]).softmax(0)
    torch.testing.assert_close(kl, (q * q.log()).sum().reshape(1) + math.log(3))
    assert torch.autograd.grad(kl.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("log_variance", [-1e-3, -1e-5, 1e-4, 0.0, 1e-2])
def test_the_kl_near_collapse_is_accurate_in_float32(log_variance):
    t = torch.tensor([[log_variance]])
    exact = 0.5 * (t.double().expm1() - t.double())
    kl = StandardNormal(1).kl(DiagonalGaussian(torch.zeros(1, 1), t))
    assert abs(kl.item() - exact.item()) <= 1e-7 * abs(log_variance)
    prior = GaussianMixture(1, num_components=1, spread=0.0)
    mixture = GaussianMixturePosterior(torch.zeros(1, 1), torch.zeros(1, 1, 1), t.unsqueeze(1))
    torch.testing.assert_close(prior.kl(mixture), kl)


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
    # and it bounds the likelihood, as importance weights of the marginal q(z|x) estimate it more tightly
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


@pytest.mark.parametrize("shape", [(), (0,), (2, 0)])
@pytest.mark.parametrize("name", [*CONFIGURATIONS, "conv"])
def test_any_leading_shape_even_an_empty_one(name, shape):
    conv = {"encoder": "conv", "encoder_hidden": (3,), "data_shape": (4, 4), "data_dim": 16}
    model = small_model(**conv) if name == "conv" else small_model(name)
    x = tokens(4)[0].expand(*shape, -1) if name in SEQUENCES else torch.ones(*shape, model.config.data_dim).double()
    assert model(x).reconstruction.shape == shape
    assert model.encode(x).shape == (*shape, 3)
