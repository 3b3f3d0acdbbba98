"""What the architecture guarantees, on random pairs and on pairs found by gradient descent on the ratio."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ilvae_fast as il
from cases import NONNEG, Case, cases
from comparison import inverse_lipschitz_violation, monotonicity_violation
from ilvae_fast import functional, reference
from ilvae_fast.operators.activations import encode

# float64: rounding of T, relative to |x - y|^2 and to the size of T
SLACK = 1e-10
plain = cases(embeddings=("none",), empty=False)


def _pairs(case: Case, count: int, distance: float) -> tuple[torch.Tensor, torch.Tensor]:
    x = 2 * torch.randn(count, case.width, dtype=torch.float64)
    return x, x + distance * torch.randn_like(x)


def _map(case: Case):
    tensors = case.tensors(torch.float64)
    _, *rest = tensors.positional()
    return lambda x: functional.brenier_map(x, *rest, **tensors.options())


@given(plain, st.sampled_from([1e-3, 1.0, 30.0]))
def test_strong_monotonicity_and_inverse_lipschitz_bound(case, distance):
    x, y = _pairs(case, 64, distance)
    t = _map(case)
    tx, ty = t(x), t(y)
    square, norm = (x - y).square().sum(-1), (x - y).norm(dim=-1)
    size = 1 + tx.norm(dim=-1) + ty.norm(dim=-1)
    assert (monotonicity_violation(x, y, tx, ty, case.constant) <= SLACK * square + 1e-14 * size * norm).all()
    assert (inverse_lipschitz_violation(x, y, tx, ty, case.constant) <= SLACK * norm + 1e-14 * size).all()


@given(plain, st.sampled_from([torch.float32, torch.bfloat16]))
def test_monotonicity_in_low_precision_up_to_the_measured_forward_error(case, dtype):
    tensors = case.tensors(dtype)
    _, *rest = tensors.positional()
    x, y = (p.to(dtype) for p in _pairs(case, 64, 1.0))
    exact = tensors.double()
    _, *exact_rest = exact.positional()

    def both(p):
        ours = functional.brenier_map(p, *rest, **tensors.options()).double()
        truth = functional.brenier_map(p.double(), *exact_rest, **exact.options())
        return ours, (ours - truth).norm(dim=-1)

    (tx, error_x), (ty, error_y) = both(x), both(y)
    x, y = x.double(), y.double()
    slack = 2 * torch.maximum(error_x, error_y) * (x - y).norm(dim=-1)
    violation = monotonicity_violation(x, y, tx, ty, float(tensors.named["inverse_lipschitz"]))
    assert (violation <= slack * (1 + 1e-6) + 1e-12).all()


def _decoder(seed: int, embedding: str, constants=(0.7, 1.3), **options) -> il.BrenierDecoder:
    torch.manual_seed(seed)
    decoder = il.BrenierDecoder(
        3, 7, ((8, 5), (9,)), inverse_lipschitz=constants, embedding=embedding, dtype=torch.float64, **options
    )
    if embedding == "full_rank":
        with torch.no_grad():
            decoder.raw_embedding.add_(0.5 * torch.randn_like(decoder.raw_embedding))
    return decoder


@given(
    st.integers(0, 1000),
    st.sampled_from(["identity", "orthogonal", "full_rank"]),
    st.sampled_from(NONNEG),
    st.sampled_from(["softplus", "leaky_relu", "celu", "smooth_leaky_relu"]),
    st.sampled_from([None, "squared_leaky_relu"]),
    st.sampled_from([(0.7, 1.3), (0.0, 1.0), (2.0, 0.1)]),
)
def test_decoders_keep_their_bound(seed, embedding, nonneg, activation, first, constants):
    decoder = _decoder(seed, embedding, constants, nonneg=nonneg, activation=activation, first_activation=first)
    bound = float(decoder.inverse_lipschitz_bound())
    z, y = torch.randn(2, 128, 3, dtype=torch.float64) * 2
    with torch.no_grad():
        violation = inverse_lipschitz_violation(z, y, decoder(z), decoder(y), bound)
        assert (violation <= SLACK * (z - y).norm(dim=-1)).all()
        assert torch.linalg.svdvals(decoder.jacobian(z)).min() >= bound - 1e-10


def _adversarial(ratio, shape, steps=150):
    """Pairs that gradient descent drives towards the smallest ratio it can find."""
    pair = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([pair], lr=0.05)
    start = None
    for _ in range(steps):
        optimiser.zero_grad()
        value = ratio(*pair)
        start = value.detach() if start is None else start
        value.sum().backward()
        optimiser.step()
    return pair.detach(), start


@pytest.mark.parametrize(
    "activations", [("softplus", "softplus"), ("squared_leaky_relu", "leaky_relu"), ("celu", "relu")]
)
@pytest.mark.parametrize("embedding", ["identity", "orthogonal", "full_rank"])
def test_adversarial_pairs_keep_the_bound_of_a_decoder(embedding, activations):
    first, later = activations
    decoder = _decoder(3, embedding, activation=later, first_activation=first)
    bound = float(decoder.inverse_lipschitz_bound())

    def ratio(z, y):
        return (decoder(z) - decoder(y)).norm(dim=-1) / (z - y).norm(dim=-1)

    (z, y), start = _adversarial(ratio, (32, 3))
    found = ratio(z, y).detach()
    assert found.mean() < start.mean()  # the attack attacks
    assert (found >= bound * (1 - 1e-10)).all()


def test_adversarial_pairs_keep_strong_monotonicity():
    torch.manual_seed(5)
    layer = il.BrenierMap(4, (16, 8), inverse_lipschitz=0.3, dtype=torch.float64)

    def ratio(x, y):
        return ((layer(x) - layer(y)) * (x - y)).sum(-1) / (x - y).square().sum(-1)

    (x, y), start = _adversarial(ratio, (32, 4))
    found = ratio(x, y).detach()
    assert found.mean() < start.mean()
    assert (found >= 0.3 * (1 - 1e-10)).all()


def test_a_map_with_a_negative_weight_breaks_the_bound():
    """The tests above can fail: with an effective weight that is negative the attack finds a violation."""
    torch.manual_seed(5)
    layer = il.BrenierMap(4, (16, 8), inverse_lipschitz=0.3, nonneg="none", dtype=torch.float64)
    with torch.no_grad():
        layer.raw_weights[-1].neg_()

    def ratio(x, y):
        return ((layer(x) - layer(y)) * (x - y)).sum(-1) / (x - y).square().sum(-1)

    (x, y), _ = _adversarial(ratio, (32, 4))
    assert (ratio(x, y) < 0.3 * (1 - 1e-3)).any()


@given(plain)
def test_the_potential_is_convex_along_segments(case):
    tensors = case.tensors(torch.float64)
    _, *rest = tensors.positional()
    x, y = _pairs(case, 64, 3.0)
    s = torch.rand(64, 1, dtype=torch.float64)

    def phi(p):
        return functional.potential(p, *rest, **tensors.options())

    middle, ends = phi(s * x + (1 - s) * y), s[:, 0] * phi(x) + (1 - s[:, 0]) * phi(y)
    # strongly convex with modulus L
    gap = case.constant / 2 * s[:, 0] * (1 - s[:, 0]) * (x - y).square().sum(-1)
    assert (middle + gap <= ends + SLACK * (1 + ends.abs() + gap)).all()


smooth = cases(
    embeddings=("none",), empty=False, first=("softplus", "smooth_leaky_relu"), later=("softplus", "smooth_leaky_relu")
)


@given(smooth)
def test_the_map_is_the_gradient_of_the_potential(case):
    tensors = case.tensors(torch.float64)
    x, *rest = tensors.positional()
    t = functional.brenier_map(x, *rest, **tensors.options())
    step = 1e-5
    for j in range(case.width):
        shift = torch.zeros(case.width, dtype=torch.float64)
        shift[j] = step
        up, down = (functional.potential(x + e, *rest, **tensors.options()) for e in (shift, -shift))
        torch.testing.assert_close((up - down) / (2 * step), t[..., j], rtol=1e-6, atol=1e-7)


@given(cases(embeddings=("none",), empty=False, later=("softplus", "celu", "leaky_relu")))
def test_the_jacobian_is_symmetric_with_eigenvalues_above_l(case):
    tensors = case.tensors(torch.float64)
    layer = il.BrenierMap(case.width, case.hidden, inverse_lipschitz=case.constant, nonneg="none", dtype=torch.float64)
    layer._activations = encode(case.activations)
    with torch.no_grad():
        layer.skip_weight.copy_(tensors.named["skip_weight"])
        layer.bias.copy_(tensors.named["bias"])
        for k, raw in enumerate(layer.raw_weights):
            raw.copy_(tensors.named[f"weights[{k}]"])
        jacobian = layer.jacobian(tensors.named["x"])
    scale = 1 + float(jacobian.abs().max())
    torch.testing.assert_close(jacobian, jacobian.mT, rtol=0, atol=1e-11 * scale)
    assert torch.linalg.eigvalsh((jacobian + jacobian.mT) / 2).min() >= case.constant - SLACK * scale


@pytest.mark.parametrize("nonneg", NONNEG)
@pytest.mark.parametrize("activation", ["softplus", "smooth_leaky_relu", "celu"])
def test_finite_differences_agree_with_autograd_on_raw_parameters(nonneg, activation):
    torch.manual_seed(2)
    layer = il.BrenierMap(
        3, (4, 3), activation=activation, nonneg=nonneg, inverse_lipschitz=il.Trained(0.8), dtype=torch.float64
    )
    x, v = torch.randn(2, 5, 3, dtype=torch.float64)

    def loss():
        phi, t = layer.potential_and_map(x)
        return (v * t).sum() + (v[:, 0] * phi).sum()

    gradients = torch.autograd.grad(loss(), list(layer.parameters()))
    step = 1e-6
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        flat, expected = parameter.detach().view(-1), gradient.reshape(-1)
        for i in range(flat.numel()):
            value = float(flat[i])
            with torch.no_grad():
                flat[i] = value + step
                up = loss()
                flat[i] = value - step
                down = loss()
                flat[i] = value
            difference = float(up - down) / (2 * step)
            assert difference == pytest.approx(float(expected[i]), rel=2e-5, abs=2e-7)


def test_the_reference_satisfies_the_same_properties():
    """Yardstick and operator are independent: the reference alone keeps the bound too."""
    case = Case(4, (6, 5), tuple(map(il.Activation, ("celu", "softplus", "softplus"))), "none", (64,), 0.9, 7)
    tensors = case.tensors(torch.float64)
    _, *rest = tensors.positional()
    x, y = _pairs(case, 64, 1.0)
    tx, ty = (reference.brenier_map(p, *rest, **tensors.options(reference)) for p in (x, y))
    assert (monotonicity_violation(x, y, tx, ty, 0.9) <= SLACK * (x - y).square().sum(-1)).all()
