"""The compiled activations, their first and second derivatives, against extended precision and torch's autograd."""

import numpy as np
import pytest
import torch

import ilvae_fast as il
from ilvae_fast import functional
from ilvae_fast.operators import activations
from ilvae_fast.operators.activations import encode

ALL = [
    il.Activation("softplus"),
    il.Activation("softplus", 5.0),
    il.Activation("softplus", 0.1),
    il.Activation("leaky_relu", 0.2),
    il.Activation("leaky_relu", 0.0),
    il.Activation("leaky_relu", 1.0),
    il.Activation("relu"),
    il.Activation("celu"),
    il.Activation("celu", 0.3),
    il.Activation("smooth_leaky_relu", 0.2),
    il.Activation("identity"),
    il.Activation("squared_leaky_relu", 0.2),
]
GRID = torch.cat(
    [
        torch.linspace(-12, 12, 4801, dtype=torch.float64),
        torch.logspace(-12, 2.8, 500, dtype=torch.float64),
        -torch.logspace(-12, 2.8, 500, dtype=torch.float64),
        torch.zeros(1, dtype=torch.float64),
    ]
)


def _native(activation, a):
    """s, s' and s'' as the operators compute them: a one-unit network with unit weights."""
    x = a.reshape(-1, 1)
    weights = [torch.ones(1, 1, dtype=a.dtype)]
    skip, bias = torch.tensor([[1.0], [0.0]], dtype=a.dtype), torch.zeros(2, dtype=a.dtype)
    options = {"activations": (activation, "identity"), "inverse_lipschitz": 0.0}
    value, first = functional.potential_and_map(x, skip, bias, weights, **options)
    second = functional.brenier_map_vjp(
        x, skip, bias, weights, **options, map_cotangent=torch.ones_like(x), wrt=("x",)
    ).x
    return value, first[:, 0], second[:, 0]


def _exact(activation, a):
    """s, s', s'' and the size of the terms of s, in extended precision; at kinks with autograd's conventions."""
    a = a.numpy().astype(np.longdouble)
    p = np.longdouble(activation.parameter)
    one, zero = np.ones_like(a), np.zeros_like(a)

    def softplus(beta):
        e = np.exp(-np.abs(beta * a))
        value = np.maximum(a, 0) + np.log1p(e) / beta
        return value, np.where(a < 0, e, 1) / (1 + e), beta * e / (1 + e) ** 2

    if activation.name == "softplus":
        value, first, second = softplus(p)
        return value, first, second, value
    if activation.name == "smooth_leaky_relu":
        value, first, second = softplus(one)
        return p * a + (1 - p) * value, p + (1 - p) * first, (1 - p) * second, np.abs(p * a) + value
    if activation.name == "celu":
        negative = np.minimum(a, 0) / p
        value = np.where(a > 0, a, p * np.expm1(negative))
        return value, np.where(a > 0, 1, np.exp(negative)), np.where(a < 0, np.exp(negative) / p, 0), np.abs(value)
    slope = {"identity": one, "relu": zero}.get(activation.name, p)
    c = np.where(a > 0, 1, slope)
    if activation.name == "squared_leaky_relu":
        return (c * a) ** 2, 2 * c * c * a, 2 * c * c, (c * a) ** 2
    return c * a, c, zero, np.abs(c * a)


