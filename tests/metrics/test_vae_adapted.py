"""Adapted models: their metrics are those of the same model built by this library."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ilvae_fast import metrics
from ilvae_fast.vae import Categorical, Gaussian, GaussianMixturePosterior, StandardNormal
from vae_cases import STATIC, TOKENS, batch, data_for, seeded, small_model, tokens

METRICS = {
    "nll": lambda model, x: metrics.negative_log_likelihood(model, x, 5, generator=seeded()),
    "elbo": lambda model, x: metrics.elbo(model, x, 2, generator=seeded()),
    "gain": lambda model, x: metrics.gain(model, x, x[:5], 2, generator=seeded()),
    "without latent": lambda model, x: metrics.nll_without_latent(model, x, x[:5]),
    "kl": metrics.kl_divergence,
    "active units": metrics.active_units,
    "active directions": metrics.active_directions,
    "epsilon collapse": metrics.epsilon_collapse,
    "mutual information": lambda model, x: metrics.mutual_information(model, x, generator=seeded()),
    "fisher": lambda model, x: metrics.relative_fisher(model, x, 4, generator=seeded()),
    "constant": lambda model, x: metrics.inverse_lipschitz(
        metrics.decoder_given(model.decoder, x[0]), torch.randn(6, 3, dtype=torch.float64, generator=seeded())
    ),
}


def assert_measured_alike(adapted, model, x, x_of_model):
    for name, metric in METRICS.items():
        expected, result = metric(model, x_of_model), metric(adapted, x)
        torch.testing.assert_close(result, expected, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", [*STATIC, "svae", "il-lidsvae"])
def test_all_metrics_of_adapted_parts_are_those_of_the_model(name):
    model, x = small_model(name), data_for(name, 9)
    adapted = metrics.adapt(
        encoder=model.encoder, decoder=model.decoder, likelihood=model.likelihood, prior=model.prior
    )
    assert_measured_alike(adapted, model, x, x)
    if "mvae" not in name:
        parts = {"encoder": lambda x: model.encoder(x).chunk(2, -1), "decoder": model.decoder}
        adapted = metrics.adapt(**parts, likelihood=model.likelihood, prior="standard_normal")
        assert_measured_alike(adapted, model, x, x)


class Images(nn.Module):
    """A convolutional encoder and decoder that, like many, take batches (N, ...) only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down, self.to_latent = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(3 * 20, 6)
        self.from_latent, self.up = nn.Linear(3, 3 * 20), nn.ConvTranspose2d(3, 2, 3, padding=1)

    def encode(self, x):
        assert x.shape[1:] == (2, 4, 5)
        return self.to_latent(self.down(x).tanh().flatten(1))

    def decode(self, z):
        assert z.dim() == 2
        return self.up(self.from_latent(z).tanh().view(-1, 3, 4, 5))


def flat_model(images: Images):
    """The same on flat data, as a model of this library."""
    model = small_model("vae", data_dim=40, likelihood_options={"scale": 0.5})
    model.encoder = nn.Sequential(nn.Unflatten(1, (2, 4, 5)), Called(images.encode))
    model.decoder = Called(lambda z: images.decode(z.reshape(-1, 3)).reshape(*z.shape[:-1], 40))
    return model


