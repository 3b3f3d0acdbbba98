"""The scale of T at initialisation: x ~ N(0, I), L = 0, variance per coordinate in [0.25, 4]."""

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
    ("identity", None, "identity"),
]
DRAWS, ROWS = 8, 128


def _variance(width, hidden, nonneg="softplus", **activations) -> float:
    """Over inputs and draws of the weights, averaged over coordinates."""
    torch.manual_seed(0)
    with torch.no_grad():
        values = [
            il.BrenierMap(width, hidden, nonneg=nonneg, inverse_lipschitz=0.0, **activations)(torch.randn(ROWS, width))
            for _ in range(DRAWS)
        ]
    return float(torch.stack(values).var(dim=(0, 1)).mean())


@pytest.mark.parametrize(("activation", "first", "output"), ACTIVATIONS)
@pytest.mark.parametrize("width", [2, 64, 784])
def test_variance_of_the_map(width, activation, first, output):
    names = {"activation": activation, "first_activation": first, "output_activation": output}
    for depth in range(1, 7):
        for units in (32, 512) if depth in (1, 6) else (128,):
            variance = _variance(width, (units,) * depth, **names)
            assert 0.25 <= variance <= 4, f"depth {depth}, width {units}: {variance}"


@pytest.mark.parametrize("nonneg", NONNEG)
def test_variance_does_not_depend_on_the_parametrisation(nonneg):
    for hidden in [(32,), (64, 128, 32), (200, 64)]:
        assert 0.25 <= _variance(64, hidden, nonneg) <= 4


def test_widths_may_differ_a_lot():
    for hidden in [(512, 32), (32, 512), (32, 512, 32, 256)]:
        assert 0.25 <= _variance(16, hidden) <= 4


def test_the_variance_test_would_notice_a_missing_scale():
    torch.manual_seed(0)
    layer = il.BrenierMap(64, (512,) * 4, nonneg="none", inverse_lipschitz=0.0)
    with torch.no_grad():
        for raw in layer.raw_weights:
            raw.uniform_(0, 1)  # positive weights of order one, as naive code draws them
        assert layer(torch.randn(64, 64)).var() > 4


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
