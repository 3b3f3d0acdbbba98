"""Likelihoods, priors and posteriors, against torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions

from ilvae_fast.vae import (
    LIKELIHOODS,
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiagonalGaussian,
    Gaussian,
    GaussianMixture,
    GaussianMixturePosterior,
    NegativeBinomial,
    Poisson,
    StandardNormal,
)
from vae_cases import OPTIONS, TOKENS, batch, counts, small_model, tokens, values_of


def of_name(name, **options):
    return LIKELIHOODS[name](**{**OPTIONS.get(name, {}), **options}).double()


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
    # which maximises the likelihood
    likelihood.log_scale.copy_(0.5 * expected.log()).requires_grad_()
    log_prob = likelihood.log_prob(x, f) if weights is None else (weights * likelihood.log_prob(x, f)).sum(0)
    (slope,) = torch.autograd.grad(log_prob.mean(), likelihood.log_scale)
    assert abs(slope.item()) < 1e-10


@pytest.mark.parametrize("bad", [torch.empty(0, 5), torch.full((3, 5), torch.nan)], ids=["empty", "nan"])
def test_an_optimal_variance_survives_a_batch_without_errors_to_average(bad):
    likelihood = Gaussian(scale=5.0, variance="optimal")
    likelihood.adapt(bad, torch.zeros_like(bad), None)
    assert likelihood.scale.item() == pytest.approx(5.0)
    likelihood.adapt(torch.full((3, 5), 2.0), torch.zeros(3, 5), None)  # still the first to count
    assert likelihood.scale.item() == pytest.approx(2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_optimal_variance_of_no_error_stays_above_zero(dtype):
    likelihood, x = Gaussian(scale=5.0, variance="optimal").to(dtype), batch(4).to(dtype)
    for _ in range(2):
        likelihood.adapt(x, x, None)
        assert float(likelihood.scale) == pytest.approx(5e-6, rel=1e-5)
        assert likelihood.log_prob(x, x).isfinite().all()
    likelihood.adapt(x, x + 0.1, None)  # and moves on
    assert float(likelihood.scale) == pytest.approx(math.sqrt(0.05) * 0.1, rel=1e-4)


def test_only_trained_and_optimal_variances_change():
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
    likelihood, x = LIKELIHOODS[name](**OPTIONS.get(name, {})), values_of(name, 4)
    f = (4 * torch.rand(5, 4, 7 * likelihood.parameters_per_value, dtype=torch.float64) - 2).requires_grad_()
    (gradient,) = torch.autograd.grad(likelihood.log_prob(x, f).sum(), f)
    torch.testing.assert_close(likelihood.score(x, f), gradient)


@pytest.mark.parametrize("dispersion", [0.3, 1.0, 1e6], ids="r={}".format)
def test_count_likelihoods(dispersion):
    x, f = counts(4), 4 * batch(5, 4) - 2
    r = torch.tensor(dispersion, dtype=torch.float64)
    pairs = [
        (Poisson(), distributions.Poisson(f.exp())),
        (NegativeBinomial(dispersion).double(), distributions.NegativeBinomial(r, logits=f - r.log())),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.log_prob(x, f), theirs.log_prob(x).sum(-1))
        torch.testing.assert_close(ours.log_prob(x.int(), f), theirs.log_prob(x).sum(-1))
        torch.testing.assert_close(ours.mean(f), theirs.mean)
        at = f[0, 0, :2]
        samples = ours.sample(at.expand(40000, 2), torch.Generator().manual_seed(0))
        assert torch.equal(samples, samples.round())
        assert torch.equal(samples, ours.sample(at.expand(40000, 2), torch.Generator().manual_seed(0)))
        torch.testing.assert_close(samples.mean(0), theirs.mean[0, 0, :2], rtol=0.05, atol=0)
        torch.testing.assert_close(samples.var(0), theirs.variance[0, 0, :2], rtol=0.15, atol=0)


def test_a_negative_binomial_of_large_r_is_poissons_in_float32_too():
    x, f = counts(4).float(), batch(5, 4).float()
    poisson = Poisson().log_prob(x, f)
    torch.testing.assert_close(NegativeBinomial(1e7).log_prob(x, f), poisson, rtol=0, atol=1e-3)
    assert (NegativeBinomial(1.0).log_prob(x, f) - poisson).abs().min() > 0.1


def test_dispersions_may_be_trained_one_for_each_coordinate():
    x, f = counts(4), batch(4)
    for trained, width in ((True, 7), (True, 1), (False, 7)):
        likelihood = NegativeBinomial(2.0, trained, width).double()
        assert likelihood.log_dispersion.shape == (width,)
        assert len(list(likelihood.parameters())) == trained
    likelihood = NegativeBinomial(2.0, data_dim=7).double()
    likelihood.log_prob(x, f).sum().backward()
    r = likelihood.dispersion.detach().requires_grad_()
    distributions.NegativeBinomial(r, logits=f - r.log()).log_prob(x).sum().backward()
    torch.testing.assert_close(likelihood.log_dispersion.grad, r.grad * r.detach())  # d r = r d log r


@pytest.mark.parametrize("kind", [Poisson, NegativeBinomial])
def test_counts_are_whole_numbers(kind):
    kind().check(counts(4).float())
    kind().check(counts(4).int())
    with pytest.raises(ValueError, match=r"x: got values such as 0\.25, wanted counts, whole numbers >= 0"):
        kind().check(torch.tensor([[1.0, 0.25]]))
    with pytest.raises(ValueError, match=r"x: got values from -1 to 2, wanted counts"):
        kind().check(torch.tensor([[-1.0, 2.0]]))
    with pytest.raises(ValueError, match=r"x: got values such as inf"):
        kind().check(torch.tensor([[math.inf, 2.0]]))


def test_bad_options_of_the_negative_binomial_are_named():
    with pytest.raises(ValueError, match=r"dispersion: got 0\.0"):
        NegativeBinomial(0.0)
    with pytest.raises(ValueError, match=r"data_dim: got 0"):
        NegativeBinomial(data_dim=0)
    with pytest.raises(ValueError, match=r"x: got 7 coordinates, wanted data_dim, 5"):
        NegativeBinomial(data_dim=5).check(counts(4))


# marginals, Fisher information, and likelihoods that ignore the latent


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_marginal_is_the_likeliest_output_for_all_data(name):
    likelihood, x = of_name(name), values_of(name, 400)
    f = likelihood.marginal(x)
    assert f.shape == (7 * likelihood.parameters_per_value,)
    assert f.dtype == (torch.float32 if name == "categorical" else torch.float64)
    f = f.double().requires_grad_()
    mean = likelihood.log_prob(x, f).mean()
    (slope,) = torch.autograd.grad(mean, f)
    assert slope.abs().max() < 2 / 400  # the effect of smoothing
    for _ in range(20):
        step = 0.3 * torch.randn(f.shape, dtype=torch.float64)
        assert likelihood.log_prob(x, f.detach() + step).mean() < mean.item() + 1e-3
    torch.testing.assert_close(likelihood.marginal(x.flip(0)), likelihood.marginal(x))
    for bad in (x[:0], x[0]):
        with pytest.raises(ValueError, match=r"x: got shape .*, wanted \(N, D\) with at least one datum"):
            likelihood.marginal(bad)


def test_unseen_values_keep_some_probability():
    zeros = torch.zeros(9, 1, dtype=torch.float64)
    assert Bernoulli().mean(Bernoulli().marginal(zeros)).item() == pytest.approx(0.05)
    assert ContinuousBernoulli().mean(ContinuousBernoulli().marginal(zeros)).item() == pytest.approx(0.05)
    assert ContinuousBernoulli().mean(ContinuousBernoulli().marginal(1 - zeros)).item() == pytest.approx(0.95)
    assert Poisson().mean(Poisson().marginal(zeros)).item() == pytest.approx(0.5 / 9)
    two = Categorical(2).marginal(zeros.long()).exp()
    torch.testing.assert_close(two, torch.tensor([0.95, 0.05]))  # as for Bernoulli
    few = torch.tensor([[1, -1], [1, -1], [3, -1]])
    frequencies = Categorical(4).marginal(few).exp().view(2, 4)
    torch.testing.assert_close(frequencies[0], torch.tensor([0.25, 2.25, 0.25, 1.25]) / 4)
    torch.testing.assert_close(frequencies[1], torch.full((4,), 0.25))
    for name in LIKELIHOODS:
        likelihood, x = of_name(name), torch.zeros(3, 7, dtype=torch.long if name == "categorical" else torch.float64)
        assert likelihood.log_prob(values_of(name, 5), likelihood.marginal(x)).isfinite().all()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_fisher_is_the_mean_square_of_the_score(name):
    likelihood = of_name(name)
    f = (3 * torch.randn(6, 7 * likelihood.parameters_per_value, dtype=torch.float64)).clamp(-5, 5)
    x = likelihood.sample(f.expand(20000, *f.shape), torch.Generator().manual_seed(0))
    square = likelihood.score(x, f).square().detach()
    error = square.std(0) / 20000**0.5
    difference = (likelihood.fisher(f) - square.mean(0)).abs()
    assert (difference < 5 * error + 1e-3).all()


def test_fisher_against_sums_and_derivatives():
    f = torch.cat([torch.linspace(-30, 30, 400, dtype=torch.float64), torch.tensor([0.0, 1e-6, 0.0999999, 0.1000001])])
    # the variance of x is the slope of its mean
    at = f.clone().requires_grad_()
    for likelihood in (Bernoulli(), ContinuousBernoulli()):
        (slope,) = torch.autograd.grad(likelihood.mean(at).sum(), at)
        torch.testing.assert_close(likelihood.fisher(f), slope, rtol=1e-8, atol=1e-13)
    # all x that matter
    x = torch.arange(3000, dtype=torch.float64).view(-1, 1, 1)
    few = torch.tensor([-4.0, 0.0, 1.5, 4.0], dtype=torch.float64).unsqueeze(-1)
    for likelihood in (Poisson(), NegativeBinomial(0.7).double()):
        weights = likelihood.log_prob(x, few).exp().unsqueeze(-1)
        assert weights.sum(0).flatten().tolist() == pytest.approx([1] * 4)
        expected = (weights * likelihood.score(x, few).square()).sum(0)
        torch.testing.assert_close(likelihood.fisher(few), expected)
    logits = torch.randn(5, 3, dtype=torch.float64)
    p = logits.softmax(-1)
    torch.testing.assert_close(Categorical(3).fisher(logits), p * (1 - p))
    torch.testing.assert_close(Gaussian(0.5).fisher(few), torch.full_like(few, 4.0))


@pytest.mark.parametrize("size", [20.0, 60.0, 80.0])
def test_fisher_keeps_its_relative_precision_where_likelihoods_saturate(size):
    f = torch.tensor([-size, size])  # float32
    expected = torch.full((2,), math.exp(-size) / (1 + math.exp(-size)) ** 2)
    torch.testing.assert_close(Bernoulli().fisher(f), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(Categorical(2).fisher(torch.tensor([0.0, size])), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(ContinuousBernoulli().fisher(f), torch.full((2,), size**-2), rtol=1e-5, atol=0)
    torch.testing.assert_close(NegativeBinomial(2.0).fisher(f)[1].detach(), torch.tensor(2.0), rtol=1e-5, atol=0)
    near = torch.linspace(-1, 1, 401)
    exact = ContinuousBernoulli().fisher(near.double())
    torch.testing.assert_close(ContinuousBernoulli().fisher(near), exact.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("variance", ["fixed", "trained", "optimal"])
def test_a_gaussian_that_ignores_the_latent_fits_its_scale(variance):
    likelihood, x = Gaussian(0.1, variance).double(), 3 * batch(400)
    best, f = likelihood.ignoring(x)
    torch.testing.assert_close(f, x.mean(0))
    assert float(torch.as_tensor(likelihood.scale).detach()) == pytest.approx(0.1)  # which stays as it was
    if variance == "fixed":
        assert best is likelihood
        return
    at = best.log_prob(x, f).mean().item()
    assert best.scale.item() == pytest.approx((x - f).square().mean().sqrt().item())
    for factor in (0.9, 1.1):
        assert at > Gaussian(factor * best.scale.item()).log_prob(x, f).mean().item() + 0.01
    constant = likelihood.ignoring(torch.ones(3, 2, dtype=torch.float64))
    assert constant[0].scale.item() == pytest.approx(1e-7, rel=1e-5)  # not 0


@pytest.mark.parametrize("width", [1, 7])
@pytest.mark.parametrize("few", [True, False])
def test_a_negative_binomial_that_ignores_the_latent_fits_its_dispersion(width, few):
    true = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64).exp()
    f = torch.full((1000, 7), 1.5 if few else 9.0, dtype=torch.float64)
    wide = NegativeBinomial(1.0, data_dim=7).double()
    wide.log_dispersion.data.copy_(true.log())
    x = wide.sample(f, torch.Generator().manual_seed(0)).detach()
    assert (x.max() < len(x)) == few  # selects one of two ways to sum
    likelihood = NegativeBinomial(1.0, data_dim=width).double()
    best, at = likelihood.ignoring(x)
    assert likelihood.dispersion.tolist() == [1.0] * width
    if width == 7:
        torch.testing.assert_close(best.dispersion.detach(), true, rtol=0.3, atol=0)
    best.log_prob(x, at).mean().backward()
    assert best.log_dispersion.grad.abs().max() < 2e-3
    fixed = NegativeBinomial(1.0, trained=False)
    assert fixed.ignoring(x)[0] is fixed
    even = likelihood.ignoring(torch.full((9, 7), 3.0, dtype=torch.float64))[0]  # no r is too large
    assert even.dispersion.min() > 1e4


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
    assert q.log_prob(z).isfinite().all()  # z is rounded
    assert q.log_prob(q.mean)[0].item() == pytest.approx(-log_variance - math.log(2 * math.pi), rel=1e-6)
    # the same for a mixture of two such components and a negligible third
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
