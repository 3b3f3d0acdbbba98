"""The inverse of a Brenier map and the determinant of its derivative."""

import pytest
import torch

import ilvae_fast as il
from ilvae_fast.layers import inversion, minimiser

ACTIVATIONS = ["softplus", "celu", "smooth_leaky_relu", il.Activation("softplus", 20.0), il.Activation("celu", 0.05)]


def _layer(d=4, hidden=(9, 7), scale=1.0, seed=0, **options):
    torch.manual_seed(seed)
    layer = il.BrenierMap(d, hidden, **{"dtype": torch.float64, **options})
    with torch.no_grad():
        layer.skip_weight.mul_(scale)
    return layer


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("constant", [1e-2, 1.0, 30.0])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_inverse_undoes_the_map(activation, constant, scale):
    layer = _layer(activation=activation, inverse_lipschitz=constant, scale=scale)
    x = 3 * torch.randn(2, 50, 4, dtype=torch.float64)
    y = layer(x)
    error = torch.linalg.vector_norm(layer.inverse(y) - x, dim=-1)
    bound = inversion.RESIDUAL * (1 + torch.linalg.vector_norm(y, dim=-1)) / constant
    assert (error <= bound + 1e-13).all()


@pytest.mark.parametrize("hidden", [(3,), (64, 64, 64, 64)])
@pytest.mark.parametrize("d", [1, 2, 40])
def test_every_shape(d, hidden):
    layer = _layer(d, hidden, inverse_lipschitz=0.1)
    y = torch.randn(5, d, dtype=torch.float64)
    torch.testing.assert_close(layer(layer.inverse(y)), y, rtol=0, atol=1e-8)
    assert layer.inverse(y[0]).shape == (d,)
    assert layer.inverse(y[:0]).shape == (0, d)


def test_first_activation_squared_and_an_output_activation():
    layer = _layer(first_activation="squared_leaky_relu", output_activation="softplus", scale=3.0)
    x = torch.randn(200, 4, dtype=torch.float64)
    torch.testing.assert_close(layer.inverse(layer(x)), x, rtol=0, atol=1e-8)


@pytest.mark.parametrize("where", ["activation", "first_activation", "output_activation"])
@pytest.mark.parametrize("kinked", ["leaky_relu", "relu"])
@pytest.mark.parametrize("method", ["inverse", "logabsdet"])
def test_maps_with_kinks_are_refused(where, kinked, method):
    with pytest.raises(ValueError, match=rf"^{where}: got '{kinked}', wanted one without a kink, such as 'softplus'"):
        getattr(_layer(**{where: kinked}), method)(torch.zeros(4, dtype=torch.float64))


def test_far_away_and_bad_values():
    layer = _layer(inverse_lipschitz=1e-3)
    y = torch.tensor([[1e6, -1e6, 0.0, 1e-6]], dtype=torch.float64)
    torch.testing.assert_close(layer(layer.inverse(y)), y, rtol=1e-9, atol=1e-3)
    with pytest.raises(ValueError, match="y: got 4 non-finite of 8 values"):
        layer.inverse(torch.tensor([[float("nan")] * 4, [0.0] * 4], dtype=torch.float64))


