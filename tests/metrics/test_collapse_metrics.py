"""Metrics of what the latent is worth: mutual information, warnings, collapse and clusters."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples.closed_forms import DTYPE, Linear
from ilvae_fast import metrics
from ilvae_fast.vae import VAE, DiagonalGaussian, GaussianMixturePosterior, VAEConfig
from vae_cases import seeded


def posterior_of(posterior):
    """A model with the given q(z|x), one for each datum."""
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
def test_mutual_information_stays_within_its_memory_limit(kind, monkeypatch):
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
    assert not metrics.diagnose({**collapsed, "gain": 0.1})  # a small gain at little cost
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
    (warning,) = metrics.diagnose({**collapsed, "gain": -90.0, "certified": 0.5})  # stretched without a gain
    assert "Try a smaller L than 0.5" in warning
    (warning,) = metrics.diagnose({**collapsed, "gain": -0.01, "certified": 0.0})
    assert "Try a decoder with L > 0, such as il-lidvae" in warning
    assert len(metrics.diagnose({**informed, "mutual_information": 0.1, "gain": -1.0})) == 2


def test_a_steep_decoder_of_unstructured_data_is_diagnosed():
    """Active units and KL prefer this model, which encodes z precisely and gains nothing by it."""
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


def test_the_majority_of_a_cluster_names_it():
    clusters, labels = torch.tensor([0, 0, 0, 2, 2, 3]), torch.tensor([1, 1, 0, 1, 1, 0])
    assert metrics.clustering_majority(clusters, labels) == pytest.approx(5 / 6)
    assert metrics.clustering_accuracy(clusters, labels) == pytest.approx(3 / 6)


def test_bad_clusters_are_refused():
    with pytest.raises(TypeError, match="clusters: got list, wanted a tensor"):
        metrics.clustering_majority([0], torch.tensor([0]))
    with pytest.raises(TypeError, match="labels: got list, wanted a tensor"):
        metrics.clustering_accuracy(torch.tensor([0]), [0])
    with pytest.raises(ValueError, match="clusters: got -1"):
        metrics.clustering_majority(torch.tensor([-1]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"labels: got shape \(3,\)"):
        metrics.clustering_accuracy(torch.zeros(2).long(), torch.zeros(3).long())
    with pytest.raises(ValueError, match="labels: got no datum"):
        metrics.clustering_accuracy(torch.zeros(0).long(), torch.zeros(0).long())
    with pytest.raises(ValueError, match="clusters: got -1"):
        metrics.clustering_accuracy(torch.tensor([-1]), torch.tensor([0]))
