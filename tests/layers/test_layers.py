"""BrenierMap as a module: state, constants, dtypes, copies, methods, refusals."""

import copy
import io
import pickle

import pytest
import torch

import ilvae_fast as il


def _layer(**options):
    return il.BrenierMap(5, (8, 7), dtype=torch.float64, **options)


def test_the_state_has_the_documented_names_and_shapes():
    shapes = {name: tuple(t.shape) for name, t in _layer().state_dict().items()}
    assert shapes == {
        "skip_weight": (16, 5),
        "bias": (16,),
        "raw_weights.0": (7, 8),
        "raw_weights.1": (1, 7),
        "inverse_lipschitz": (1,),
        "_extra_state": (9,),
    }
    trained = _layer(inverse_lipschitz=il.Trained(2.0)).state_dict()
    assert trained["raw_inverse_lipschitz"].shape == (1,)
    assert "inverse_lipschitz" not in trained


def test_methods_agree_with_each_other():
    layer, x, v = _layer(), torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    phi, t = layer.potential_and_map(x)
    torch.testing.assert_close(layer(x), t)
    torch.testing.assert_close(layer.potential(x), phi)
    torch.testing.assert_close(layer.jvp(x, v)[0], t)
    jacobian = layer.jacobian(x)
    assert jacobian.shape == (2, 3, 5, 5)
    torch.testing.assert_close((jacobian @ v[..., None])[..., 0], layer.jvp(x, v)[1])
    with il.use_backend("reference"):
        torch.testing.assert_close(layer(x), t)
        torch.testing.assert_close(layer.jacobian(x), jacobian)


def test_the_jacobian_is_differentiable():
    layer = _layer()
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(layer.jacobian(x).square().sum(), x)
    with il.use_backend("reference"):
        (theirs,) = torch.autograd.grad(layer.jacobian(x).square().sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_a_constant_is_filled_in_place():
    layer = _layer(inverse_lipschitz=0.5)
    buffer = layer.inverse_lipschitz
    x = torch.randn(4, 5, dtype=torch.float64)
    before = layer(x)
    layer.inverse_lipschitz = 2.0
    assert layer.inverse_lipschitz is buffer
    torch.testing.assert_close(layer(x) - before, 1.5 * x)
    layer.inverse_lipschitz = torch.tensor(0.25)
    assert buffer.item() == 0.25


def test_a_constant_given_as_a_tensor_is_copied():
    constant = torch.tensor([0.75])
    layer = _layer(inverse_lipschitz=constant)
    constant.fill_(3.0)
    assert layer.inverse_lipschitz.item() == 0.75


def test_a_trained_constant_stays_non_negative_and_learns():
    layer = _layer(inverse_lipschitz=il.Trained(0.5))
    assert layer.inverse_lipschitz.item() == pytest.approx(0.5, rel=1e-12)
    x = torch.randn(64, 5, dtype=torch.float64)
    optimiser = torch.optim.SGD([layer.raw_inverse_lipschitz], lr=0.05)
    for _ in range(50):
        optimiser.zero_grad()
        layer(x).square().sum(-1).mean().backward()  # pushes the constant towards zero
        optimiser.step()
    assert 0 <= layer.inverse_lipschitz.item() < 0.4
    layer.inverse_lipschitz = 1.5
    assert layer.inverse_lipschitz.item() == pytest.approx(1.5)


@pytest.mark.parametrize("constant", [1 / 3, il.Trained(1 / 3)])
def test_the_constant_is_never_rounded_to_a_low_dtype(constant):
    layer = il.BrenierMap(5, (4,), inverse_lipschitz=constant)
    exact = layer.inverse_lipschitz.item()
    layer.bfloat16()
    assert layer.skip_weight.dtype == torch.bfloat16
    assert layer.inverse_lipschitz.dtype == torch.float32
    assert layer.inverse_lipschitz.item() == exact
    assert layer(torch.randn(2, 5).bfloat16()).dtype == torch.bfloat16
    layer.double()
    assert layer.inverse_lipschitz.dtype == torch.float64
    layer.to(torch.float32)
    assert layer(torch.randn(2, 5)).dtype == torch.float32
    assert il.BrenierMap(5, (4,), dtype=torch.bfloat16).inverse_lipschitz.dtype == torch.float32


def test_a_trained_constant_keeps_its_gradient_in_a_low_dtype():
    layer = il.BrenierMap(5, (4,), inverse_lipschitz=il.Trained(0.5))
    layer(torch.randn(3, 5)).square().sum().backward()
    exact = layer.raw_inverse_lipschitz.grad.clone()
    layer.bfloat16()
    assert torch.equal(layer.raw_inverse_lipschitz.grad, exact)
    torch.optim.Adam(layer.parameters()).step()
    assert layer.double().raw_inverse_lipschitz.grad.dtype == torch.float64


@pytest.mark.parametrize("constant", [0.7, il.Trained(0.7)])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict", "torch.save"])
def test_copies_compute_the_same(constant, way):
    layer, x = _layer(inverse_lipschitz=constant), torch.randn(3, 5, dtype=torch.float64)
    if way == "deepcopy":
        copied = copy.deepcopy(layer)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(layer))
    elif way == "state_dict":
        copied = _layer(inverse_lipschitz=il.Trained(9.0) if isinstance(constant, il.Trained) else 9.0)
        copied.load_state_dict(layer.state_dict())
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    torch.testing.assert_close(copied(x), layer(x), rtol=0, atol=0)
    with torch.no_grad():
        copied.skip_weight.add_(1)
    assert not torch.equal(copied(x), layer(x))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_meta_device_and_to_empty(backend):
    layer = il.BrenierMap(5, (4,), device="meta")
    with il.use_backend(backend):
        assert layer(torch.randn(3, 5, device="meta")).shape == (3, 5)
    assert "meta" in repr(layer)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(torch.randn(3, 5)).isfinite().all()


