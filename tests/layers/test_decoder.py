"""BrenierDecoder: embeddings, the certified constant, Jacobians, use inside a user's model."""

import copy
import itertools
import pickle
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.utils.prune

import ilvae_fast as il
from ilvae_fast import metrics
from ilvae_fast.annealing import Annealer, Linear

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


def test_the_bound_is_that_of_the_applied_matrices():
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


def test_a_square_decoder_drops_into_a_sequential_model():
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
        ((3, 7.0), {}, TypeError, r"data_dim: got float 7.0, wanted a positive int; int\(\.\.\) makes one of it"),
        ((True, 7), {}, TypeError, "latent_dim: got bool True"),
        ((3,), {}, TypeError, "data_dim: got None, wanted a positive int, or data_shape"),
        ((3, 7), {"data_shape": (2, 4)}, ValueError, r"data_dim: got 7, wanted 8, the values of data_shape \(2, 4\)"),
        ((3,), {"data_shape": 8}, ValueError, "data_shape: got 8, wanted a sequence of sizes"),
        ((3,), {"data_shape": (2, -4)}, ValueError, r"data_shape\[1\]: got -4, wanted at least 1"),
        ((9,), {"data_shape": (2, 4)}, ValueError, "latent_dim: got 9, wanted at most data_dim, 8"),
        ((3, 7, ((8,), None)), {}, ValueError, "hidden_features: got .*, wanted the widths of both maps"),
        ((3, 7, ((8,), (8, 0))), {}, ValueError, r"hidden_features\[1\]\[1\]: got 0, wanted at least 1"),
        ((3, 7), {"in_features": 3}, TypeError, "option of BrenierDecoder: got 'in_features'"),
        ((3, 7), {"output_activation": "squared_leaky_relu"}, ValueError, "output_activation: got .*non-decreasing"),
        ((3, 7), {"activation": "squared_leaky_relu"}, ValueError, "first_activation='squared_leaky_relu'"),
        ((3, 7, (128, 128)), {}, ValueError, r"hidden_features: got \(128, 128\), wanted the widths of both maps"),
        ((3, 7), {"embedding": "orthonormal"}, ValueError, "embedding: got 'orthonormal'.*nearest: 'orthogonal'"),
        ((3, 7), {"inverse_lipschitz": (1.0, 2.0, 3.0)}, ValueError, "inverse_lipschitz: got 3 values"),
        ((3, 7), {"inverse_lipschitz": (1.0, -2.0)}, ValueError, "inverse_lipschitz: got -2.0"),
        ((3, 7), {"activations": "relu"}, TypeError, "got 'activations', wanted one of .*nearest: 'activation'"),
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
    decoder = _decoder()  # pruning recomputes the weight in a hook before each call
    torch.nn.utils.prune.l1_unstructured(decoder.data_map, "skip_weight", 0.3)
    z = torch.randn(2, 3, dtype=torch.float64)
    before = decoder(z).detach()
    for _ in range(2):
        decoder(z).sum().backward()
    with torch.no_grad():
        decoder.data_map.skip_weight_orig.mul_(2)
    assert not torch.equal(decoder(z), before)


def test_images_come_in_their_shape():
    torch.manual_seed(0)
    flat = il.BrenierDecoder(3, 8, ((8, 5), (9,)), embedding="orthogonal")
    shaped = il.BrenierDecoder(
        3, hidden_features=((8, 5), (9,)), embedding="orthogonal", data_shape=torch.Size([1, 2, 4])
    )
    shaped.load_state_dict(flat.state_dict())
    assert shaped.data_dim == 8
    z, v = torch.randn(2, 5, 6, 3)
    assert shaped(z).shape == (5, 6, 1, 2, 4)
    torch.testing.assert_close(shaped(z).flatten(-3), flat(z), rtol=0, atol=0)
    torch.testing.assert_close(shaped.jacobian(z), flat.jacobian(z), rtol=0, atol=0)
    torch.testing.assert_close(shaped.jvp(z, v), flat.jvp(z, v), rtol=0, atol=0)
    assert metrics.inverse_lipschitz(shaped, z.reshape(-1, 3)) == metrics.inverse_lipschitz(flat, z.reshape(-1, 3))
    assert il.BrenierDecoder(3, 8, data_shape=(2, 4)).data_shape == (2, 4)
    assert torch.compile(shaped, fullgraph=True, backend="aot_eager")(z).shape == (5, 6, 1, 2, 4)


def test_sizes_may_be_any_integers():
    decoder = il.BrenierDecoder(
        np.int64(3), np.prod((1, 2, 4)), (np.array([8, 5]), (torch.tensor(9),)), data_shape=np.array([2, 4])
    )
    sizes = (decoder.latent_dim, decoder.data_dim, *decoder.data_shape, *decoder.data_map.hidden_features)
    assert sizes == (3, 8, 2, 4, 9)
    assert {type(size) for size in sizes} == {int}