@pytest.mark.parametrize("size", [1e15, 1e25, 1e100])
def test_beyond_single_precision(size):
    layer = _layer(inverse_lipschitz=0.5)
    y = torch.tensor([[size, 1.0, 0.0, -2.0], [0.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
    y_again = layer(layer.inverse(y))
    assert (torch.linalg.vector_norm(y_again - y, dim=-1) <= 1e-10 * (1 + torch.linalg.vector_norm(y, dim=-1))).all()


METHODS = {
    "all": {},
    "float64 alone": {"_SINGLE_STEPS": 0},
    "Newton's, by factors": {"_SINGLE_STEPS": 0, "_DOUBLE_STEPS": 0},
    "Newton's, by products": {"_SINGLE_STEPS": 0, "_DOUBLE_STEPS": 0, "_WIDEST": 0},
    "few rows at a time": {"_BLOCK": 21, "_TANGENTS": 100},
}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_arrives_alone(monkeypatch, method):
    """The last two find what the first leave: badly conditioned rows."""
    for name, value in METHODS[method].items():
        monkeypatch.setattr(minimiser, name, value)
    layer = _layer(6, (40, 30), inverse_lipschitz=1e-3, scale=6.0, activation=il.Activation("softplus", 20.0))
    x = 2 * torch.randn(50, 6, dtype=torch.float64)
    y = layer(x).detach()
    bound = inversion.RESIDUAL * (1 + torch.linalg.vector_norm(y, dim=-1))
    assert (torch.linalg.vector_norm(layer(layer.inverse(y)) - y, dim=-1) <= 1.001 * bound).all()


def test_rows_do_not_depend_on_each_other():
    """A row that is hard to find, or has no x, leaves others as they are, but for the order of sums."""
    layer = _layer(inverse_lipschitz=0.1, scale=5.0)
    y = layer(torch.randn(40, 4, dtype=torch.float64)).detach()
    together = layer.inverse(torch.cat([y, 1e5 * y]))[:40]
    torch.testing.assert_close(together, layer.inverse(y), rtol=0, atol=2e-8)


def test_a_start_near_by_spares_steps(monkeypatch):
    layer = _layer(8, (32, 32), inverse_lipschitz=0.1)
    x = torch.randn(30, 8, dtype=torch.float64)
    y = layer(x).detach()
    maps, count = minimiser.dispatch.potential_and_map, []

    def counted(*arguments):
        count.append(1)
        return maps(*arguments)

    monkeypatch.setattr(minimiser.dispatch, "potential_and_map", counted)

    def steps(**options):
        count.clear()
        torch.testing.assert_close(layer.inverse(y, **options), x, rtol=0, atol=1e-7)
        return len(count)

    cold, warm = steps(), steps(initial=x + 1e-6)
    assert warm < cold / 2, (warm, cold)
    assert steps(tolerance=1e-8) < cold
    gradient = torch.autograd.grad(layer.inverse(y.requires_grad_(), initial=x.requires_grad_()).sum(), [y])
    assert gradient[0].abs().sum() > 0


def test_the_tolerance_is_met_and_not_more():
    layer = _layer(8, (32, 32), inverse_lipschitz=0.1)
    y = layer(torch.randn(64, 8, dtype=torch.float64)).detach()
    scale = 1 + torch.linalg.vector_norm(y, dim=-1)
    for tolerance in (1e-3, 1e-6, 1e-12):
        error = (torch.linalg.vector_norm(layer(layer.inverse(y, tolerance=tolerance)) - y, dim=-1) / scale).max()
        assert 1e-4 * tolerance < error <= 1.001 * tolerance


def test_bad_arguments_of_the_inverse():
    layer = _layer()
    y = torch.zeros(3, 4, dtype=torch.float64)
    for tolerance in (0.0, -1.0, float("nan"), float("inf"), True, "1"):
        with pytest.raises(ValueError, match=r"^tolerance: got .*, wanted a number > 0"):
            layer.inverse(y, tolerance=tolerance)
    with pytest.raises(ValueError, match=r"^initial: got shape \(4,\), wanted that of y, \(3, 4\)"):
        layer.inverse(y, initial=y[0])
    with pytest.raises(ValueError, match=r"^initial: got dtype torch.float32, wanted that of y, torch.float64"):
        layer.inverse(y, initial=y.float())
    with pytest.raises(ValueError, match=r"^initial: got 12 non-finite"):
        layer.inverse(y, initial=y + float("nan"))


def test_no_inverse_is_an_error():
    layer = _layer(inverse_lipschitz=0.0)  # its values are bounded: the gradient of a convex function of finite slope
    with pytest.raises(RuntimeError, match=r"y: found no x with T\(x\) = y for 1 of 1 rows"):
        layer.inverse(torch.full((1, 4), 1e4, dtype=torch.float64))


def test_float32_and_autocast():
    layer = _layer(dtype=torch.float32, inverse_lipschitz=0.3)
    x = torch.randn(30, 4)
    torch.testing.assert_close(layer.inverse(layer(x)), x, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the map is rounded, its inverse is computed in float32
        y = layer(x)
        back = layer.inverse(y.float())
    torch.testing.assert_close(layer(back), y.float(), rtol=1e-5, atol=1e-5)
    assert back.dtype == torch.float32


def test_the_inverse_is_lipschitz():
    layer = _layer(inverse_lipschitz=0.2, scale=5.0)
    a, b = torch.randn(2, 100, 4, dtype=torch.float64)
    distance = torch.linalg.vector_norm(layer.inverse(a) - layer.inverse(b), dim=-1)
    assert (distance <= torch.linalg.vector_norm(a - b, dim=-1) / 0.2 + 1e-9).all()


def test_gradients_of_the_inverse():
    layer = _layer(3, (5, 4), inverse_lipschitz=il.Trained(0.4))
    y = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def inverse(y, *parameters):
        bound = {f"layer.{n}": p for n, p in zip(names, parameters, strict=True)}
        return torch.func.functional_call(_Inverse(layer), bound, (y,))

    assert torch.autograd.gradcheck(inverse, (y, *values), eps=1e-5, atol=1e-6)


class _Inverse(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, y):
        return self.layer.inverse(y, tolerance=1e-13)  # numerical derivatives divide its error by a small step


def _small(constant=0.4):
    """A layer whose inverse bends, and its inverse as a function of y and all parameters."""
    layer = _layer(2, (3, 2), scale=2.0, inverse_lipschitz=il.Trained(constant))
    names, values = zip(*layer.named_parameters(), strict=True)

    def inverse(y, *parameters):
        bound = {f"layer.{n}": p for n, p in zip(names, parameters, strict=True)}
        return torch.func.functional_call(_Inverse(layer), bound, (y,))

    return layer, inverse, (torch.randn(2, 2, dtype=torch.float64, requires_grad=True), *values)


def test_second_derivatives_of_the_inverse():
    _, inverse, arguments = _small()
    assert torch.autograd.gradgradcheck(inverse, arguments, eps=1e-5, atol=1e-6)


def _newton(layer, y):
    """The inverse by Newton steps in plain autograd, from the solution. k steps are right to order 2^k - 1."""
    x = layer.inverse(y).detach()
    for _ in range(2):
        jacobian = torch.func.vmap(torch.func.jacrev(layer))(x)
        x = x - torch.linalg.solve(jacobian, layer(x) - y)
    return x


@pytest.mark.parametrize("order", [1, 2, 3])
def test_derivatives_of_the_inverse_are_those_of_newton_steps(order):
    layer, _, (y, *parameters) = _small()

    def derivative(x):
        value = x.pow(3).sum()
        for _ in range(order):
            gradients = torch.autograd.grad(value, [y, *parameters], create_graph=True)
            value = sum(g.square().sum() for g in gradients)
        return gradients

    ours = derivative(layer.inverse(y))
    with il.use_backend("reference"):
        expected = derivative(_newton(layer, y))
    for a, b in zip(ours, expected, strict=True):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8 * (1 + float(b.abs().max())))


@pytest.mark.parametrize("wanted", ["y", "skip_weight", "bias", "raw_weights.0"])
def test_second_derivatives_of_one_argument_alone(wanted):
    layer, _, (y, *_) = _small()
    layer.requires_grad_(False)
    variable = dict(layer.named_parameters(), y=y)[wanted]
    y.requires_grad_(wanted == "y")
    variable.requires_grad_()

    def second(x):
        (first,) = torch.autograd.grad(x.pow(3).sum(), variable, create_graph=True)
        return torch.autograd.grad(first.square().sum(), variable)[0]

    torch.testing.assert_close(second(layer.inverse(y)), second(_newton(layer, y)), rtol=1e-7, atol=1e-8)


def test_both_backends_agree():
    layer, y = _layer(), torch.randn(7, 4, dtype=torch.float64)
    ours = layer.inverse(y)
    with il.use_backend("reference"):
        torch.testing.assert_close(layer.inverse(y), ours, rtol=0, atol=1e-9)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"y: got shape \(2, 3\), wanted \(\.\.\., 4\), in_features values"):
        _layer().inverse(torch.zeros(2, 3, dtype=torch.float64))


def test_the_determinant():
    layer = _layer(inverse_lipschitz=0.5, scale=3.0)
    x = torch.randn(2, 8, 4, dtype=torch.float64)
    expected = torch.linalg.eigvalsh(layer.jacobian(x)).log().sum(-1)
    torch.testing.assert_close(layer.logabsdet(x), expected)
    assert (layer.logabsdet(x) >= 4 * torch.tensor(0.5).log() - 1e-12).all()
    flat = torch.zeros(4, dtype=torch.float64)
    assert _layer(inverse_lipschitz=0.0, activation="identity").logabsdet(flat) == -torch.inf


def test_the_determinant_is_differentiable():
    layer = _layer(3, (5, 4))
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer.logabsdet, x)
    inputs = (x, *layer.parameters())
    ours = torch.autograd.grad(layer.logabsdet(x).sum(), inputs)
    with il.use_backend("reference"):
        theirs = torch.autograd.grad(layer.logabsdet(x).sum(), inputs)
    torch.testing.assert_close(ours, theirs)


def test_a_density_integrates_to_one():
    # p(y) = N(T^{-1}(y)) / |det dT/dx|: what flows use the pair for
    layer = _layer(1, (6, 5), inverse_lipschitz=0.3, scale=4.0)
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64).unsqueeze(-1)
    y = layer(x).detach()
    grid = torch.linspace(y.min().item(), y.max().item(), 20001, dtype=torch.float64).unsqueeze(-1)
    back = layer.inverse(grid)
    density = (-0.5 * back.square().sum(-1) - layer.logabsdet(back)).exp() / (2 * torch.pi) ** 0.5
    assert torch.trapezoid(density, grid.squeeze(-1)).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("trained", [False, True])
def test_the_result_may_be_changed_in_place(trained):
    layer = _layer(3, (5,)).requires_grad_(trained)
    y = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad((10 * layer.inverse(y)).sum(), y)
    torch.testing.assert_close(torch.autograd.grad(layer.inverse(y).mul_(10).sum(), y)[0], wanted)


def test_the_gradient_uses_the_parameters_of_the_forward_pass():
    layer = _layer(3, (5,))
    y = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(layer.inverse(y).sum(), y)
    x = layer.inverse(y)
    layer.inverse_lipschitz = 1.7
    torch.testing.assert_close(torch.autograd.grad(x.sum(), y)[0], wanted)