@pytest.mark.parametrize("constant", [0.7, il.Trained(0.7)])
def test_the_constant_survives_the_meta_device(constant):
    with torch.device("meta"):
        layers = [il.BrenierMap(5, (4,), inverse_lipschitz=constant) for _ in range(3)]
    layers[1].inverse_lipschitz = 0.3
    layers[2].inverse_lipschitz = torch.tensor([0.2])
    layers.append(il.BrenierMap(5, (4,), inverse_lipschitz=constant).to("meta"))
    for layer, wanted in zip(layers, (0.7, 0.3, 0.2, 0.7), strict=True):
        with torch.no_grad():
            layer.to_empty(device="cpu").reset_parameters()
        assert layer.inverse_lipschitz.item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("constant", [0.7, il.Trained(0.7)])
@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_state_is_adopted(constant, device, dtype):
    source = il.BrenierMap(5, (4,), inverse_lipschitz=constant).to(dtype)
    state = source.state_dict()
    layer = il.BrenierMap(5, (4,), device=device, inverse_lipschitz=il.Trained(9.0) if source.trained else 9.0)
    layer.load_state_dict(state, assign=True)
    x = torch.randn(3, 5, dtype=dtype)
    assert torch.equal(layer(x), source(x))
    for name, value in layer.state_dict().items():
        assert value.dtype == state[name].dtype
        if name == "_extra_state":  # each state has its own
            continue
        assert value.data_ptr() == state[name].data_ptr(), name


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("constant", [0.7, il.Trained(0.7)])
def test_a_state_in_a_low_dtype_leaves_the_constant_in_float32(constant, assign):
    layer = il.BrenierMap(5, (4,), inverse_lipschitz=constant)
    state = {name: value.bfloat16() for name, value in layer.state_dict().items()}
    layer.load_state_dict(state, assign=assign)
    assert layer.inverse_lipschitz.dtype == torch.float32
    dtype = torch.bfloat16 if assign else torch.float32
    assert layer(torch.randn(2, 5, dtype=dtype)).dtype == dtype