def test_the_constants_are_set_together():
    decoder = _decoder(inverse_lipschitz=(il.Trained(0.5), 1.5))
    decoder.inverse_lipschitz = 2.0, np.float32(0.25)
    assert [float(c) for c in decoder.inverse_lipschitz] == pytest.approx([2.0, 0.25])
    assert float(decoder.inverse_lipschitz_bound()) == pytest.approx(0.5)
    decoder.inverse_lipschitz = 3
    assert float(decoder.inverse_lipschitz_bound()) == pytest.approx(9)
    with pytest.raises(ValueError, match="inverse_lipschitz: got -1"):
        decoder.inverse_lipschitz = -1.0


def _loading(decoder, state, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decoder.load_state_dict(state, **options)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_constant_wins_and_says_so_once(assign):
    state = torch.nn.ModuleDict({"decoder": _decoder(inverse_lipschitz=(0.7, 0.2))}).state_dict()
    model = torch.nn.ModuleDict({"decoder": _decoder(inverse_lipschitz=(3.0, 0.4))})
    (message,) = _loading(model, state, assign=assign)
    assert "decoder.latent_map.inverse_lipschitz = 0.7, constructed as 3;" in message
    assert "decoder.data_map.inverse_lipschitz = 0.2, constructed as 0.4." in message
    assert float(model["decoder"].inverse_lipschitz_bound()) == pytest.approx(0.14)
    (message,) = _loading(_decoder(inverse_lipschitz=(0.7, 1.0)), _decoder(inverse_lipschitz=0.7).state_dict())
    assert "data_map" in message
    assert "latent_map" not in message


def test_a_loaded_constant_that_is_the_same_or_was_assigned_says_nothing():
    state = _decoder(inverse_lipschitz=(0.7, 0.2)).state_dict()
    assert _loading(_decoder(inverse_lipschitz=(0.7, 0.2)), state) == []
    single = il.BrenierDecoder(3, 7, ((8, 5), (9,)), inverse_lipschitz=(0.7, 0.2), embedding="identity")  # rounded
    assert _loading(single, state) == []
    assert _loading(_decoder(inverse_lipschitz=(0.7, 0.2)), single.bfloat16().state_dict()) == []
    assert _loading(_decoder(inverse_lipschitz=(0.7, il.Trained(3.0))), state, strict=False) == []
    scheduled = _decoder(inverse_lipschitz=5.0)
    Annealer(scheduled, {"L1": Linear(5.0, 1.0, 10), "L2": 5.0})
    assert _loading(scheduled, state) == []


@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize("method", ["__call__", "jacobian"])
@pytest.mark.parametrize(
    ("z", "error", "words"),
    [
        (torch.zeros(2, 7), ValueError, r"z: got shape \(2, 7\), wanted \(\.\.\., 3\), latent_dim values each"),
        (torch.zeros(()), ValueError, r"z: got shape \(\), wanted \(\.\.\., 3\), latent_dim values each"),
        (
            torch.zeros(2, 3).long(),
            ValueError,
            r"z: got dtype torch.int64, wanted torch.float32.*z.to\(torch.float32\)",
        ),
        (
            torch.zeros(2, 3).double(),
            ValueError,
            "z: got dtype torch.float64, wanted torch.float32, that of the parameters",
        ),
        (torch.zeros(2, 3, device="meta"), ValueError, "z: got device meta, wanted cpu, where the parameters are"),
        (np.zeros((2, 3)), TypeError, "z: got ndarray, wanted a tensor; torch.as_tensor"),
    ],
)
def test_bad_latents_are_refused_by_name(embedding, method, z, error, words):
    decoder = il.BrenierDecoder(3, 7, ((8, 5), (9,)), embedding=embedding)
    with pytest.raises(error, match=words) as caught:
        getattr(decoder, method)(z)
    assert "weight" not in str(caught.value)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(error, match=words):
        getattr(decoder, method)(z)


def test_bad_tangents_and_float16_on_the_cpu_are_refused():
    decoder = il.BrenierDecoder(3, 7, ((8, 5), (9,)))
    with pytest.raises(ValueError, match=r"v: got shape \(2, 7\), wanted that of z, \(2, 3\)"):
        decoder.jvp(torch.zeros(2, 3), torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"z: got torch.float16 on the CPU, wanted float32 or bfloat16"):
        decoder.half()(torch.zeros(2, 3).half())
    assert decoder.float()(torch.zeros(2, 3)).dtype == torch.float32


def _foreign_init(module):
    for parameter in module.parameters(recurse=False):
        if parameter.dim() > 1:
            torch.nn.init.xavier_normal_(parameter)
        else:
            torch.nn.init.zeros_(parameter)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize("nonneg", ["square", "abs"])
def test_a_decoder_learns_after_another_initialisation(embedding, nonneg):
    torch.manual_seed(0)
    decoder, z = il.BrenierDecoder(10, 784, embedding=embedding, nonneg=nonneg), torch.randn(32, 10)
    largest = [float(torch.linalg.svdvals(decoder.jacobian(z).detach()).max())]
    decoder.apply(_foreign_init)
    largest.append(float(torch.linalg.svdvals(decoder.jacobian(z).detach()).max()))
    assert 0.1 < largest[1] / largest[0] < 10
    target = (z @ torch.randn(10, 784)).tanh()
    optimiser, losses = torch.optim.Adam(decoder.parameters(), lr=1e-2), []
    for _ in range(60):
        optimiser.zero_grad()
        loss = (decoder(z) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    decoder.reset_parameters()
    assert 0.3 < float(torch.linalg.svdvals(decoder.jacobian(z).detach()).max()) / largest[0] < 3


@pytest.mark.parametrize("embedding", ["identity", "orthogonal"])  # sigma_min of full_rank decays with it
@pytest.mark.parametrize("nonneg", ["square", "abs"])
def test_weight_decay_shrinks_the_decoder_to_its_floor(embedding, nonneg):
    torch.manual_seed(0)
    decoder = il.BrenierDecoder(
        5, 20, ((16, 16), (32, 32)), nonneg=nonneg, embedding=embedding, inverse_lipschitz=0.5, dtype=torch.float64
    )
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=1e-2, weight_decay=1.0)
    z, other = torch.randn(2, 200, 5, dtype=torch.float64)
    floor = 0.25 * (z - other).norm(dim=-1)
    spreads = []
    for _ in range(600):
        for parameter in decoder.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
        with torch.no_grad():
            moved = (decoder(z) - decoder(other)).norm(dim=-1)
        assert (moved >= floor * (1 - 1e-12)).all()
        spreads.append(float(moved.mean()))
    assert spreads[0] > 2 * float(floor.mean())
    assert all(after <= before for before, after in itertools.pairwise(spreads))
    assert spreads[-1] == pytest.approx(float(floor.mean()), rel=0.01)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_common_training_utilities_work(embedding, tmp_path):
    options = {"data_shape": (1, 4, 4), "embedding": embedding, "inverse_lipschitz": (0.7, 0.3)}
    decoder, z = il.BrenierDecoder(3, None, ((8, 5), (9,)), **options), torch.randn(4, 3)
    values = decoder(z).detach()
    (1e6 * decoder(z).square().sum()).backward()
    torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
    assert float(torch.nn.utils.get_total_norm([p.grad for p in decoder.parameters()])) == pytest.approx(1, rel=1e-4)
    safetensors.torch.save_model(decoder, str(tmp_path / "model"))
    other = il.BrenierDecoder(3, None, ((8, 5), (9,)), **options)
    safetensors.torch.load_model(other, str(tmp_path / "model"))
    assert torch.equal(other(z), values)
    average = torch.optim.swa_utils.AveragedModel(decoder)
    average.update_parameters(other)
    average.update_parameters(other)
    torch.testing.assert_close(average(z), values)
    bound = decoder.inverse_lipschitz_bound()
    decoder.half().float()
    assert torch.equal(torch.stack(decoder.inverse_lipschitz), torch.tensor([[0.7], [0.3]]))
    torch.testing.assert_close(decoder(z), values, rtol=0.02, atol=0.02)
    torch.testing.assert_close(decoder.inverse_lipschitz_bound(), bound, rtol=1e-2, atol=0)


@pytest.mark.parametrize("embedding", ["orthogonal", "identity", "full_rank"])
@pytest.mark.parametrize("shape", [(), (4,), (3, 4)])
def test_the_bound_of_a_cotangent_is_certified_and_exact_for_an_affine_first_map(embedding, shape):
    decoder = il.BrenierDecoder(2, 5, inverse_lipschitz=(0.7, 0.3), embedding=embedding).double()
    z, v = torch.randn(*shape, 2, dtype=torch.float64), torch.randn(*shape, 5, dtype=torch.float64)
    length = (decoder.jacobian(z).mT @ v.unsqueeze(-1)).squeeze(-1).norm(dim=-1)
    bound = decoder.cotangent_bound(z, v)
    assert bound.shape == torch.Size(shape)
    assert not bound.requires_grad
    assert (bound <= length * (1 + 1e-12)).all()
    assert (bound > 0).all()
    flat = il.BrenierDecoder(2, 5, ((8,), (8,)), inverse_lipschitz=(0.7, 0.3), embedding=embedding).double()
    for parameter in flat.latent_map.parameters():
        torch.nn.init.zeros_(parameter)  # the first map is then L1 z
    exact = (flat.jacobian(z).mT @ v.unsqueeze(-1)).squeeze(-1).norm(dim=-1)
    assert torch.allclose(flat.cotangent_bound(z, v), exact, rtol=1e-12)
