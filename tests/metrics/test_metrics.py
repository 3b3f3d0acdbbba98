"""The metrics against closed forms of a linear Gaussian model, brute force on a grid, and their inequalities."""

from __future__ import annotations

import itertools
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
from ilvae_fast.vae import VAE, DiagonalGaussian, GaussianMixturePosterior, VAEConfig
from vae_cases import batch, data_for, small_model, tokens, values_of


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


def test_the_gain_is_against_training_data_or_what_is_given():
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
    """Else a model would gain by its sigma alone."""
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
    x = torch.randn(50, 1, dtype=DTYPE, generator=generator) * torch.eye(latent_dim, dtype=DTYPE)[0]  # one moves
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


def test_variances_are_those_of_far_away_means_too():
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
    # without it, or with a constant 1 % too large, an inequality would be claimed that does not hold
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

# whose posteriors a random encoder's samples reach
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


# mutual information, collapse and clusters


def posterior_of(posterior):
    """A model whose q(z|x) are those given, one for each datum."""
    return SimpleNamespace(inference=lambda x: type(posterior)(*(t[x[:, 0].long()] for t in posterior)))


def random_posterior(kind: str, count: int, latent_dim: int):
    if kind == "gaussian":
        return DiagonalGaussian(
            2 * torch.randn(count, latent_dim, dtype=DTYPE), torch.randn(count, latent_dim, dtype=DTYPE)
        )
    means = 2 * torch.randn(count, 3, latent_dim, dtype=DTYPE)
    return GaussianMixturePosterior(torch.randn(count, 3, dtype=DTYPE), means, torch.randn_like(means).clamp(-1, 1))


@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
@pytest.mark.parametrize("latent_dim", [1, 2])
def test_mutual_information_against_a_grid(latent_dim, kind, monkeypatch):
    posterior = random_posterior(kind, 5, latent_dim)
    side = torch.linspace(-12, 12, 601 if latent_dim == 2 else 4001, dtype=DTYPE)
    z = torch.cartesian_prod(*[side] * latent_dim).reshape(-1, latent_dim)
    log_q = posterior.log_prob(z.unsqueeze(1))  # (points, data)
    aggregate = log_q.logsumexp(1, keepdim=True) - math.log(5)
    volume = (side[1] - side[0]).item() ** latent_dim
    expected = (log_q.exp() * (log_q - aggregate)).sum().item() * volume / 5
    assert log_q.exp().sum(0).mul(volume).tolist() == pytest.approx([1.0] * 5, rel=1e-6)

    x = torch.arange(5.0, dtype=DTYPE).unsqueeze(-1)
    estimate = metrics.mutual_information(posterior_of(posterior), x, 8000, generator=seeded())
    assert estimate == pytest.approx(expected, rel=0.02)
    monkeypatch.setattr("ilvae_fast.metrics.collapse._PAIRS", 7)
    assert metrics.mutual_information(posterior_of(posterior), x, 800, batch_size=2) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
def test_mutual_information_holds_no_more_densities_than_it_may(kind, monkeypatch):
    posterior, held = random_posterior(kind, 6, 4), []

    class Watched(type(posterior)):
        def log_prob(self, z):
            if z.dim() == 3:  # z of some data under the posteriors of all
                held.append(len(z) * self[1].numel())
            return super().log_prob(z)

    monkeypatch.setattr("ilvae_fast.metrics.collapse._PAIRS", 2 * posterior[1].numel())
    x = torch.arange(6.0, dtype=DTYPE).unsqueeze(-1)
    metrics.mutual_information(posterior_of(Watched(*posterior)), x)
    assert held == [2 * posterior[1].numel()] * 3