@pytest.mark.parametrize("activation", ALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_derivatives_are_exact_to_rounding(activation, dtype):
    grid = GRID.to(dtype)
    info = torch.finfo(dtype)
    value, first, second, size = _exact(activation, grid.double())
    rate = {"softplus": activation.parameter, "celu": 4.0}.get(activation.name, 1.0)
    # relative to the size of the terms, where exp(-rate |a|) magnifies the rounding of its argument
    relative = info.eps * (4 + 2 * rate * np.abs(grid.double().numpy()))
    for order, (ours, truth) in enumerate(zip(_native(activation, grid), (value, first, second), strict=True)):
        allowed = relative * (size if order == 0 else np.abs(truth)) + 8 * info.tiny
        error = np.abs(ours.double().numpy().astype(np.longdouble) - truth)
        worst = int((error - allowed).argmax())
        assert (error <= allowed).all(), f"order {order} at {grid[worst]}: {ours[worst]} but {truth[worst]}"


@pytest.mark.parametrize("activation", ALL, ids=str)
def test_derivatives_at_kinks_are_those_of_autograd(activation):
    a = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    value = activation(a)
    (first,) = torch.autograd.grad(value.sum(), a, create_graph=True)
    second = torch.autograd.grad(first.sum(), a)[0] if first.requires_grad else torch.zeros(3, dtype=torch.float64)
    for ours, theirs in zip(_native(activation, a.detach()), (value, first, second), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-15, atol=0)


@pytest.mark.parametrize("beta", [1.0, 5.0])
def test_the_python_softplus_is_exact(beta):
    """PyTorch's own softplus is the identity above 20, an error of 2e-9."""
    activation = il.Activation("softplus", beta)
    exact = _exact(activation, GRID)[0].astype(np.float64)
    torch.testing.assert_close(activation(GRID), torch.from_numpy(exact), rtol=2e-13, atol=0)
    at = torch.tensor(20.5 / beta, dtype=torch.float64)
    assert activation(at) > at + 1e-9 / beta


@pytest.mark.parametrize("activation", ALL, ids=str)
def test_two_derivatives_at_once_are_those_of_autograd(activation):
    a = torch.linspace(-6, 6, 97, dtype=torch.float64, requires_grad=True)
    orders = [activation(a)]
    for _ in range(3):
        pull = {"create_graph": True, "materialize_grads": True}
        last = orders[-1].sum()
        orders.append(torch.autograd.grad(last, a, **pull)[0] if last.requires_grad else torch.zeros_like(a))
    ours = activation.derivatives(a)
    for got, expected in zip(ours, orders, strict=False):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    third = torch.autograd.grad(ours[2].sum(), a)[0] if ours[2].requires_grad else torch.zeros_like(a)
    torch.testing.assert_close(third, orders[3], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("activation", [a for a in ALL if a.name in ("softplus", "smooth_leaky_relu", "celu")], ids=str)
def test_three_python_derivatives_stay_accurate_in_both_tails(activation, dtype):
    """In relative terms: a log determinant, when differentiated further, divides by them."""
    p = activation.parameter
    rate = {"softplus": p, "celu": 1 / p}.get(activation.name, 1.0)
    t = torch.linspace(-60 if dtype == torch.float64 else -30, 60 if dtype == torch.float64 else 30, 241)
    a = (t.to(dtype) / rate).requires_grad_()
    orders = [activation(a)]
    for _ in range(3):
        orders.append(torch.autograd.grad(orders[-1].sum(), a, create_graph=True)[0])
    t = (a.detach().double() * rate).numpy().astype(np.longdouble)
    e = np.exp(-np.abs(t))
    if activation.name == "celu":
        exact = [np.where(t >= 0, 1, np.exp(t)), *(np.where(t >= 0, 0, np.exp(t) * rate**k) for k in (1, 2))]
    else:
        s = np.where(t < 0, e, 1) / (1 + e)
        exact = [s, rate * e / (1 + e) ** 2, -(rate**2) * np.sign(t) * e * -np.expm1(-np.abs(t)) / (1 + e) ** 3]
        if activation.name == "smooth_leaky_relu":
            exact = [p + (1 - p) * exact[0], *((1 - p) * d for d in exact[1:])]
    for order, (ours, truth) in enumerate(zip(orders[1:], exact, strict=True), 1):
        # the third vanishes at 0, where it is the difference of two terms
        size = np.abs(truth) + (rate**2 * e if order == 3 else 0)
        error = np.abs(ours.detach().double().numpy() - truth)
        excess = error - (20 + 2 * np.abs(t)) * torch.finfo(dtype).eps * size
        worst = int(excess.argmax())
        assert excess[worst] <= 0, f"order {order} at {a[worst]}: {ours[worst]} but {truth[worst]}"


@pytest.mark.parametrize("activation", [il.Activation("softplus", 20.0), il.Activation("celu", 0.05)], ids=str)
def test_the_gradient_of_the_log_determinant_in_a_tail(activation):
    layer = il.BrenierMap(1, (1,), activation=activation, inverse_lipschitz=0.0, nonneg="none")
    with torch.no_grad():
        layer.skip_weight.copy_(torch.tensor([[1.0], [0.0]]))
        layer.bias.zero_()
        layer.raw_weights[0].fill_(1.0)
    x = torch.tensor([[-0.9]], requires_grad=True)  # 18 from the bend
    for backend in ("native", "reference"):
        with il.use_backend(backend):
            gradient = torch.autograd.grad(layer.logabsdet(x).sum(), x)[0]
            slope = torch.func.jvp(layer, (x.detach(),), (torch.ones_like(x),))[1]
        torch.testing.assert_close(gradient, torch.full_like(x, 20.0), rtol=1e-4, atol=0)
        torch.testing.assert_close(slope, layer.jvp(x.detach(), torch.ones_like(x))[1], rtol=1e-5, atol=0)


def test_the_cache_of_encoded_activations_is_bounded():
    for beta in range(1, 2000):
        encode([il.Activation("softplus", beta), "identity"])
    assert len(activations._encoded) <= 1024


@pytest.mark.parametrize("activation", ALL, ids=str)
def test_huge_arguments_and_nan(activation):
    value, first, second = _native(activation, torch.tensor([float("nan"), 1e100, -1e100], dtype=torch.float64))
    assert value[0].isnan()
    exact = _exact(activation, torch.tensor([1e100, -1e100], dtype=torch.float64))
    for ours, truth in zip((value, first, second), exact, strict=False):
        torch.testing.assert_close(ours[1:], torch.from_numpy(truth.astype(np.float64)), rtol=1e-14, atol=0)


@pytest.mark.parametrize("activation", ALL, ids=str)
def test_activations_are_convex_and_monotone_as_declared(activation):
    a = GRID.sort().values.requires_grad_()
    (slope,) = torch.autograd.grad(activation(a).sum(), a)
    assert (slope.diff() >= -1e-15).all()
    assert activation.monotone == bool((slope >= 0).all())


def test_bare_names_take_their_defaults():
    layers = encode(["softplus", il.Activation("celu", 2.0), "leaky_relu"]).layers
    assert [a.parameter for a in layers] == [1.0, 2.0, 0.2]
    assert encode(["softplus", "relu"]) is encode(["softplus", "relu"])


@pytest.mark.parametrize(
    ("name", "parameter", "words"),
    [
        ("softplus", 0.0, "got parameter 0.0, wanted beta > 0"),
        ("softplus", float("inf"), "wanted beta > 0"),
        ("leaky_relu", 1.5, "wanted 0 <= slope <= 1"),
        ("leaky_relu", -0.1, "wanted 0 <= slope <= 1"),
        ("celu", float("nan"), "wanted alpha > 0"),
        ("relu", 0.3, "wanted no parameter"),
        ("leakyrelu", None, "nearest: 'leaky_relu'"),
    ],
)
def test_refusals(name, parameter, words):
    with pytest.raises(ValueError, match=words):
        il.Activation(name, parameter)


@pytest.mark.parametrize("activation", [a for a in ALL if a != il.Activation("leaky_relu", 1.0)], ids=str)
def test_smooth_activations_have_a_continuous_derivative(activation):
    a = torch.tensor([-1e-9, 1e-9], dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(activation(a).sum(), a)
    assert activation.smooth == (abs(slopes[1] - slopes[0]).item() < 1e-6)
