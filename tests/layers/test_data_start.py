"""decoder.initialize: the decoder starts at the mean of the data and along their principal directions."""

from __future__ import annotations

import pytest
import torch

import ilvae_fast as il
from ilvae_fast.vae import LIKELIHOODS, VAE, Categorical, Gaussian, Likelihood, NegativeBinomial
from vae_cases import small, tokens

WIDTH, LATENTS = 12, 3


def _data(count: int = 400) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(WIDTH, WIDTH, generator=generator)
    scales = torch.tensor([5.0, 4.0, 3.0, *[0.3] * (WIDTH - 3)])
    return 2 + (torch.randn(count, WIDTH, generator=generator) * scales) @ torch.linalg.qr(directions).Q.T


def _values(name: str) -> torch.Tensor:
    x = _data()
    if name == "gaussian":
        return x
    if name in ("poisson", "negative_binomial"):
        return x.clamp(min=0).round()
    return (x > 2).float() if name == "bernoulli" else (x / 10).sigmoid()


def _mean(decoder: il.BrenierDecoder) -> torch.Tensor:
    dtype = decoder.data_map.skip_weight.dtype
    z = torch.randn(20000, decoder.latent_dim, dtype=dtype, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return decoder(z).flatten(1).mean(0)


@pytest.mark.parametrize("name", [name for name in LIKELIHOODS if name != "categorical"])
@pytest.mark.parametrize("embedding", ["identity", "orthogonal", "full_rank"])
@pytest.mark.parametrize("output", ["identity", "softplus"])
def test_the_start_is_the_best_model_that_ignores_the_latent(name, embedding, output):
    torch.manual_seed(0)
    decoder = il.BrenierDecoder(
        LATENTS, WIDTH, ((8, 8), (16, 16)), embedding=embedding, output_activation=output, inverse_lipschitz=0.3
    )
    x = _values(name)
    decoder.initialize(x, name)
    likelihood: Likelihood = LIKELIHOODS[name]()
    wanted = likelihood.marginal(x)
    tolerance = 0.05 * (1 + wanted.abs().max())
    assert (_mean(decoder) - wanted).abs().max() < tolerance
    assert float(decoder.inverse_lipschitz_bound()) == pytest.approx(0.09, rel=1e-5)


@pytest.mark.parametrize("embedding", ["orthogonal", "full_rank"])
def test_the_embedding_spans_the_principal_directions(embedding):
    decoder = il.BrenierDecoder(LATENTS, WIDTH, ((8,), (16,)), embedding=embedding)
    x = _data()
    decoder.initialize(x, Gaussian(0.5))
    exact = torch.linalg.eigh(torch.cov(x.T)).eigenvectors[:, -LATENTS:]
    cosines = torch.linalg.svdvals(exact.T @ decoder.embedding_matrix().detach())
    torch.testing.assert_close(cosines, torch.ones(LATENTS), rtol=0, atol=1e-3)


def test_it_is_deterministic_and_draws_no_random_numbers():
    decoders = []
    for _ in range(2):
        torch.manual_seed(0)
        decoder = il.BrenierDecoder(LATENTS, WIDTH, ((8,), (16,)))
        before = torch.get_rng_state()
        decoder.initialize(_data(), "gaussian")
        assert torch.equal(torch.get_rng_state(), before)
        decoders.append(decoder.state_dict())
    for a, b in zip(*(d.values() for d in decoders), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_more_latents_than_the_data_have_directions():
    decoder = il.BrenierDecoder(10, WIDTH, ((8,), (16,)))
    decoder.initialize(_data(4), "gaussian")
    assert float(decoder.inverse_lipschitz_bound()) == pytest.approx(1.0, rel=1e-4)


def test_images_and_other_dtypes():
    decoder = il.BrenierDecoder(LATENTS, data_shape=(1, 3, 4), hidden_features=((8,), (16,)), dtype=torch.float64)
    x = _data().double()
    decoder.initialize(x.reshape(-1, 1, 3, 4), "gaussian")
    assert (_mean(decoder) - x.mean(0)).abs().max() < 0.1


def test_tokens_start_the_head_of_a_sequence_decoder():
    torch.manual_seed(0)
    model = VAE(small("il-lidsvae"))
    x = tokens(200)
    model.initialize(x)
    present = x[x >= 0]
    frequencies = torch.bincount(present, minlength=13) / len(present)
    f = _mean(model.decoder.head)  # its inputs [h, z] have a variance of about one
    assert (f.softmax(-1) - frequencies).abs().max() < 0.1


def test_models_with_another_decoder_are_left_alone():
    model = VAE(small("vae"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.initialize(torch.rand(10, 7))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_it_lowers_the_initial_reconstruction_loss():
    torch.manual_seed(0)
    model = VAE(small("il-lidvae", data_dim=WIDTH))
    x = _data()
    with torch.no_grad():
        before = model(x).reconstruction.mean()
        model.initialize(x)
        assert model(x).reconstruction.mean() < 0.9 * before


@pytest.mark.parametrize(
    ("x", "likelihood", "error", "message"),
    [
        (_data().tolist(), "gaussian", TypeError, "x: got list"),
        (_data()[:, :5], "gaussian", ValueError, "x: got 5 values in a datum, .*data_dim, 12"),
        (_data()[:0], "gaussian", ValueError, "x: got shape"),
        (_data(), "bernoulli", ValueError, "x: got values from"),
        (_data(), "gausian", ValueError, "gaussian"),
        (_data(), 3, TypeError, "likelihood: got int"),
        (_data(), Categorical(3), ValueError, "outputs"),
    ],
)
def test_refusals(x, likelihood, error, message):
    with pytest.raises(error, match=message):
        il.BrenierDecoder(LATENTS, WIDTH, ((8,), (16,))).initialize(x, likelihood)


def test_a_likelihood_with_parameters_of_its_own_is_left_alone():
    likelihood = NegativeBinomial()
    before = {name: value.clone() for name, value in likelihood.state_dict().items()}
    il.BrenierDecoder(LATENTS, WIDTH, ((8,), (16,))).initialize(_values("negative_binomial"), likelihood)
    assert all(torch.equal(before[name], value) for name, value in likelihood.state_dict().items())