def test_mutual_information_of_a_linear_model_and_its_extremes():
    linear = Linear(2, 5, num_data=1500)
    estimate = metrics.mutual_information(linear.model, linear.x, 2, generator=seeded())
    assert estimate == pytest.approx(linear.mutual_information(), rel=0.05)
    x = torch.arange(7.0, dtype=DTYPE).unsqueeze(-1)
    collapsed = DiagonalGaussian(torch.zeros(7, 2, dtype=DTYPE), torch.zeros(7, 2, dtype=DTYPE))
    assert metrics.mutual_information(posterior_of(collapsed), x, 3) == pytest.approx(0, abs=1e-12)
    apart = DiagonalGaussian(100 * x.expand(7, 2), torch.zeros(7, 2, dtype=DTYPE))
    assert metrics.mutual_information(posterior_of(apart), x, 3) == pytest.approx(math.log(7), rel=1e-9)


@pytest.mark.parametrize(
    ("kl", "information", "limit", "low"),
    [(5.0, 0.4, 6.9, True), (5.0, 0.6, 6.9, False), (0.4, 0.0, 6.9, False), (90.0, 6.5, 6.9, False),
     (90.0, 6.0, 6.9, True), (5.0, None, 6.9, False), (math.nan, 0.0, 6.9, False), (5.0, 0.1, None, True)],
)  # fmt: skip
def test_a_warning_where_kl_is_not_information(kl, information, limit, low):
    measures = {"elbo_kl": kl, "mutual_information": information, "gain": 1.0, "mutual_information_limit": limit}
    found = metrics.diagnose(measures)
    assert len(found) == low
    assert all("are information about the data (MI)" in warning for warning in found)
    assert all(cure in warning for warning in found for cure in ("fewer latents", "sigma"))


def test_a_warning_where_the_latent_gains_nothing_names_the_cure():
    informed = {"elbo_kl": 5.0, "mutual_information": 4.0, "mutual_information_limit": 7.0}
    collapsed = {"elbo_kl": 0.01, "mutual_information": 0.0, "mutual_information_limit": 7.0}
    assert not metrics.diagnose({**informed, "gain": 0.1, "certified": 0.5})
    assert not metrics.diagnose({**collapsed, "gain": 0.1})  # little, but it is worth it
    assert not metrics.diagnose({**informed, "gain": None})  # of sequences
    assert not metrics.diagnose({"nll": 1.0})  # of an earlier version
    (warning,) = metrics.diagnose({**informed, "gain": -2.0, "certified": 0.5})
    assert "gain -2, KL 5 nats" in warning
    assert "Try a smaller L than 0.5 (`ilvae-fast advise`" in warning
    (warning,) = metrics.diagnose({**informed, "gain": 0.0, "certified": None})
    assert "smaller L" not in warning  # there is none
    assert "Try fewer latents, a larger sigma" in warning
    (warning,) = metrics.diagnose({**collapsed, "gain": -0.01, "certified": 0.5})
    assert "posterior collapse" in warning
    assert "Try a larger L than 0.5" in warning
    (warning,) = metrics.diagnose({**collapsed, "gain": -90.0, "certified": 0.5})  # it moves the data for nothing
    assert "Try a smaller L than 0.5" in warning
    (warning,) = metrics.diagnose({**collapsed, "gain": -0.01, "certified": 0.0})
    assert "Try a decoder with L > 0, such as il-lidvae" in warning
    assert len(metrics.diagnose({**informed, "mutual_information": 0.1, "gain": -1.0})) == 2


def test_a_steep_decoder_of_data_without_structure_is_found_out():
    """What active units and KL take for the best model: it encodes where the latent is, and nothing that pays."""
    x = 0.2 * torch.randn(500, 4, dtype=DTYPE, generator=seeded())
    linear = Linear(2, 4, orthogonal=True)
    model = linear.model
    steep = 5.0 * torch.eye(4, 2, dtype=DTYPE)
    model.decoder = type(model.decoder)(steep, torch.zeros(4, dtype=DTYPE))
    covariance = torch.linalg.inv(torch.eye(2, dtype=DTYPE) + steep.T @ steep / 0.8**2)
    projection = covariance @ steep.T / 0.8**2
    model.encoder = type(model.encoder)(projection, torch.zeros(4, dtype=DTYPE), covariance.diagonal().log())
    kl = metrics.kl_divergence(model, x).total
    information = metrics.mutual_information(model, x, 10, generator=seeded())
    gain = metrics.gain(model, x, x, 10, generator=seeded())
    assert kl > 2
    assert information < kl / 10
    assert gain < 0
    measures = {"elbo_kl": kl, "mutual_information": information, "gain": gain, "certified": 5.0}
    assert len(metrics.diagnose({**measures, "mutual_information_limit": math.log(500)})) == 2