def test_a_parametrised_constant_moves_and_is_not_assigned_to():
    class Square(torch.nn.Module):
        def forward(self, a):
            return a * a

    layer = il.BrenierMap(5, (4,), inverse_lipschitz=il.Trained(0.7))
    torch.nn.utils.parametrize.register_parametrization(layer, "raw_inverse_lipschitz", Square())
    expected = layer.inverse_lipschitz.double()
    layer.cpu().double()
    torch.testing.assert_close(layer.inverse_lipschitz, expected, rtol=1e-6, atol=0)
    assert layer(torch.randn(2, 5, dtype=torch.float64)).isfinite().all()
    with pytest.raises(ValueError, match="raw_inverse_lipschitz is parametrised"):
        layer.inverse_lipschitz = 0.4


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_compiled_regions_refuse_a_bad_constant_too(bad):
    layer, x = il.BrenierMap(5, (4,)), torch.randn(2, 5)

    @torch.compile(backend="eager")
    def fill(value):
        layer.inverse_lipschitz = value
        return layer(x)

    for value in (0.5, 0.7, 2.0):
        torch.testing.assert_close(fill(value), layer(x))
        assert layer.inverse_lipschitz.item() == pytest.approx(value)
    with pytest.raises(RuntimeError, match="inverse_lipschitz: wanted a finite number >= 0"):
        fill(bad)
    assert layer.inverse_lipschitz.item() == 2.0


@pytest.mark.parametrize("constant", [1.0, il.Trained(1.0)], ids=["constant", "trained"])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_compiled_region_has_one_graph_for_all_constants(constant, kind):
    layer, x = il.BrenierMap(5, (4,), inverse_lipschitz=constant), torch.randn(2, 5)
    compiled = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=compiled, fullgraph=True)
    def fill(value):
        layer.inverse_lipschitz = value
        return layer(x)

    for value in (0.5, 0.7, 2.0, 1.0, 0.25, 3.0):
        torch.testing.assert_close(fill(kind(value)), layer(x))
        assert layer.inverse_lipschitz.item() == pytest.approx(value)
    assert compiled.frame_count <= 2  # the first float is a constant; the second makes all floats variables
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(RuntimeError, match="inverse_lipschitz: wanted a finite number >"):
            fill(kind(bad))
        assert torch.is_grad_enabled()
        assert layer.inverse_lipschitz.item() == pytest.approx(3.0)


def test_a_compiled_function_has_one_graph_for_all_constants():
    layer, x = il.BrenierMap(5, (4,)), torch.randn(2, 5)
    arguments = (layer.skip_weight, layer.bias, layer.nonneg_weights())
    options = {"activations": ("softplus", "identity")}
    compiled = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=compiled, fullgraph=True)
    def function(value):
        return il.functional.brenier_map(x, *arguments, inverse_lipschitz=value, **options)

    for value in (0.5, 0.7, 2.0, 1.0, 0.0):
        expected = il.functional.brenier_map(x, *arguments, inverse_lipschitz=value, **options)
        torch.testing.assert_close(function(value), expected)
    assert compiled.frame_count <= 2
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(RuntimeError, match="inverse_lipschitz: wanted a finite number >= 0"):
            function(bad)


@pytest.mark.parametrize("constant", [0.5, il.Trained(0.5)], ids=["constant", "trained"])
def test_a_replica_of_data_parallel_has_a_constant_of_its_own(constant):
    layer, x = il.BrenierMap(3, (4,), inverse_lipschitz=constant, dtype=torch.float64), torch.randn(2, 3).double()
    before = layer(x)
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer._parameters.items():  # as torch.nn.parallel.replicate does, on one device
        setattr(replica, name, parameter.view_as(parameter))
    torch.testing.assert_close(replica(x), before)
    replica.inverse_lipschitz = 0.75
    torch.testing.assert_close(replica(x), before + 0.25 * x)
    torch.testing.assert_close(layer(x), before)
    assert layer.inverse_lipschitz.item() == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_with_a_bad_constant_is_refused(bad, assign):
    layer = il.BrenierMap(3, (4,), inverse_lipschitz=0.5)
    state = {**layer.state_dict(), "inverse_lipschitz": torch.tensor([bad])}
    with pytest.raises(RuntimeError, match=r"inverse_lipschitz: got (-1\.0|nan|inf), wanted a finite number >= 0"):
        layer.load_state_dict(state, assign=assign)
    assert layer.inverse_lipschitz.item() == 0.5
    trained = il.BrenierMap(3, (4,), inverse_lipschitz=il.Trained(0.5))
    state = {**trained.state_dict(), "raw_inverse_lipschitz": torch.tensor([float("nan")])}
    with pytest.raises(RuntimeError, match="raw_inverse_lipschitz: got nan, wanted a finite number"):
        trained.load_state_dict(state, assign=assign)
    assert trained.inverse_lipschitz.item() == pytest.approx(0.5)


