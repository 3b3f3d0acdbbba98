"""The metrics against closed forms of a linear Gaussian model, brute force on a grid, and their inequalities."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal, kl_divergence

from examples.closed_forms import DTYPE, Linear
from ilvae_fast import metrics
from ilvae_fast.vae import VAE, DiagonalGaussian, VAEConfig
from vae_cases import batch, data_for, seeded, small_model, tokens, values_of

# closed forms


@pytest.mark.parametrize(("latent_dim", "data_dim"), [(1, 1), (2, 5), (3, 3)])
def test_negative_log_likelihood_of_a_linear_model(latent_dim, data_dim):
    linear = Linear(latent_dim, data_dim)
    estimate = metrics.negative_log_likelihood(linear.model, linear.x, 4000, generator=seeded())
    assert estimate == pytest.approx(linear.nll(), abs=0.02)


def test_one_sample_of_the_true_posterior_gives_the_likelihood_exactly():
    linear = Linear(3, 5, orthogonal=True)
    assert metrics.negative_log_likelihood(linear.model, linear.x, 1) == pytest.approx(linear.nll(), rel=1e-12)
    # all weights are equal then
    assert metrics.relative_fisher(linear.model, linear.x, 8).effective_sample_size == pytest.approx(8, rel=1e-12)


def test_more_importance_samples_tighten_the_bound():
    linear = Linear(3, 3)
    estimates = [
        metrics.negative_log_likelihood(linear.model, linear.x.repeat(200, 1), n, generator=seeded())
        for n in (1, 4, 100)
    ]
    assert estimates[0] > estimates[1] + 0.02
    assert estimates[1] > estimates[2] + 0.02
    assert estimates[2] > linear.nll() - 0.01


@pytest.mark.parametrize(("latent_dim", "data_dim"), [(1, 1), (2, 5), (3, 3)])
def test_elbo_and_gain_of_a_linear_model(latent_dim, data_dim):
    linear = Linear(latent_dim, data_dim)
    many = linear.x.repeat(50, 1)
    assert metrics.elbo(linear.model, many, 40, generator=seeded()) == pytest.approx(linear.elbo(), abs=0.02)
    gain = metrics.gain(linear.model, many, linear.x, 40, generator=seeded())
    assert gain == pytest.approx(linear.gain(), abs=0.02)
    assert linear.elbo() < -linear.nll() + 1e-12


def test_the_gain_is_relative_to_training_data_or_a_given_baseline():
    linear = Linear(3, 5, orthogonal=True)
    model, x, elsewhere = linear.model, linear.x, linear.x[:20] + 1
    assert metrics.elbo(model, x, 500, generator=seeded()) == pytest.approx(-linear.nll(), abs=0.03)  # q(z|x) is exact
    without = metrics.nll_without_latent(model, x, elsewhere)
    expected = -Normal(elsewhere.mean(0), 0.8).log_prob(x).sum(-1).mean().item()
    assert without == pytest.approx(expected)
    gain, elbo = (f(model, x, *d, generator=seeded()) for f, d in ((metrics.gain, [elsewhere]), (metrics.elbo, [])))
    assert gain == pytest.approx(elbo + without)
    assert metrics.gain(model, x, baseline=without, generator=seeded()) == pytest.approx(gain)
    with pytest.raises(ValueError, match="train: got None, wanted the training data, or a baseline"):
        metrics.gain(model, x)


def test_a_trained_scale_is_fitted_before_the_gain_is_counted():
    """Otherwise a better sigma alone would count as a gain."""
    torch.manual_seed(0)
    x = 5 * torch.randn(300, 4, dtype=DTYPE)
    options = {"decoder": "mlp", "decoder_hidden": (4,), "likelihood_options": {"scale": 5.0, "variance": "trained"}}
    model = VAE(VAEConfig(4, 2, **options)).double()
    with torch.no_grad():
        for parameter in (*model.encoder.parameters(), *model.decoder.parameters()):
            parameter.zero_()  # f = 0 and KL = 0: it ignores its latent
    assert metrics.elbo(model, x) < metrics.elbo(model, 0 * x)
    assert metrics.gain(model, x, x) == pytest.approx(0, abs=0.02)
    model.likelihood.log_scale.data.fill_(0.0)
    assert metrics.gain(model, x, x) < -10


@pytest.mark.parametrize("name", ["vae", "il-lidmvae", "svae"])
def test_the_elbo_is_that_of_training(name):
    model, x = small_model(name), data_for(name, 60)
    torch.manual_seed(0)
    losses = [model(x).loss.item() for _ in range(20)]
    assert metrics.elbo(model, x, 20) == pytest.approx(-sum(losses) / 20, abs=0.05 + abs(losses[0]) / 100)
    model.kl_weight.fill_(0.0)
    assert metrics.elbo(model, x, 20) == pytest.approx(-sum(losses) / 20, abs=0.05 + abs(losses[0]) / 100)


def test_a_model_of_sequences_gains_only_over_a_baseline_that_is_given():
    model, x = small_model("svae"), tokens(6)
    assert math.isnan(metrics.gain(model, x, x))
    assert math.isnan(metrics.nll_without_latent(model, x, x))
    gain = metrics.gain(model, x, x, baseline=20.0, generator=seeded())
    assert gain == pytest.approx(20 + metrics.elbo(model, x, generator=seeded()))


@pytest.mark.parametrize("name", ["bernoulli", "continuous_bernoulli", "poisson", "negative_binomial"])
def test_a_model_of_the_marginals_gains_nothing(name):
    model, x = small_model("vae", likelihood=name), values_of(name, 500)
    with torch.no_grad():
        model.encoder[-1].weight.zero_()
        model.encoder[-1].bias.zero_()
        model.decoder[-1].weight.zero_()
        model.decoder[-1].bias.copy_(model.likelihood.marginal(x))
        if name == "negative_binomial":
            model.likelihood.log_dispersion.copy_(model.likelihood.ignoring(x)[0].log_dispersion)
    assert metrics.gain(model, x, x) == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        model.decoder[-1].bias.add_(0.3)
    assert metrics.gain(model, x, x) < -0.01


def test_kl_divergence_of_a_linear_model():
    linear = Linear(3, 5)
    result = metrics.kl_divergence(linear.model, linear.x)
    q = Normal(linear.mean, linear.covariance.diagonal().sqrt().expand_as(linear.mean))
    expected = kl_divergence(q, Normal(torch.zeros_like(linear.mean), 1.0)).mean(0)
    torch.testing.assert_close(result.per_dimension, expected)
    assert result.total == pytest.approx(expected.sum().item(), rel=1e-12)


def test_active_units_of_a_linear_model():
    linear = Linear(3, 5)
    expected = linear.mean.var(0, correction=0)
    result = metrics.active_units(linear.model, linear.x)
    torch.testing.assert_close(result.variances, expected)
    assert result.active == 3
    between = expected.sort().values[:2].mean().item()
    assert metrics.active_units(linear.model, linear.x, between).active == 2
    assert metrics.active_units(linear.model, linear.x, expected.max().item() * 1.001).active == 0


def test_active_directions_of_a_linear_model():
    linear = Linear(3, 5)
    expected = linear.direction_variances()
    result = metrics.active_directions(linear.model, linear.x, batch_size=7)
    torch.testing.assert_close(result.variances, expected)
    assert result.active == 3
    assert metrics.active_directions(linear.model, linear.x, expected[1].item() * 0.999).active == 2
    assert metrics.active_directions(linear.model, linear.x, expected[0].item() * 1.001).active == 0


@given(seed=st.integers(0, 1000), latent_dim=st.integers(2, 5))
def test_a_rotation_changes_active_units_but_not_directions(seed, latent_dim):
    generator = seeded(seed)
    x = torch.randn(50, 1, dtype=DTYPE, generator=generator) * torch.eye(latent_dim, dtype=DTYPE)[0]  # one direction
    rotation = torch.linalg.qr(torch.randn(latent_dim, latent_dim, dtype=DTYPE, generator=generator)).Q
    straight, turned = (
        SimpleNamespace(inference=lambda x, q=q: DiagonalGaussian(x @ q, torch.zeros_like(x)))
        for q in (torch.eye(latent_dim, dtype=DTYPE), rotation)
    )
    variances = metrics.active_directions(straight, x).variances
    torch.testing.assert_close(metrics.active_directions(turned, x).variances, variances, rtol=0, atol=1e-12)
    units = metrics.active_units(turned, x).variances
    threshold = units.min().item() / 2
    assert metrics.active_units(turned, x, threshold).active == latent_dim
    assert metrics.active_units(straight, x, threshold).active == 1
    assert metrics.active_directions(turned, x, threshold).active == 1
    assert variances[0] >= units.max()  # Schur and Horn


def test_variances_are_accurate_for_means_far_from_zero():
    model = SimpleNamespace(inference=lambda x: DiagonalGaussian(x, torch.zeros_like(x)))
    x = torch.randn(1000, 2, generator=seeded()).double() + 1e8
    variances = metrics.active_units(model, x, batch_size=7).variances
    torch.testing.assert_close(variances, x.var(0, correction=0), rtol=1e-6, atol=0)
    eigenvalues = torch.linalg.eigvalsh(x.T.cov(correction=0)).flip(0)
    torch.testing.assert_close(
        metrics.active_directions(model, x, batch_size=7).variances, eigenvalues, rtol=1e-6, atol=0
    )


def test_directions_of_a_posterior_that_is_not_finite():
    model = SimpleNamespace(inference=lambda x: DiagonalGaussian(x, torch.zeros_like(x)))
    result = metrics.active_directions(model, torch.tensor([[0.0, math.inf], [1.0, 0.0]]))
    assert result.active == 0
    assert result.variances.isnan().all()


@pytest.mark.parametrize(("latent_dim", "data_dim"), [(1, 1), (1, 4), (2, 5), (3, 3)])
def test_relative_fisher_of_a_linear_model(latent_dim, data_dim):
    linear = Linear(latent_dim, data_dim)
    result = metrics.relative_fisher(linear.model, linear.x, 4000, generator=seeded())
    assert result.divergence == pytest.approx(linear.residual(linear.w.T), rel=0.03)
    projection = linear.w @ torch.linalg.pinv(linear.w)
    projected = linear.residual(projection)
    assert result.projected_residual == pytest.approx(projected, rel=0.03)
    constant = torch.linalg.svdvals(linear.w).min().item()
    assert result.lower_bound == pytest.approx(constant**2 * projected, rel=0.03)
    assert 1 < result.effective_sample_size <= 4000 * (1 + 1e-9)


def test_the_bound_is_tight_for_one_latent_and_needs_the_projection():
    linear = Linear(1, 4)
    result = metrics.relative_fisher(linear.model, linear.x, 64)
    assert result.lower_bound == pytest.approx(result.divergence, rel=1e-12)
    # without the projection, or with a constant 1 % too large, the inequality does not hold
    constant = torch.linalg.svdvals(linear.w).min().item()
    assert constant**2 * linear.residual(torch.eye(4, dtype=DTYPE)) > 1.1 * linear.residual(linear.w.T)
    linear.model.decoder.inverse_lipschitz_bound = lambda: torch.tensor(1.01 * constant, dtype=DTYPE)
    too_large = metrics.relative_fisher(linear.model, linear.x, 64)
    assert too_large.lower_bound > too_large.divergence


def test_the_effective_sample_size_is_that_of_the_weights():
    # weights 3/4, 1/4 and 1, 0: 1 / (9/16 + 1/16) = 1.6 and 1
    log_weights = torch.tensor([[3.0, 1.0], [1.0, 0.0]], dtype=DTYPE).log()
    linear = Linear(1, 1)
    z = torch.zeros(2, 2, 1, dtype=DTYPE)
    linear.model.importance_sample = lambda *_: SimpleNamespace(z=z, f=z, log_weights=log_weights)
    assert metrics.relative_fisher(linear.model, linear.x[:2], 2).effective_sample_size == pytest.approx(1.3)


def test_inverse_lipschitz_of_a_linear_decoder():
    linear = Linear(3, 5)
    z = torch.randn(20, 3, dtype=DTYPE)
    result = metrics.inverse_lipschitz(linear.model.decoder, z)
    smallest = torch.linalg.svdvals(linear.w).min().item()
    assert result.measured == pytest.approx(smallest, rel=1e-12)
    assert result.certified == pytest.approx(smallest, rel=1e-12)
    # fewer data than latents: a direction is lost
    assert metrics.inverse_lipschitz(nn.Linear(3, 2).double(), z).measured == 0


# brute force on a grid

# The samples of a random encoder reach the posteriors of such a model.
GENTLE = {"activation": "softplus"}


@pytest.mark.parametrize(
    ("likelihood", "options"), [("gaussian", {"scale": 0.7}), ("bernoulli", {})], ids=["gaussian", "bernoulli"]
)
@pytest.mark.parametrize("data_dim", [1, 2])
def test_measures_of_one_latent_against_a_grid(likelihood, options, data_dim):
    config = VAEConfig(
        data_dim, 1, inverse_lipschitz=(0.5, 1.5), encoder_hidden=(5,), decoder_hidden=((8,), (8, 8)),
        likelihood=likelihood, likelihood_options=options, decoder_options=GENTLE,
    )  # fmt: skip
    model = VAE(config).double()
    x = torch.rand(6, data_dim, dtype=DTYPE).round()

    z = torch.linspace(-9, 9, 6001, dtype=DTYPE).reshape(-1, 1, 1).expand(-1, len(x), 1).clone().requires_grad_()
    conditional = model.likelihood.log_prob(x, model.decoder(z))
    (gradient,) = torch.autograd.grad(conditional.sum(), z)
    joint = (conditional + Normal(0.0, 1.0).log_prob(z).sum(-1)).detach()
    log_likelihood = joint.logsumexp(0) + math.log(18 / 6000)
    posterior = joint.softmax(0)
    divergence = (posterior * gradient.square().sum(-1)).sum(0).mean().item()

    nll = metrics.negative_log_likelihood(model, x, 20000, generator=seeded())
    assert nll == pytest.approx(-log_likelihood.mean().item(), abs=0.01)
    fisher = metrics.relative_fisher(model, x, 20000, generator=seeded())
    assert fisher.effective_sample_size > 1000
    assert fisher.divergence == pytest.approx(divergence, rel=0.03)
    assert 0 < fisher.lower_bound <= fisher.divergence

    measured = metrics.inverse_lipschitz(model.decoder, z.detach()[:, 0]).measured
    f = model.decoder(z.detach()[:, 0])
    steepness = (f[1:] - f[:-1]).norm(dim=-1).min().item() / (18 / 6000)
    assert measured == pytest.approx(steepness, rel=1e-4)


@given(
    constants=st.tuples(*[st.floats(0.0, 3)] * 2), seed=st.integers(0, 1000),
    embedding=st.sampled_from(["orthogonal", "identity", "full_rank"]), sizes=st.sampled_from([(1, 1), (2, 5), (3, 3)]),
)  # fmt: skip
def test_the_bounds_are_ordered(constants, seed, embedding, sizes):
    torch.manual_seed(seed)
    config = VAEConfig(
        sizes[1], sizes[0], inverse_lipschitz=constants, encoder_hidden=(5,), decoder_hidden=((8,), (8, 8)),
        likelihood="bernoulli", embedding=embedding,
    )  # fmt: skip
    model, x = VAE(config).double(), torch.rand(4, sizes[1], dtype=DTYPE).round()
    fisher = metrics.relative_fisher(model, x, 16)
    slack = 1 + 1e-9
    assert fisher.lower_bound <= fisher.local_bound * slack
    assert fisher.local_bound <= fisher.divergence * slack
    assert fisher.lower_bound <= fisher.cotangent_bound * slack
    assert fisher.cotangent_bound <= fisher.divergence * slack


def test_the_local_bound_of_a_linear_model_and_of_one_without_a_constant():
    linear = Linear(2, 5)
    fisher = metrics.relative_fisher(linear.model, linear.x, 64)
    assert fisher.local_bound == pytest.approx(fisher.lower_bound, rel=1e-12)  # the same steepness everywhere
    assert math.isnan(fisher.cotangent_bound)
    plain = metrics.relative_fisher(small_model("vae").double(), batch(6).double(), 4)
    assert 0 < plain.local_bound < plain.divergence
    assert math.isnan(plain.lower_bound)
    assert math.isnan(plain.cotangent_bound)


# mixtures and sequences


@pytest.mark.parametrize(("latent_dim", "points", "reach"), [(1, 8001, 12.0), (2, 301, 9.0)])
def test_measures_of_a_mixture_against_a_grid(latent_dim, points, reach):
    options = {"encoder_hidden": (5,), "decoder_hidden": ((8,), (8, 8)), "prior_options": {"num_components": 3}}
    options["decoder_options"] = GENTLE
    model = VAE(VAEConfig.named("il-lidmvae", data_dim=2, latent_dim=latent_dim, **options)).double()
    x = torch.randn(4, 2, dtype=DTYPE)
    side = torch.linspace(-reach, reach, points, dtype=DTYPE)
    z = torch.cartesian_prod(*[side] * latent_dim).reshape(-1, 1, latent_dim)
    z = z.expand(-1, 4, latent_dim).clone().requires_grad_()
    conditional = model.likelihood.log_prob(x, model.decoder(z))
    (gradient,) = torch.autograd.grad(conditional.sum(), z)
    joint = (conditional + model.prior.log_prob(z)).detach()
    volume = (2 * reach / (points - 1)) ** latent_dim
    nll = -(joint.logsumexp(0) + math.log(volume)).mean().item()
    assert metrics.negative_log_likelihood(model, x, 20000, generator=seeded()) == pytest.approx(nll, abs=0.01)
    divergence = (joint.softmax(0) * gradient.square().sum(-1)).sum(0).mean().item()
    fisher = metrics.relative_fisher(model, x, 20000, generator=seeded())
    assert fisher.divergence == pytest.approx(divergence, rel=0.05)
    assert 0 < fisher.lower_bound <= fisher.divergence
    kl, posterior = metrics.kl_divergence(model, x), model.inference(x)
    assert kl.total == pytest.approx(model(x).kl.mean().item())
    assert kl.assignment == pytest.approx(model.prior.assignment_kl(posterior).mean().item())


@pytest.mark.parametrize("name", ["vae", "il-lidvae"])
def test_a_model_in_bfloat16_is_measured(name):
    model, x = small_model(name), batch(6)
    z = torch.zeros(4, model.config.latent_dim, dtype=torch.float64)
    exact = metrics.inverse_lipschitz(model.decoder, z).measured
    model, x = model.bfloat16(), x.bfloat16()
    assert metrics.relative_fisher(model, x, 4, generator=seeded()).divergence > 0
    assert metrics.inverse_lipschitz(model.decoder, z.bfloat16()).measured == pytest.approx(exact, rel=0.1)


@given(constants=st.tuples(*[st.floats(0.01, 3)] * 2), seed=st.integers(0, 1000))
def test_the_bound_holds_for_sequences(constants, seed):
    torch.manual_seed(seed)
    sizes = {"encoder_hidden": (4,), "autoregressive_hidden": 3, "decoder_hidden": ((5,), (6,)), "token_embedding": 3}
    options = {**sizes, "likelihood_options": {"num_categories": 7}, "inverse_lipschitz": constants}
    model = VAE(VAEConfig.named("il-lidsvae", data_dim=4, latent_dim=2, **options)).double()
    x = torch.randint(7, (3, 4))
    x[0, 2:] = -1
    fisher = metrics.relative_fisher(model, x, 8)
    assert 0 < fisher.lower_bound <= fisher.divergence * (1 + 1e-9)
    # the divergence is that of autograd's gradient
    samples = model.importance_sample(x, 8, seeded(seed))
    z = samples.z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.likelihood.log_prob(x, model.generative(z, x)).sum(), z)
    expected = (samples.log_weights.softmax(0) * gradient.square().sum(-1)).sum(0).mean().item()
    again = metrics.relative_fisher(model, x, 8, generator=seeded(seed))
    assert again.divergence == pytest.approx(expected, rel=1e-9)
    constant = metrics.inverse_lipschitz(model.decoder.given(x[1]), torch.randn(20, 2, dtype=DTYPE))
    assert constant.measured >= 2 * constant.certified * (1 - 1e-9)  # by the root of four tokens


# several processes


class Processes:
    """Runs a measure on each part of the data, with the sum over all that ``reduce`` would see."""

    def __init__(self, parts):
        self.parts = parts

    def __call__(self, measure):
        sums: list[torch.Tensor] = []
        while True:  # once for every reduction: its sum is known from the round before
            rounds = []
            for part in self.parts:
                calls: list[torch.Tensor] = []

                def reduce(tensor, calls=calls):
                    calls.append(tensor)
                    return sums[len(calls) - 1] if len(calls) <= len(sums) else tensor

                result = measure(part, reduce)
                rounds.append(calls)
            if len(rounds[0]) == len(sums):
                return result
            sums.append(sum(calls[len(sums)] for calls in rounds))


def test_measures_reduced_over_processes_are_those_of_all_data():
    linear = Linear(2, 5, orthogonal=True)
    model, spread = linear.model, Processes([linear.x[:11], linear.x[11:15], linear.x[15:]])
    nll = spread(lambda x, reduce: metrics.negative_log_likelihood(model, x, 1, reduce=reduce))
    assert nll == pytest.approx(linear.nll(), rel=1e-12)
    kl = spread(lambda x, reduce: metrics.kl_divergence(model, x, reduce=reduce))
    assert kl.total == pytest.approx(linear.kl(), rel=1e-12)
    variances = spread(lambda x, reduce: metrics.active_units(model, x, reduce=reduce)).variances
    torch.testing.assert_close(variances, linear.mean.var(0, correction=0))
    directions = spread(lambda x, reduce: metrics.active_directions(model, x, reduce=reduce)).variances
    torch.testing.assert_close(directions, linear.direction_variances())
    many = {"num_samples": 500, "generator": seeded()}
    elbo = spread(lambda x, reduce: metrics.elbo(model, x, **many, reduce=reduce))
    gain = spread(lambda x, reduce: metrics.gain(model, x, linear.x, **many, reduce=reduce))
    without = spread(lambda x, reduce: metrics.nll_without_latent(model, x, linear.x, reduce=reduce))
    assert elbo == pytest.approx(linear.elbo(), abs=0.04)
    assert gain == pytest.approx(linear.gain(), abs=0.04)
    assert without == pytest.approx(linear.gain() - linear.elbo())
    collapse = spread(lambda x, reduce: metrics.epsilon_collapse(model, x, reduce=reduce))
    assert torch.equal(collapse.probability, metrics.epsilon_collapse(model, linear.x).probability)
    fisher = spread(lambda x, reduce: metrics.relative_fisher(model, x, 4000, reduce=reduce))
    assert fisher.divergence == pytest.approx(linear.residual(linear.w.T), rel=0.03)
    assert fisher.effective_sample_size == pytest.approx(4000, rel=1e-9)


# inequalities


@given(
    latent_dim=st.integers(1, 4),
    surplus=st.integers(0, 4),
    constants=st.tuples(*[st.floats(0.01, 3)] * 2),
    embedding=st.sampled_from(["identity", "orthogonal", "full_rank"]),
    likelihood=st.sampled_from(["gaussian", "bernoulli"]),
    activation=st.sampled_from(["softplus", "celu", "leaky_relu"]),
    seed=st.integers(0, 2**31 - 1),
)
def test_the_bounds_hold_for_any_brenier_decoder(
    latent_dim, surplus, constants, embedding, likelihood, activation, seed
):
    torch.manual_seed(seed)
    config = VAEConfig(
        latent_dim + surplus, latent_dim, inverse_lipschitz=constants, embedding=embedding, likelihood=likelihood,
        encoder_hidden=(6,), decoder_hidden=((6,), (8, 5)), decoder_options={"activation": activation},
    )  # fmt: skip
    model = VAE(config).double()
    if embedding == "full_rank":
        with torch.no_grad():
            model.decoder.raw_embedding.normal_()
    x = torch.rand(5, config.data_dim, dtype=DTYPE)
    fisher = metrics.relative_fisher(model, x, 16)
    assert fisher.lower_bound <= fisher.divergence * (1 + 1e-9)
    constant = metrics.inverse_lipschitz(model.decoder, 3 * torch.randn(40, latent_dim, dtype=DTYPE))
    assert constant.measured >= constant.certified * (1 - 1e-9)
    assert fisher.lower_bound == pytest.approx(constant.certified**2 * fisher.projected_residual, rel=1e-12)


# a decoder without Jacobian or certificate


def test_an_mlp_is_differentiated_and_certifies_nothing():
    model = VAE(VAEConfig(5, 3, decoder="mlp", decoder_hidden=(7,))).double()
    z = torch.randn(2, 4, 3, dtype=DTYPE)
    jacobian = metrics.decoder_jacobian(model.decoder, z)
    assert jacobian.shape == (2, 4, 5, 3)
    for i in range(2):
        for j in range(4):
            expected = torch.autograd.functional.jacobian(model.decoder, z[i, j])
            torch.testing.assert_close(jacobian[i, j], expected)
    constant = metrics.inverse_lipschitz(model.decoder, z.flatten(0, 1), batch_size=3)
    assert math.isnan(constant.certified)
    assert constant.measured == pytest.approx(torch.linalg.svdvals(jacobian).min().item(), rel=1e-10)
    fisher = metrics.relative_fisher(model, torch.rand(4, 5, dtype=DTYPE), 8)
    assert math.isnan(fisher.lower_bound)
    assert fisher.divergence > 0


def test_a_brenier_jacobian_is_the_one_of_forward_mode():
    model = VAE(VAEConfig(5, 3, decoder_hidden=((6,), (7, 4)))).double()
    z = torch.randn(4, 3, dtype=DTYPE)
    expected = torch.stack([torch.autograd.functional.jacobian(model.decoder, point) for point in z])
    torch.testing.assert_close(metrics.decoder_jacobian(model.decoder, z), expected)
    images = torch.nn.Sequential(model.decoder, torch.nn.Unflatten(-1, (5, 1)))
    torch.testing.assert_close(metrics.decoder_jacobian(images, z), expected)


# streaming


def test_measures_do_not_depend_on_how_the_data_are_cut():
    linear = Linear(3, 5, orthogonal=True)  # exact q(z|x): one sample's likelihood is free of noise
    # batches with labels, as a DataLoader yields them, of uneven sizes, one of them empty
    batches = [(part, "labels") for part in (linear.x[:7], linear.x[7:7], linear.x[7:30], linear.x[30:])]
    for data, batch_size in ((batches, 1), (linear.x, 9), (linear.x, 1000)):
        nll = metrics.negative_log_likelihood(linear.model, data, 1, batch_size=batch_size)
        assert nll == pytest.approx(linear.nll(), rel=1e-12)
        kl = metrics.kl_divergence(linear.model, data, batch_size=batch_size)
        q = Normal(linear.mean, linear.covariance.diagonal().sqrt().expand_as(linear.mean))
        assert kl.total == pytest.approx(kl_divergence(q, Normal(0.0 * q.mean, 1.0)).sum(-1).mean().item(), rel=1e-12)
        variances = metrics.active_units(linear.model, data, batch_size=batch_size).variances
        torch.testing.assert_close(variances, linear.mean.var(0, correction=0))
        fisher = metrics.relative_fisher(linear.model, data, 2000, generator=seeded(), batch_size=batch_size)
        assert fisher.divergence == pytest.approx(linear.residual(linear.w.T), rel=0.03)
    once = metrics.kl_divergence(linear.model, (part for part, _ in batches))
    assert once.total == pytest.approx(kl.total, rel=1e-12)


@pytest.mark.parametrize("data", [torch.zeros(0, 5, dtype=DTYPE), []], ids=["tensor", "iterable"])
@pytest.mark.parametrize(
    "measure",
    [
        metrics.negative_log_likelihood, metrics.elbo, metrics.kl_divergence, metrics.active_units,
        metrics.active_directions, metrics.relative_fisher,
    ],
    ids=lambda measure: measure.__name__,
)  # fmt: skip
def test_empty_data_are_refused(measure, data):
    with pytest.raises(ValueError, match="data: got no datum"):
        measure(Linear(3, 5).model, data)


def test_a_single_datum_that_is_no_batch_is_refused():
    """It would count as D of them."""
    for measure in (metrics.mutual_information, metrics.active_units, metrics.kl_divergence, metrics.elbo):
        with pytest.raises(ValueError, match=r"data: got shape \(7,\), wanted \(n, D\); unsqueeze\(0\) makes"):
            measure(small_model(), batch())
        with pytest.raises(TypeError, match=r"data: got batches of str, wanted tensors \(n, D\)"):
            measure(small_model(), "data")


def test_bad_numbers_are_refused_by_name():
    linear = Linear(1, 2)
    with pytest.raises(ValueError, match="num_samples: got 0"):
        metrics.relative_fisher(linear.model, linear.x, 0)
    with pytest.raises(ValueError, match="num_importance_samples: got 0"):
        metrics.negative_log_likelihood(linear.model, linear.x, 0)
    with pytest.raises(TypeError, match="batch_size: got float"):
        metrics.kl_divergence(linear.model, linear.x, batch_size=2.0)
