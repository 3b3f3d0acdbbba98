"""The scale of T at initialisation, at L = 0."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import ilvae_fast as il
from cases import NONNEG

ACTIVATIONS = [
    ("softplus", None, "identity"),
    ("relu", None, "identity"),
    ("leaky_relu", None, "softplus"),
    ("leaky_relu", "squared_leaky_relu", "leaky_relu"),
    ("celu", None, "relu"),
    ("smooth_leaky_relu", None, "celu"),
    ("softplus", "squared_leaky_relu", "smooth_leaky_relu"),
    ("identity", "squared_leaky_relu", "identity"),
    (il.Activation("softplus", 10.0), None, "identity"),
]
SEEDS, ROWS = 10, 128


def _variances(width, hidden, scales=(1.0,), seeds=SEEDS, **options) -> list[float]:
    """The variance of T(scale x) over x ~ N(0, I), averaged over coordinates and draws of the weights."""
    x = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(12345))  # independent of the weights' seeds
    total = torch.zeros(len(scales))
    for seed in range(seeds):
        torch.manual_seed(seed)
        layer = il.BrenierMap(width, hidden, inverse_lipschitz=0.0, **options)
        with torch.no_grad():
            total += torch.stack([layer(scale * x).var(dim=0).mean() for scale in scales])
    return (total / seeds).tolist()


def _variance(width, hidden, **options) -> float:
    return _variances(width, hidden, seeds=2, **options)[0]  # each draw of the weights is scaled: two are enough


@pytest.mark.parametrize(("activation", "first", "output"), ACTIVATIONS)
@pytest.mark.parametrize("width", [2, 64, 784])
def test_variance_of_the_map(width, activation, first, output):
    names = {"activation": activation, "first_activation": first, "output_activation": output}
    for depth in range(1, 7):
        for units in (32, 512) if depth in (1, 6) else (128,):
            variance = _variance(width, (units,) * depth, **names)
            assert 0.25 <= variance <= 4, f"depth {depth}, width {units}: {variance}"


NETWORKS = [(2, (32,)), (16, (64, 64, 32)), (64, (128, 128)), (16, (128,) * 6)]
SCALES = (0.3, 0.5, 0.7, 1.0, 1.7, 3.0)
SQUARED = [il.Activation("squared_leaky_relu", slope) for slope in (0.0, 0.2, 0.5, 0.8, 1.0)]
CURVED = [("softplus", None), (il.Activation("softplus", 10.0), None), ("celu", None), ("smooth_leaky_relu", None)]
CURVED += [(above, first) for above in ("celu", "softplus", "leaky_relu", "relu") for first in SQUARED]


@pytest.mark.parametrize(("width", "hidden"), NETWORKS)
@pytest.mark.parametrize(("activation", "first"), CURVED)
def test_curved_maps_follow_the_scale_of_their_inputs(activation, first, width, hidden):
    variances = _variances(width, hidden, SCALES, activation=activation, first_activation=first)
    for scale, variance in zip(SCALES, variances, strict=True):
        assert scale**2 / 16 <= variance <= 16 * scale**2, f"inputs scaled by {scale}: {variance}"


@pytest.mark.parametrize(("width", "hidden"), NETWORKS)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_maps_without_curvature_do_not_depend_on_the_scale_of_their_inputs(activation, width, hidden):
    assert all(1 / 16 <= v <= 16 for v in _variances(width, hidden, SCALES, activation=activation))


def test_an_even_first_activation_does_not_switch_the_map_off():
    """Its slopes cancel. Weights scaled by the inverse of their mean would be 200, and T(x / 2) of variance 3e-41."""
    options = {"activation": "celu", "first_activation": il.Activation("squared_leaky_relu", 1.0)}
    layer = il.BrenierMap(16, (64, 64, 32), inverse_lipschitz=0.0, **options)
    assert max(float(w.max()) for w in layer.nonneg_weights()) < 5
    assert _variances(16, (64, 64, 32), (0.5,), **options)[0] > 0.01


@pytest.mark.parametrize("nonneg", NONNEG)
def test_variance_does_not_depend_on_the_parametrisation(nonneg):
    for hidden in [(32,), (64, 128, 32), (200, 64)]:
        assert 0.25 <= _variance(64, hidden, nonneg=nonneg) <= 4


@pytest.mark.parametrize(("activation", "first", "output"), ACTIVATIONS)
def test_the_map_has_mean_zero(activation, first, output):
    torch.manual_seed(0)
    layer = il.BrenierMap(
        64, (128, 64), activation=activation, first_activation=first, output_activation=output, inverse_lipschitz=0.0
    )
    with torch.no_grad():
        t = layer(torch.randn(2000, 64))
    assert t.mean(0).square().mean() < 0.1 * t.var(0).mean()


@pytest.mark.parametrize("activation", ["softplus", "relu", "celu", il.Activation("softplus", 10.0)])
def test_pre_activations_and_a_sparse_map_vanish_at_zero(activation):
    torch.manual_seed(0)
    layer = il.BrenierMap(5, (8, 7, 6), activation=activation, inverse_lipschitz=0.0)
    assert layer.potential(torch.zeros(5)).detach() == pytest.approx(0, abs=1e-5)
    torch.manual_seed(0)
    sparse = il.BrenierMap(5, (8, 7, 6), activation=activation, inverse_lipschitz=0.0, initialization="sparse")
    torch.testing.assert_close(sparse(torch.zeros(5)), torch.zeros(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(sparse.bias[8:-1], layer.bias[8:-1] - 0.5)
    torch.testing.assert_close(sparse.skip_weight[:-1], layer.skip_weight[:-1])


def test_a_sparse_map_starts_with_its_upper_layers_off_on_a_small_subspace():
    torch.manual_seed(0)
    maps = [il.BrenierMap(784, (512, 512), inverse_lipschitz=0.0, initialization=i) for i in ("random", "sparse")]
    z = torch.randn(64, 10)
    with torch.no_grad():
        random, sparse = (m(z, 784).var(0).sum() for m in maps)
    assert sparse < random / 100


def test_widths_may_differ_a_lot():
    for hidden in [(512, 32), (32, 512), (32, 512, 32, 256)]:
        assert 0.25 <= _variance(16, hidden) <= 4


def test_the_variance_test_would_notice_a_missing_scale():
    torch.manual_seed(0)
    layer = il.BrenierMap(64, (512,) * 4, nonneg="none", inverse_lipschitz=0.0)
    with torch.no_grad():
        for raw in layer.raw_weights:
            raw.uniform_(0, 1)  # positive weights of order one, as naive code draws them
        assert layer(torch.randn(64, 64)).var(0).mean() > 4


def test_draws_are_reproducible_and_reset_draws_anew():
    layers = []
    for _ in range(2):
        torch.manual_seed(3)
        layers.append(il.BrenierMap(4, (5, 6)))
    for a, b in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    before = layers[0].skip_weight.clone()
    layers[0].reset_parameters()
    assert not torch.equal(before, layers[0].skip_weight)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_construction_under_any_grad_mode(mode):
    with mode():
        assert il.BrenierMap(3, (4,)).skip_weight.isfinite().all()


def test_construction_under_a_fake_tensor_mode():
    with FakeTensorMode():
        layer = il.BrenierMap(3, (4, 5))
        assert layer(torch.randn(2, 3)).shape == (2, 3)