def test_inputs_that_are_not_dense_are_refused():
    layer = il.BrenierMap(3, (4,))
    nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)])
    jagged = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged)
    for value, kind in (
        (nested, "a nested"), (jagged, "a nested"), (torch.eye(3).to_sparse(), r"a torch\.sparse_coo"),
        (torch.eye(3).to_sparse_csr(), r"a torch\.sparse_csr"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=f"^x: got {kind} tensor, wanted a dense one"):
            layer(value)
    quantised = torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)
    with pytest.raises(ValueError, match=r"^x: got dtype torch\.qint8, wanted torch\.float32"):
        layer(quantised)


def test_a_tangent_of_another_dtype_is_refused():
    layer, x = il.BrenierMap(3, (4,)), torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"^v: got dtype torch.float64, wanted that of x, torch.float32"):
        layer.jvp(x, x.double())


def test_projected_weights_are_non_negative():
    layer = il.BrenierMap(3, (16, 8), nonneg="none", inverse_lipschitz=0.5, dtype=torch.float64)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.05)
    x = torch.randn(64, 3, dtype=torch.float64)
    for _ in range(20):
        optimiser.zero_grad()
        layer(x).square().sum(-1).mean().backward()
        optimiser.step()
    assert any((w < 0).any() for w in layer.nonneg_weights())
    with pytest.raises(ValueError, match=r"nonneg_weights\[\d\]: got a smallest value of -.*layer\.project_\(\)"):
        layer.inverse(x)
    before = [w.detach().clone() for w in layer.nonneg_weights()]
    layer.project_()
    for a, b in zip(layer.nonneg_weights(), before, strict=True):
        assert torch.equal(a, b.clamp(min=0))
    y = layer(x).detach()
    error = torch.linalg.vector_norm(layer(layer.inverse(y)) - y, dim=-1)
    assert (error <= 1e-9 * (1 + torch.linalg.vector_norm(y, dim=-1))).all()
    decoder = il.BrenierDecoder(2, 4, ((4,), (4,)), nonneg="none")
    with torch.no_grad():
        for parameter in (*decoder.latent_map.raw_weights, *decoder.data_map.raw_weights):
            parameter.neg_()
    decoder.project_()
    assert all((w == 0).all() for m in (decoder.latent_map, decoder.data_map) for w in m.nonneg_weights())


@pytest.mark.parametrize("dim", [1, None])
def test_weight_norm_of_the_skip_weight(dim):
    layer, x = il.BrenierMap(3, (4,)), torch.randn(2, 3)
    before = layer(x).detach()
    torch.nn.utils.parametrizations.weight_norm(layer, "skip_weight", dim=dim)
    torch.testing.assert_close(layer(x), before)
    layer(x).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_one_dimension_and_eight_layers():
    layer = il.BrenierMap(1, (3, 1, 7, 2, 5, 4, 1, 6), dtype=torch.float64)
    x = torch.linspace(-3, 3, 101, dtype=torch.float64)[:, None]
    assert (layer(x).diff(dim=0) >= 6 / 100 * (1 - 1e-10)).all()


def test_repr_says_what_it_is():
    text = repr(il.BrenierMap(5, (8, 7), first_activation="squared_leaky_relu", inverse_lipschitz=0.5))
    assert "5, hidden_features=(8, 7)" in text
    assert "squared_leaky_relu" in text
    assert "inverse_lipschitz=0.5" in text


