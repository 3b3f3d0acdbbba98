"""initialization="identity": E |T(x) - x|^2 / E |x|^2 for x ~ N(0, I), before training."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

import ilvae_fast as il
from cases import NONNEG

SMOOTH = [
    ("softplus", None),
    (il.Activation("softplus", 0.3), None),
    (il.Activation("softplus", 5.0), None),
    (il.Activation("softplus", 20.0), None),
    ("celu", None),
    (il.Activation("celu", 0.2), None),
    ("smooth_leaky_relu", None),
    ("softplus", "squared_leaky_relu"),
    ("softplus", il.Activation("squared_leaky_relu", 0.0)),
    ("identity", "squared_leaky_relu"),
]
KINKED = [("leaky_relu", None), ("relu", None), ("leaky_relu", "squared_leaky_relu")]
# The error of a map with kinks in all layers, by units per coordinate: a staircase with that many steps.
STAIRCASE = {1: 0.5, 2: 0.4, 4: 0.3, 8: 0.2, 16: 0.1, 32: 0.05}


def _map(width, hidden, activation="softplus", first=None, **options) -> il.BrenierMap:
    torch.manual_seed(0)
    return il.BrenierMap(
        width, hidden, activation=activation, first_activation=first, initialization="identity", **options
    )


@torch.no_grad()
def _error(layer: il.BrenierMap) -> float:
    x = torch.randn(1000, layer.in_features, dtype=layer.skip_weight.dtype)
    return float((layer(x) - x).square().sum() / x.square().sum())


@pytest.mark.parametrize(("activation", "first"), SMOOTH)
@pytest.mark.parametrize("width", [1, 2, 64])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_smooth_maps_start_at_the_identity(activation, first, width, depth):
    for constant in (0.0, 0.1, 1.0):
        error = _error(_map(width, (128,) * depth, activation, first, inverse_lipschitz=constant))
        assert error <= 0.02, f"L = {constant}: {error}"


@pytest.mark.parametrize(("activation", "first"), KINKED)
@pytest.mark.parametrize("width", [1, 2, 64])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_kinked_maps_start_at_a_staircase(activation, first, width, depth):
    per_coordinate = min(64 * depth // width, 32)
    bound = STAIRCASE[max(n for n in STAIRCASE if n <= per_coordinate)]
    for constant in (0.0, 0.1):
        error = _error(_map(width, (64,) * depth, activation, first, inverse_lipschitz=constant))
        assert error <= (1 - constant) ** 2 * bound, f"L = {constant}: {error}"
    assert _error(_map(width, (64,) * depth, activation, first, inverse_lipschitz=1.0)) <= 0.01


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.lists(st.integers(20, 70), min_size=1, max_size=4), st.floats(0, 2), st.floats(0.1, 30))
def test_any_widths_at_least_as_wide_as_the_input(width, hidden, constant, beta):
    layer = _map(width, hidden, il.Activation("softplus", beta), inverse_lipschitz=constant, dtype=torch.float64)
    x = torch.randn(2000, width, dtype=torch.float64)
    with torch.no_grad():
        error = (layer(x) - max(constant, 1.0) * x).square().sum() / x.square().sum()
    assert error <= 0.08


def test_fewer_units_than_coordinates_carry_their_share():
    error = _error(_map(64, (24, 24), inverse_lipschitz=0.0))
    assert error == pytest.approx(1 - 48 / 64, abs=0.05)


@pytest.mark.parametrize("output", ["softplus", "relu", "leaky_relu", "celu", "smooth_leaky_relu"])
def test_the_output_activation_is_kept_where_its_slope_is_one(output):
    for width in (1, 2, 16):
        assert _error(_map(width, (64, 64), output_activation=output, inverse_lipschitz=0.1)) <= 0.02


def test_large_constants_start_at_their_own_multiple():
    layer = _map(8, (64, 64), inverse_lipschitz=3.0)
    x = torch.randn(1000, 8)
    with torch.no_grad():
        assert (layer(x) - 3 * x).norm() <= 0.06 * x.norm()


def test_a_random_start_is_far_from_the_identity():
    torch.manual_seed(0)
    assert _error(il.BrenierMap(16, (64, 64), inverse_lipschitz=0.0)) > 5 * 0.02


@pytest.mark.parametrize("nonneg", NONNEG)
@pytest.mark.parametrize(("activation", "first"), SMOOTH[::3] + KINKED)
def test_everything_trains(nonneg, activation, first):
    layer = _map(4, (64, 64), activation, first, nonneg=nonneg, inverse_lipschitz=0.1)
    assert all((w > 0).all() for w in layer.nonneg_weights())
    x = torch.randn(256, 4)
    target = x @ torch.diag(torch.tensor([0.5, 1.0, 1.5, 2.0])) + 0.3 * x.sign()
    optimiser = torch.optim.Adam(layer.parameters(), lr=3e-3)
    losses = []
    for step in range(100):
        optimiser.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        if step == 0:
            for name, parameter in layer.named_parameters():
                if name == "bias" and (activation, first) in KINKED[:2]:
                    continue  # slopes depend on a bias only at the kinks
                assert 1e-6 < parameter.grad.norm() < 1e3, name
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_both_maps_of_a_decoder_or_one_of_them():
    torch.manual_seed(0)
    z = torch.randn(500, 3)
    with torch.no_grad():
        decoder = il.BrenierDecoder(
            3, 8, ((64, 64), (64, 64)), initialization="identity", inverse_lipschitz=0.1, embedding="identity"
        )
        assert (decoder(z) - torch.nn.functional.pad(z, (0, 5))).norm() < 0.1 * z.norm()
        mixed = il.BrenierDecoder(3, 8, ((64,), (64,)), initialization=("identity", "random"), inverse_lipschitz=0.1)
    assert (mixed.latent_map.initialization, mixed.data_map.initialization) == ("identity", "random")


def test_reset_draws_anew_reproducibly():
    a, b = _map(4, (16, 16)), _map(4, (16, 16))
    torch.testing.assert_close(a.skip_weight, b.skip_weight, rtol=0, atol=0)
    a.reset_parameters()
    assert not torch.equal(a.skip_weight, b.skip_weight)
    assert _error(a) <= 0.01


def test_trained_constants_and_other_dtypes():
    assert _error(_map(4, (64,), inverse_lipschitz=il.layers.Trained(0.3))) <= 0.02
    layer = _map(4, (64,), inverse_lipschitz=0.3, dtype=torch.bfloat16)
    assert layer.skip_weight.dtype == torch.bfloat16
    assert _error(layer.float()) <= 0.02


def test_the_meta_device_and_fake_tensors():
    layer = _map(4, (64, 64), inverse_lipschitz=0.3, device="meta")
    layer.to_empty(device="cpu").reset_parameters()
    assert _error(layer) <= 0.02
    with FakeTensorMode():
        assert _map(3, (4, 5))(torch.randn(2, 3)).shape == (2, 3)
    with torch.inference_mode():
        assert _error(_map(4, (64,), inverse_lipschitz=0.0)) <= 0.02


def test_refusals():
    with pytest.raises(ValueError, match=r"initialization.*'identty'.*identity"):
        il.BrenierMap(2, (4,), initialization="identty")
    with pytest.raises(ValueError, match="initialization: got 'identity' with activation 'identity'"):
        il.BrenierMap(2, (4, 4), activation="identity", initialization="identity")
