"""The metrics against closed forms of a linear Gaussian model, brute force on a grid, and their inequalities."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from ilvae_fast import metrics
from ilvae_fast.vae import VAE, DiagonalGaussian, VAEConfig

DTYPE = torch.float64
SIGMA = 0.8


class LinearDecoder(nn.Module):
    """``f(z) = W z + b``, with what the metrics ask of a decoder."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, z: Tensor) -> Tensor:
        return z @ self.weight.T + self.bias

    def jacobian(self, z: Tensor) -> Tensor:
        return self.weight.expand(*z.shape[:-1], *self.weight.shape)

    def inverse_lipschitz_bound(self) -> Tensor:
        return torch.linalg.svdvals(self.weight.detach()).min()


class LinearEncoder(nn.Module):
    """``q(z|x) = N(A (x - b), diag exp(log_variance))``."""

    def __init__(self, weight: Tensor, shift: Tensor, log_variance: Tensor) -> None:
        super().__init__()
        self.weight, self.shift, self.log_variance = weight, shift, log_variance

    def forward(self, x: Tensor) -> DiagonalGaussian:
        mean = (x - self.shift) @ self.weight.T
        return DiagonalGaussian(mean, self.log_variance.expand_as(mean))


class Linear:
    """A linear Gaussian VAE and all that is known of it.

    Its posterior is N(mu, S) with S = (I + W^T W / sigma^2)^-1 and mu = S W^T (x - b) / sigma^2. With ``orthogonal``
    columns S is diagonal and q(z|x) is the posterior exactly; else q(z|x) has its mean and variances alone.
    """

    def __init__(self, latent_dim: int, data_dim: int, orthogonal: bool = False) -> None:
        generator = torch.Generator().manual_seed(3)
        self.w = torch.randn(data_dim, latent_dim, dtype=DTYPE, generator=generator)
        if orthogonal:
            self.w = torch.linalg.qr(self.w).Q * torch.linspace(0.6, 1.5, latent_dim, dtype=DTYPE)
        self.b = torch.randn(data_dim, dtype=DTYPE, generator=generator)
        self.x = torch.randn(40, data_dim, dtype=DTYPE, generator=generator) + self.b
        eye = torch.eye(latent_dim, dtype=DTYPE)
        self.covariance = torch.linalg.inv(eye + self.w.T @ self.w / SIGMA**2)
        gain = self.covariance @ self.w.T / SIGMA**2
        self.mean = (self.x - self.b) @ gain.T

        config = VAEConfig(data_dim, latent_dim, decoder="mlp", likelihood_options={"scale": SIGMA})
        self.model = VAE(config)
        self.model.decoder = LinearDecoder(self.w, self.b)
        self.model.encoder = LinearEncoder(gain, self.b, self.covariance.diagonal().log())

    def nll(self) -> float:
        covariance = self.w @ self.w.T + SIGMA**2 * torch.eye(len(self.b), dtype=DTYPE)
        return -MultivariateNormal(self.b, covariance).log_prob(self.x).mean().item()

    def residual(self, projection: Tensor) -> float:
        """``E |P (x - f(z))|^2 / sigma^4`` under the true posterior."""
        at_mean = (self.x - self.b - self.mean @ self.w.T) @ projection.T
        spread = projection @ self.w @ self.covariance @ self.w.T @ projection.T
        return (at_mean.square().sum(-1).mean() + spread.trace()).item() / SIGMA**4


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


def test_variances_are_those_of_far_away_means_too():
    model = SimpleNamespace(inference=lambda x: DiagonalGaussian(x, torch.zeros_like(x)))
    x = torch.randn(1000, 2, generator=seeded()).double() + 1e8
    variances = metrics.active_units(model, x, batch_size=7).variances
    torch.testing.assert_close(variances, x.var(0, correction=0), rtol=1e-6, atol=0)


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


@pytest.mark.parametrize(
    ("likelihood", "options"), [("gaussian", {"scale": 0.7}), ("bernoulli", {})], ids=["gaussian", "bernoulli"]
)
@pytest.mark.parametrize("data_dim", [1, 2])
def test_measures_of_one_latent_against_a_grid(likelihood, options, data_dim):
    config = VAEConfig(
        data_dim, 1, inverse_lipschitz=(0.5, 1.5), encoder_hidden=(5,), decoder_hidden=((8,), (8, 8)),
        likelihood=likelihood, likelihood_options=options,
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
    [metrics.negative_log_likelihood, metrics.kl_divergence, metrics.active_units, metrics.relative_fisher],
    ids=lambda measure: measure.__name__,
)
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