def test_training_with_an_ordinary_optimiser():
    torch.manual_seed(0)
    layer = il.BrenierMap(2, (32, 32), inverse_lipschitz=0.1)
    x = torch.randn(256, 2)
    target = x @ torch.tensor([[2.0, 0.5], [0.5, 1.0]]) + 1  # the gradient of a convex quadratic
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.01)
    losses = []
    for _ in range(300):
        optimiser.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((0,), {}, ValueError, "in_features: got 0, wanted at least 1"),
        ((2.5,), {}, TypeError, "in_features: got float 2.5"),
        ((5, ()), {}, ValueError, r"hidden_features: got \(\), wanted"),
        ((5, 64), {}, ValueError, "hidden_features: got 64"),
        ((5, (4, 0)), {}, ValueError, r"hidden_features\[1\]: got 0"),
        ((5, (2,) * 56), {}, ValueError, r"hidden_features: got .*, wanted a sequence of 1 to 55 widths"),
        ((5, (4,)), {"activation": "celuu"}, ValueError, "activation: got 'celuu'.*nearest: 'celu'"),
        ((5, (4, 4)), {"activation": "squared_leaky_relu"}, ValueError, "non-decreasing"),
        ((5, (4,)), {"output_activation": "squared_leaky_relu"}, ValueError, "non-decreasing"),
        ((5, (4,)), {"nonneg": "sofplus"}, ValueError, "nonneg: got 'sofplus'"),
        ((5, (4,)), {"inverse_lipschitz": -1.0}, ValueError, "inverse_lipschitz: got -1.0"),
        ((5, (4,)), {"inverse_lipschitz": torch.ones(2)}, ValueError, r"inverse_lipschitz: got shape \(2,\)"),
        ((5, (4,)), {"inverse_lipschitz": torch.tensor(float("nan"))}, ValueError, "inverse_lipschitz: got nan"),
        ((5, (4,)), {"route": "quick"}, ValueError, "route: got 'quick'"),
        ((5, (4,)), {"dtype": torch.int64}, ValueError, "dtype: got torch.int64"),
    ],
)
def test_refusals(arguments, options, error, words):
    with pytest.raises(error, match=words):
        il.BrenierMap(*arguments, **options)


def test_refusals_of_the_setter():
    layer = _layer(inverse_lipschitz=0.5)
    for value in (-1.0, float("nan"), float("inf"), "1", None):
        with pytest.raises((ValueError, TypeError), match="inverse_lipschitz: got"):
            layer.inverse_lipschitz = value
        if isinstance(value, float):
            with pytest.raises(ValueError, match="inverse_lipschitz: got"):
                layer.inverse_lipschitz = torch.tensor(value)
    assert layer.inverse_lipschitz.item() == 0.5
    trained = _layer(inverse_lipschitz=il.Trained(0.5))
    with pytest.raises(ValueError, match=r"inverse_lipschitz: got 0\.0, wanted a number > 0 for a trained constant"):
        trained.inverse_lipschitz = 0.0
    assert trained.inverse_lipschitz.item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"il\.Trained: got initial 0"):
        il.Trained(0.0)


def test_validate_finds_what_a_training_step_broke():
    layer = _layer(validate=True)
    x = torch.randn(3, 5, dtype=torch.float64)
    layer(x)
    with torch.no_grad():
        layer.bias[3] = float("nan")
    with pytest.raises(ValueError, match="bias: got 1 non-finite of 16 values"):
        layer(x)


def test_the_largest_number_of_layers():
    layer = il.BrenierMap(2, (2,) * 55, dtype=torch.float64)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    variables = [x, *layer.parameters()]

    def second(x):
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), variables)

    ours = second(x)
    with il.use_backend("reference"):
        torch.testing.assert_close(ours, second(x))
    weights = [torch.ones(2, 2, dtype=torch.float64)] * 55 + [torch.ones(1, 2, dtype=torch.float64)]
    skip_weight = torch.ones(113, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="weights: got 56, wanted at most 55 hidden layers"):
        il.functional.brenier_map(x, skip_weight, skip_weight[:, 0], weights, activations=["softplus"] * 57)
