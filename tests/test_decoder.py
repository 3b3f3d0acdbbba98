"""BrenierDecoder: embeddings, the certified constant, Jacobians, use inside a user's model."""

import copy
import pickle

import pytest
import torch
import torch.nn.utils.prune

import ilvae_fast as il

EMBEDDINGS = ["identity", "orthogonal", "full_rank"]


def _decoder(embedding="identity", **options):
    return il.BrenierDecoder(3, 7, ((8, 5), (9,)), embedding=embedding, dtype=torch.float64, **options)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_the_decoder_is_the_composition(embedding):
    decoder, z = _decoder(embedding), torch.randn(4, 2, 3, dtype=torch.float64)
    expected = decoder.data_map(decoder.latent_map(z) @ decoder.embedding_matrix().mT)
    torch.testing.assert_close(decoder(z), expected)
    assert decoder(z).shape == (4, 2, 7)
    jacobian = decoder.jacobian(z)
    assert jacobian.shape == (4, 2, 7, 3)
    one = torch.autograd.functional.jacobian(decoder, z[0, 0])
    torch.testing.assert_close(jacobian[0, 0], one)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_gradients_equal_the_reference(embedding):
    decoder = _decoder(embedding, inverse_lipschitz=(il.Trained(0.5), 1.5))
    z = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    variables = [z, *decoder.parameters()]
    results = []
    for backend in ("native", "reference"):
        with il.use_backend(backend):
            results.append(torch.autograd.grad(decoder(z).cos().sum(), variables))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_orthogonal_columns_stay_orthonormal_in_training():
    decoder = _decoder("orthogonal")
    optimiser = torch.optim.SGD(decoder.parameters(), lr=0.1)
    start = decoder.embedding_matrix().detach().clone()
    z = torch.randn(16, 3, dtype=torch.float64)
    for _ in range(5):
        optimiser.zero_grad()
        decoder(z).sin().sum(-1).mean().backward()
        optimiser.step()
    b = decoder.embedding_matrix().detach()
    assert not torch.allclose(b, start)
    torch.testing.assert_close(b.mT @ b, torch.eye(3, dtype=torch.float64))


def test_the_bound_is_of_what_is_applied():
    assert float(_decoder(inverse_lipschitz=(0.5, 3.0)).inverse_lipschitz_bound()) == pytest.approx(1.5)
    assert float(_decoder("orthogonal", inverse_lipschitz=2.0).inverse_lipschitz_bound()) == pytest.approx(4.0)
    decoder = _decoder("full_rank", inverse_lipschitz=(1.0, 2.0))
    with torch.no_grad():
        decoder.raw_embedding.mul_(0.1)
    assert float(decoder.inverse_lipschitz_bound()) == pytest.approx(0.2)
    decoder.latent_map.inverse_lipschitz = 5.0
    assert float(decoder.inverse_lipschitz_bound()) == pytest.approx(1.0)
    low = _decoder("orthogonal").bfloat16()
    assert float(low.inverse_lipschitz_bound()) == pytest.approx(
        float(torch.linalg.svdvals(low.embedding_matrix().double()).min()), rel=1e-12
    )


def test_options_are_single_or_pairs():
    decoder = _decoder(activation=("celu", "softplus"), nonneg="exp")
    assert decoder.latent_map._activations.layers[0].name == "celu"
    assert decoder.data_map._activations.layers[0].name == "softplus"
    assert decoder.latent_map.nonneg.name == decoder.data_map.nonneg.name == "exp"


@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same(embedding, copier):
    decoder, z = _decoder(embedding), torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(copier(decoder)(z), decoder(z), rtol=0, atol=0)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_low_precision_and_autocast(embedding):
    decoder = il.BrenierDecoder(3, 7, ((8, 5), (9,)), embedding=embedding)
    z = torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        x = decoder(z)
        x.float().sum().backward()
    assert x.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in decoder.parameters())
    assert decoder.bfloat16()(z.bfloat16()).dtype == torch.bfloat16


def test_equal_dimensions_and_a_drop_in_place():
    model = torch.nn.Sequential(torch.nn.Linear(10, 4), il.BrenierDecoder(4, 4, ((6,), (6,))), torch.nn.Sigmoid())
    loss = model(torch.randn(5, 10)).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((8, 7), {}, ValueError, "latent_dim: got 8, wanted at most data_dim, 7"),
        ((0, 7), {}, ValueError, "latent_dim: got 0"),
        ((3, "7"), {}, TypeError, "data_dim: got str"),
        ((3, 7, (128, 128)), {}, ValueError, r"hidden_features: got \(128, 128\), wanted the widths of both maps"),
        ((3, 7), {"embedding": "orthonormal"}, ValueError, "embedding: got 'orthonormal'.*nearest: 'orthogonal'"),
        ((3, 7), {"inverse_lipschitz": (1.0, 2.0, 3.0)}, ValueError, "inverse_lipschitz: got 3 values"),
        ((3, 7), {"inverse_lipschitz": (1.0, -2.0)}, ValueError, "inverse_lipschitz: got -2.0"),
        ((3, 7), {"activations": "relu"}, TypeError, "activations"),
    ],
)
def test_refusals(arguments, options, error, words):
    with pytest.raises(error, match=words):
        il.BrenierDecoder(*arguments, **options)


def test_hooks_of_both_maps_run():
    decoder, seen = _decoder(), []
    for name, part in (("latent", decoder.latent_map), ("data", decoder.data_map)):
        part.register_forward_hook(lambda module, inputs, output, name=name: seen.append((name, output.shape[-1])))
        part.register_full_backward_hook(lambda module, inputs, outputs, name=name: seen.append(name))
    decoder(torch.randn(2, 3, dtype=torch.float64)).sum().backward()
    assert seen == [("latent", 3), ("data", 7), "data", "latent"]


def test_pruned_weights_are_trained():
    decoder = _decoder()  # torch's pruning makes the weight anew in a hook before each call
    torch.nn.utils.prune.l1_unstructured(decoder.data_map, "skip_weight", 0.3)
    z = torch.randn(2, 3, dtype=torch.float64)
    before = decoder(z).detach()
    for _ in range(2):
        decoder(z).sum().backward()
    with torch.no_grad():
        decoder.data_map.skip_weight_orig.mul_(2)
    assert not torch.equal(decoder(z), before)