class Called(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("form", ["one tensor", "tuple", "names"])
def test_images_of_any_shape_and_the_forms_of_what_encoders_return(form):
    images = Images().double()
    x = torch.rand(7, 2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    forms = {
        "one tensor": (images.encode, images.decode),
        "tuple": (lambda x: (*images.encode(x).chunk(2, -1), "more"), images.decode),
        "names": (
            lambda x: SimpleNamespace(
                **dict(zip(("embedding", "log_covariance"), images.encode(x).chunk(2, -1), strict=True))
            ),
            lambda z: SimpleNamespace(reconstruction=images.decode(z)),
        ),
    }
    encoder, decoder = forms[form]
    adapted = metrics.adapt(encoder=encoder, decoder=decoder, likelihood=Gaussian(0.5))
    assert_measured_alike(adapted, flat_model(images), x, x.flatten(1))
    assert adapted.prior.latent_dim == 3
    # in batches with labels, as of a DataLoader
    cut = [(x[:3], "labels"), (x[3:], "labels")]
    assert metrics.kl_divergence(adapted, cut).total == pytest.approx(metrics.kl_divergence(adapted, x).total)
    assert metrics.negative_log_likelihood(adapted, cut, 3) < math.inf


def test_names_stand_for_likelihoods_and_priors():
    model, x = small_model("vae", likelihood="bernoulli"), batch(6).round()
    adapted = metrics.adapt(encoder=model.encoder, decoder=model.decoder, likelihood="bernoulli")
    assert metrics.elbo(adapted, x, generator=seeded()) == metrics.elbo(model, x, generator=seeded())
    restricted = StandardNormal(3, minimum_rate=3.0)
    adapted = metrics.adapt(encoder=model.encoder, decoder=model.decoder, likelihood="bernoulli", prior=restricted)
    assert metrics.kl_divergence(adapted, x).per_dimension.min() >= 1 - 1e-9


def test_a_certified_constant_and_a_jacobian_are_used():
    model, z = small_model("il-lidvae"), torch.randn(4, 2, 3, dtype=torch.float64)
    parts = {"encoder": model.encoder, "likelihood": model.likelihood}
    certified = metrics.adapt(decoder=model.decoder, **parts).decoder
    assert metrics.certified_constant(certified) == metrics.certified_constant(model.decoder) > 0
    torch.testing.assert_close(certified.jacobian(z), model.decoder.jacobian(z))
    plain = metrics.adapt(decoder=lambda z: model.decoder(z).view(-1, 7, 1, 1), **parts).decoder
    assert math.isnan(metrics.certified_constant(plain))
    assert not hasattr(plain, "jacobian")
    torch.testing.assert_close(metrics.decoder_jacobian(plain, z), model.decoder.jacobian(z))


def test_a_decoder_that_reads_x_needs_it():
    model, x = small_model("svae"), tokens(4)
    adapted = metrics.adapt(encoder=model.encoder, decoder=model.decoder, likelihood=Categorical(TOKENS))
    z = adapted.inference(x).mean
    torch.testing.assert_close(adapted.generative(z, x), model.generative(z, x))
    with pytest.raises(ValueError, match="x: got None"):
        adapted.generative(z)


def test_bad_parts_are_refused_by_name():
    model = small_model("vae")
    parts = {"encoder": model.encoder, "decoder": model.decoder, "likelihood": "gaussian"}
    for name, value, message in (
        ("encoder", 3, "encoder: got int, wanted something to call"),
        ("decoder", None, "decoder: got NoneType"),
        ("likelihood", nn.MSELoss(), "likelihood: got MSELoss, wanted a name or a Likelihood"),
        ("prior", 3, "prior: got int"),
    ):
        with pytest.raises(TypeError, match=message):
            metrics.adapt(**{**parts, name: value})
    for name, value, message in (
        ("likelihood", "gausian", "likelihood: got 'gausian'.*'gaussian'"),
        ("likelihood", "categorical", "likelihood 'categorical', pass an object .*'num_categories'"),
        ("prior", "gaussian_mixture", "prior: got 'gaussian_mixture', wanted 'standard_normal', or the object"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.adapt(**{**parts, name: value})
    with pytest.raises(ValueError, match="prior: got none before the encoder"):
        metrics.adapt(**parts).prior  # noqa: B018


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (lambda x: x, r"encoder: got mean and log_variance of shapes \(4, 4\) and \(4, 3\)"),  # of odd width
        (lambda x: (x, 0.5), r"encoder: got mean and log_variance of shapes \(4, 7\) and \(\)"),
        (lambda x: (x[0], x[0]), r"encoder: got a mean of shape \(7,\), wanted \(n, m\) for 4 data"),
        (lambda x: {"mean": x}, "encoder: got dict, wanted"),
    ],
)
def test_what_an_encoder_returns_is_checked(encoder, message):
    adapted = metrics.adapt(encoder=encoder, decoder=lambda z: z, likelihood="gaussian")
    with pytest.raises((ValueError, TypeError), match=message):
        metrics.active_units(adapted, batch(4))


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (lambda z: z[:3], r"decoder: got shape \(3, 7\), wanted a tensor \(N, \.\.\.\) for 4 latents"),
        (lambda z: (z, z), "decoder: got tuple, wanted a tensor"),
    ],
)
def test_what_a_decoder_returns_is_checked(decoder, message):
    adapted = metrics.adapt(encoder=lambda x: (x, x), decoder=decoder, likelihood="gaussian")
    with pytest.raises(ValueError, match=message):
        metrics.elbo(adapted, batch(4))


def test_posteriors_of_our_own_pass():
    posterior = GaussianMixturePosterior(batch(4)[:, :2], batch(4, 2), batch(4, 2))
    model = small_model("gmvae", latent_dim=7, prior_options={"num_components": 2})
    adapted = metrics.adapt(
        encoder=lambda x: posterior, decoder=model.decoder, likelihood="gaussian", prior=model.prior
    )
    assert adapted.inference(batch(4)) is posterior
    assert math.isfinite(metrics.negative_log_likelihood(adapted, batch(4), 3))
