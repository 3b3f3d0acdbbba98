"""The advice on L: against closed forms of linear Gaussian models, and where likelihoods saturate."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import ilvae_fast as il
from ilvae_fast.data import load
from ilvae_fast.training import TrainConfig, advice_for, build_model, sweep, train
from ilvae_fast.training.config import model_config
from ilvae_fast.vae import (
    LIKELIHOODS,
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    Gaussian,
    NegativeBinomial,
    Poisson,
)
from training_cases import interrupt, run_command, small

SPECTRUM = (9.0, 4.0, 2.25, 0.81, 0.49, 0.25, 0.04)  # principal variances


def gaussian_data(spectrum=SPECTRUM, count=200, scale=1.0) -> torch.Tensor:
    """Data with exactly these principal variances, in random directions and around a mean that is not 0.

    Each datum comes twice, so that the two halves that the advice looks at have these variances too.
    """
    generator = torch.Generator().manual_seed(0)
    width = len(spectrum)
    z = torch.randn(count, width, dtype=torch.float64, generator=generator)
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.mT @ z / count)).mT
    rotation = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))[0]
    x = scale * (z * torch.tensor(spectrum, dtype=torch.float64).sqrt()) @ rotation.mT + 3 * scale
    return x.repeat_interleave(2, 0)


def optimal_loss(sigma: float, least: float, latent_dim: int) -> float:
    """The smallest negative log-likelihood of a linear decoder whose singular values are all at least ``least``, by
    brute force: a grid of singular values for each principal direction."""
    total = 0.0
    for k, variance in enumerate(SPECTRUM):
        v = (
            least**2 + torch.linspace(0, 3.5, 200_001, dtype=torch.float64).square()
            if k < latent_dim
            else torch.zeros(1)
        )
        each = 0.5 * ((v + sigma**2).log() + variance / (v + sigma**2))
        total += each.min().item()
    return total


def test_payable_latents_are_the_principal_variances_above_the_noise():
    x = gaussian_data()
    for sigma, payable in ((0.1, 7), (0.3, 6), (0.6, 5), (1.0, 3), (1.6, 2), (2.5, 1), (3.1, 0)):
        advice = il.advise(x, 4, Gaussian(sigma))
        assert advice.payable == payable
        assert advice.noise == pytest.approx(sigma)
        torch.testing.assert_close(torch.tensor(advice.deviations), torch.tensor(SPECTRUM).sqrt())


@pytest.mark.parametrize("latent_dim", [1, 3, 6])
@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.5])
def test_the_cost_is_that_of_the_best_constrained_decoder(latent_dim, sigma):
    advice = il.advise(gaussian_data(), latent_dim, Gaussian(sigma))
    free, ignoring = optimal_loss(sigma, 0, latent_dim), optimal_loss(sigma, 0, 0)
    assert advice.gain == pytest.approx(ignoring - free, abs=1e-6)
    for least in (0.0, 0.2, 0.7, 1.5, 3.0):
        cost = optimal_loss(sigma, least, latent_dim) - free
        assert advice.cost(least) == pytest.approx(cost, abs=1e-6)
        forced = latent_dim / 2 * math.log1p((least / sigma) ** 2)
        assert advice.forced(least) == pytest.approx(forced)
        assert advice.cost(least) <= forced + 1e-9


def test_a_constant_is_idle_up_to_the_smallest_singular_value():
    advice = il.advise(gaussian_data(), 3, Gaussian(1.0))
    assert advice.idle == pytest.approx(math.sqrt(2.25 - 1))
    assert advice.cost(0.999 * advice.idle) == pytest.approx(0, abs=1e-12)
    assert advice.cost(1.1 * advice.idle) > 1e-3
    assert il.advise(gaussian_data(), 4, Gaussian(1.0)).idle == 0


def test_low_high_and_recommended_force_what_the_rule_says():
    rich = il.advise(gaussian_data((16.0, 9.0, 9.0, 1.0)), 3, Gaussian(1.0))
    assert rich.forced(rich.low) == pytest.approx(0.1)
    assert rich.forced(rich.high) == pytest.approx(rich.gain / 10)
    assert rich.forced(rich.L) == pytest.approx(rich.gain / 40)
    assert rich.low < rich.L < rich.high
    precise = il.advise(gaussian_data((16.0, 9.0, 9.0, 1.0)), 3, Gaussian(1e-3))
    spread = math.sqrt((16 + 9 + 9) / 3)
    assert (precise.L, precise.high) == pytest.approx((spread / 4, spread / 2), rel=1e-5)
    assert precise.low < precise.L
    middling = il.advise(gaussian_data(), 3, Gaussian(1.0))
    assert 1 < middling.gain < 4
    assert middling.L == middling.low < middling.high
    poor = il.advise(gaussian_data(), 3, Gaussian(2.5))
    assert poor.L == poor.high < poor.low
    nothing = il.advise(gaussian_data(), 3, Gaussian(4.0))
    assert (nothing.gain, nothing.high, nothing.payable) == (0, 0, 0)
    assert nothing.L == nothing.low > 0


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(1e-4, 1e4), sigma=st.floats(0.2, 4), latent_dim=st.integers(1, 6))
def test_constants_are_in_units_of_the_data(scale, sigma, latent_dim):
    assume(min(abs(variance - sigma**2) for variance in SPECTRUM) > 1e-5)  # where rounding decides what is payable
    one = il.advise(gaussian_data(), latent_dim, Gaussian(sigma))
    other = il.advise(gaussian_data(scale=scale), latent_dim, Gaussian(scale * sigma))
    for name in ("L", "low", "high", "idle", "noise"):
        assert getattr(other, name) == pytest.approx(scale * getattr(one, name), rel=1e-5)
    assert other.payable == one.payable
    assert other.gain == pytest.approx(one.gain, abs=1e-6)


def test_an_adaptive_variance_is_the_residual_variance():
    for variance in ("optimal", "trained"):
        advice = il.advise(gaussian_data(), 3, Gaussian(7.0, variance))
        assert advice.noise == pytest.approx(math.sqrt(sum(SPECTRUM[3:]) / 4))
        assert advice.payable == 5
        same = il.advise(gaussian_data(), 3, Gaussian(advice.noise))
        assert (same.L, same.low, same.high) == pytest.approx((advice.L, advice.low, advice.high))
    assert math.isfinite(il.advise(torch.zeros(50, 3), 2, Gaussian(1.0, "optimal")).L)


def test_sampling_noise_pays_for_no_latent():
    x = torch.randn(2000, 300, generator=torch.Generator().manual_seed(0))
    assert il.advise(x, 10, Gaussian(1.0)).payable <= 3  # although about half of the sample variances exceed 1
    x = (torch.rand(2000, 300, generator=torch.Generator().manual_seed(1)) < 0.1).float()
    assert il.advise(x, 10, "bernoulli").payable <= 3


def clustered(likelihood, count=600, width=8) -> torch.Tensor:
    """Two clusters that differ in half of the coordinates; the last two coordinates are constant."""
    generator = torch.Generator().manual_seed(0)
    cluster = torch.rand(count, 1, generator=generator) < 0.5
    logits = torch.where(cluster, 2.0, -2.0) * (torch.arange(width) < 4)
    if isinstance(likelihood, Categorical):
        x = (torch.rand(count, width, generator=generator) < logits.sigmoid()).long()
    else:
        x = likelihood.sample(logits, generator)
    x[:, -2], x[:, -1] = 0, (x.max() if likelihood.support[1] < math.inf else 1)
    return x


CASES = [
    Bernoulli(), ContinuousBernoulli(), Poisson(), NegativeBinomial(5.0, trained=False), NegativeBinomial(),
    Categorical(2), Categorical(30), Gaussian(1.0),
]  # fmt: skip


@pytest.mark.parametrize("likelihood", CASES, ids=lambda likelihood: f"{type(likelihood).__name__}")
def test_every_likelihood_gets_finite_advice_with_constant_coordinates(likelihood):
    assert {type(case) for case in CASES} == set(LIKELIHOODS.values())
    x = clustered(likelihood)
    for latent_dim in (1, 2):
        advice = il.advise(x, latent_dim, likelihood)
        values = [advice.L, advice.low, advice.high, advice.idle, advice.gain, *advice.deviations]
        assert all(math.isfinite(value) for value in values)
        assert 0 < advice.L < 20
        # the noise of negative binomial counts is larger where z raises the mean, which looks like a latent
        assert 1 <= advice.payable <= (5 if isinstance(likelihood, NegativeBinomial) else 2)
        assert advice.cost(0.0) == 0
        costs = [advice.cost(least) for least in (0.1, 0.5, 2.0, 10.0)]
        assert costs == sorted(costs)
        assert all(
            cost <= advice.forced(least) + 1e-9 for cost, least in zip(costs, (0.1, 0.5, 2.0, 10.0), strict=True)
        )


def test_rare_pixels_do_not_change_the_advice():
    x = clustered(Bernoulli())
    blank = torch.zeros(len(x), 200)
    blank[torch.arange(100), torch.arange(100)] = 1  # each once, in one datum
    plain, bordered = (il.advise(data, 2, "bernoulli") for data in (x, torch.cat([x, blank], 1)))
    assert bordered.payable == plain.payable
    assert (bordered.L, bordered.gain) == pytest.approx((plain.L, plain.gain), rel=0.1)
    smallest = math.sqrt(1 / 16)  # of a deviation of 1 by at most 4 logits
    assert bordered.forced(1.0) >= math.log1p(smallest**2) - 1e-9


def test_the_constant_for_text_is_per_token():
    """Twice as many tokens of the same kind carry twice the information about the logits of each."""
    generator = torch.Generator().manual_seed(0)
    topic = torch.rand(3000, 1, generator=generator) < 0.5
    weights = torch.where(topic, torch.tensor([4.0, 1, 1, 1, 1]), torch.tensor([1.0, 1, 1, 1, 4]))
    tokens = torch.multinomial(weights, 16, True, generator=generator)
    absent = torch.cat([tokens[:, :8], torch.full((3000, 8), -1)], 1)
    short, padded, long = (il.advise(x, 1, Categorical(5)) for x in (tokens[:, :8], absent, tokens))
    assert (padded.L, padded.gain) == pytest.approx((short.L, short.gain))
    assert short.payable == long.payable == 1
    assert short.low == pytest.approx(math.sqrt(2) * long.low, rel=0.05)
    # the probabilities of two words are 5/16 +- 3/16: to first order their logits move by 3/5
    assert long.idle == pytest.approx(0.6 * math.sqrt(2), rel=0.1)


def test_large_data_sets_are_subsampled():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30_001, 3, generator=generator)
    advice = il.advise(x, 2, Gaussian(0.5))
    assert advice.available == 30_001
    assert 7_500 <= advice.used <= 10_000
    assert f"From {advice.used} of 30001 data" in str(advice)
    wide = il.advise(torch.randn(5000, 1500, generator=generator), 3, Gaussian(0.5))
    assert wide.used <= 2048
    assert wide.payable > 3


def test_the_advice_prints_as_a_paragraph():
    text = str(il.advise(gaussian_data(), 3, Gaussian(1.0)))
    assert "\n" not in text
    assert "3 principal deviations exceed sigma = 1 (3, 2, 1.5; the next is 0.9)" in text
    assert "the data can pay for 3 latents" in text
    assert "L1 L2 sigma_min(B), as --L" in text
    assert "can only cost" not in text
    advice = il.advise(gaussian_data(), 5, Gaussian(1.0))
    assert f"Recommended: L = {advice.L:.3g}. It forces z to carry {advice.forced(advice.L):.2g} nats" in str(advice)
    assert "2 of the 5 latents can only cost: use at most 3 or a smaller sigma." in str(advice)
    assert "is already likely to spoil the fit" in str(il.advise(gaussian_data(), 3, Gaussian(2.5)))
    nothing = str(il.advise(gaussian_data(), 3, Gaussian(4.0)))
    assert "No principal deviation of the data exceeds sigma = 4 (the largest is 3)" in nothing
    assert "even the best linear model uses no latent" in nothing
    assert "Lower the noise" in nothing
    assert "exceed the noise (" in str(il.advise(clustered(Bernoulli()), 1, "bernoulli")).replace("exceeds", "exceed")


def test_the_picture_is_written(tmp_path):
    for sigma, name in ((1.0, "a.png"), (2.5, "b.png"), (4.0, "c.png"), (1.0, "d.svg")):
        il.advise(gaussian_data(), 3, Gaussian(sigma)).plot(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "d.svg").read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize(
    ("x", "latent_dim", "likelihood", "error", "message"),
    [
        ([[1.0]], 1, "gaussian", TypeError, r"x: got list, wanted a tensor \(N, D\); torch.as_tensor makes one"),
        (torch.zeros(9, 2, 2), 1, "gaussian", ValueError, r"x: got .* \(9, 2, 2\).*x.flatten\(1\)"),
        (torch.full((9, 3), math.nan), 1, "gaussian", ValueError, "x: got 27 values that are infinite or NaN"),
        (torch.zeros(9, 3), 4, "gaussian", ValueError, "latent_dim: got 4, wanted at most the decoder's 3 outputs"),
        (torch.zeros(9, 3), 0, "gaussian", ValueError, "latent_dim: got 0"),
        (torch.zeros(5, 3), 2, "gaussian", ValueError, "x: got 5 data, wanted at least 6 for 2 latents"),
        (torch.full((9, 3), 2.0), 1, "bernoulli", ValueError, "x: got values from 2 to 2"),
        (torch.zeros(9, 3), 1, "gausian", ValueError, "likelihood: got 'gausian'.*nearest: 'gaussian'"),
        (torch.zeros(9, 3), 1, 3, TypeError, "likelihood: got int, wanted a name or a Likelihood"),
        (torch.zeros(9, 3).long(), 1, "categorical", ValueError, "pass an object with its options.*'num_categories'"),
    ],
)
def test_bad_arguments_are_named(x, latent_dim, likelihood, error, message):
    with pytest.raises(error, match=message):
        il.advise(x, latent_dim, likelihood)
    with pytest.raises(ValueError, match="L: got -1"):
        il.advise(gaussian_data(), 1, Gaussian(1.0)).forced(-1)


# runs


def test_the_command_prints_the_advice_of_a_run(tmp_path, capsys):
    printed = run_command(
        capsys, "advise", "--data", "digits", "--latent-dim", "5", "--picture", str(tmp_path / "a.png")
    )
    assert printed.startswith(str(il.advise(load("digits").train, 5, "bernoulli")))  # as build_model has it
    assert (tmp_path / "a.png").is_file()
    options = ["--set", "model_options.likelihood=gaussian", "--set", "model_options.likelihood_options.scale=0.5"]
    assert "5 principal deviations exceed sigma = 0.5" in run_command(capsys, "advise", "--latent-dim", "20", *options)
    assert "wanted" in run_command(capsys, "advise", "--latent-dim", "65", status=2)


@pytest.mark.parametrize("data", ["digits", "synthetic_text"])
def test_the_likelihood_is_that_of_the_model(data):
    config = TrainConfig(data=data, model="il-lidsvae" if data == "synthetic_text" else "il-lidvae", latent_dim=2)
    dataset = load(data) if data == "digits" else load(data, num_sentences=60, vocabulary_size=150)
    model = build_model(config, dataset)
    assert advice_for(config, dataset).likelihood == type(model.likelihood).__name__


def test_a_run_with_the_advised_constant(tmp_path, capsys):
    config = small(tmp_path / "run", L="auto")
    dataset = load(config.data, **config.data_options)
    wanted = float(f"{advice_for(config, dataset).L:.3g}")
    assert build_model(config, dataset).decoder.inverse_lipschitz_bound().item() == pytest.approx(wanted)
    measures = train(config)
    assert f"L = {wanted:g} by the advice" in capsys.readouterr().out
    assert measures["certified"] == pytest.approx(wanted, rel=1e-6)
    kept = TrainConfig.from_yaml(tmp_path / "run" / "config.yaml")
    assert kept.L == "auto"
    assert kept == config
    assert train(kept) == measures  # done already
    assert small(tmp_path, L="auto", output=None).folder.name == "toy-il-lidvae-Lauto-seed0"


def test_a_resumed_run_keeps_the_advised_constant(tmp_path):
    config = small(tmp_path / "run", L="auto", checkpoint_every=5)
    with pytest.raises(KeyboardInterrupt):
        train(config, interrupt)
    assert train(config) == train(small(tmp_path / "whole", L="auto", checkpoint_every=5))


def test_auto_among_the_constants_of_a_sweep(tmp_path, capsys):
    rows = sweep(small(tmp_path), ["auto", 0.5], [0], tmp_path / "sweep")
    assert [row["L"] for row in rows] == ["auto", 0.5]
    assert rows[0]["certified"] != pytest.approx(0.5)
    assert {path.name for path in (tmp_path / "sweep").glob("*-seed0")} == {
        "il-lidvae-Lauto-seed0", "il-lidvae-L0.5-seed0",
    }  # fmt: skip
    capsys.readouterr()
    sized = ["--data", "toy", "--latent-dim", "2", "--epochs", "1", "--cpu", "--set", "data_options.num_train=200"]
    few = ["--set", "num_importance_samples=2", "--set", "fisher_samples=2", "--set", "eval_limit=20"]
    printed = run_command(capsys, "sweep", *sized, *few, "--L", "auto", "--L", "1", "--output", str(tmp_path / "other"))
    assert re.search(r"L=auto seed=0 +\S", printed)
    assert [row["L"] for row in json.loads((tmp_path / "other" / "sweep.json").read_text())] == ["auto", 1.0]


def test_invalid_constants_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="L: got 'atuo', wanted a finite number >= 0 or 'auto'"):
        small(tmp_path, L="atuo")
    assert "L: got 'x', wanted" in run_command(capsys, "train", "--L", "x", status=2)
    assert "L: got nan" in run_command(capsys, "train", "--L", "nan", status=2)
    printed = run_command(capsys, "train", "--model", "vae", "--L", "auto", "--output", str(tmp_path / "vae"), status=2)
    assert "L: got auto for 'vae', whose decoder has no such constant" in printed
    with pytest.raises(ValueError, match="resolved"):
        model_config(small(tmp_path, L="auto"), load("toy"))