def test_epsilon_collapse_counts_data_under_epsilon():
    mean = torch.zeros(200, 3, dtype=DTYPE)
    mean[:3, 0] = 5.0  # 1.5 % of the data use the first coordinate
    mean[:, 1] = 0.1  # all use the second a little: a KL of 0.005
    model = posterior_of(DiagonalGaussian(mean, torch.zeros_like(mean)))
    model.prior = VAE(VAEConfig(3, 3)).prior
    x = torch.arange(200.0).unsqueeze(-1)
    result = metrics.epsilon_collapse(model, x, (0.001, 0.01), 0.01, batch_size=7)
    assert result.epsilons == (0.001, 0.01)
    expected = torch.tensor([[197 / 200, 0, 1], [197 / 200, 1, 1]], dtype=DTYPE)
    torch.testing.assert_close(result.probability, expected)
    assert result.collapsed.tolist() == pytest.approx([1 / 3, 2 / 3])
    assert metrics.epsilon_collapse(model, x, (0.01,), 0.02).collapsed.item() == 1
    with pytest.raises(ValueError, match=r"delta: got 1\.0"):
        metrics.epsilon_collapse(model, x, (0.01,), 1.0)
    with pytest.raises(ValueError, match="epsilons: got none"):
        metrics.epsilon_collapse(model, x, ())


@given(clusters=st.integers(1, 5), classes=st.integers(1, 5), count=st.integers(1, 30), seed=st.integers(0, 1000))
def test_clustering_accuracy_is_the_best_assignment(clusters, classes, count, seed):
    generator = seeded(seed)
    found = torch.randint(clusters, (count,), generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    names = range(max(clusters, classes))
    best = max(
        sum(name[c] == label for c, label in zip(found.tolist(), labels.tolist(), strict=True))
        for name in itertools.permutations(names)
    )
    assert metrics.clustering_accuracy(found, labels) == pytest.approx(best / count)


def test_bad_clusters_are_refused():
    with pytest.raises(ValueError, match=r"labels: got shape \(3,\)"):
        metrics.clustering_accuracy(torch.zeros(2).long(), torch.zeros(3).long())
    with pytest.raises(ValueError, match="labels: got no datum"):
        metrics.clustering_accuracy(torch.zeros(0).long(), torch.zeros(0).long())
    with pytest.raises(ValueError, match="clusters: got -1"):
        metrics.clustering_accuracy(torch.tensor([-1]), torch.tensor([0]))


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
        while True:  # once more for every reduction, whose sums are known from the time before
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


def test_measures_of_spread_data_are_those_of_all():
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
    # with labels as of a DataLoader, of uneven sizes, one of them empty
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
def test_no_data_are_refused(measure, data):
    with pytest.raises(ValueError, match="data: got no datum"):
        measure(Linear(3, 5).model, data)


def test_bad_numbers_are_refused_by_name():
    linear = Linear(1, 2)
    with pytest.raises(ValueError, match="num_samples: got 0"):
        metrics.relative_fisher(linear.model, linear.x, 0)
    with pytest.raises(ValueError, match="num_importance_samples: got 0"):
        metrics.negative_log_likelihood(linear.model, linear.x, 0)
    with pytest.raises(TypeError, match="batch_size: got float"):
        metrics.kl_divergence(linear.model, linear.x, batch_size=2.0)
