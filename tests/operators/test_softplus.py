"""The softplus of raw weights: one operator for all layers, against PyTorch's own and where it falls back to that."""

import copy

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

import ilvae_fast as il
from ilvae_fast.operators import softplus as ops
from raw_operators import softplus, softplus_backward

DTYPES = [torch.float32, torch.float64]
# empty; less than a vector; whole vectors and a remainder; several threads
SHAPES = [(0, 3), (1, 3), (1, 67), (37, 19), (301, 257)]


def _raws(dtype=torch.float64, shapes=SHAPES, spread=6.0):
    torch.manual_seed(3)
    return [(torch.randn(*s, dtype=dtype) * spread).requires_grad_() for s in shapes]


def _plain(raws):
    return [ops.plain_softplus(r) for r in raws]


def _near(ours, theirs):
    """Equal to within four roundings of each element."""
    epsilon = torch.finfo(theirs[0].dtype).eps
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=4 * epsilon, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_gradients_are_those_of_pytorch(dtype):
    raws = _raws(dtype)
    cotangents = [torch.randn_like(r) for r in raws]
    ours, theirs = ops.softplus(raws), _plain(raws)
    assert len({w.grad_fn for w in ours}) == 1  # one node for all of them
    _near(ours, theirs)
    _near(torch.autograd.grad(ours, raws, cotangents), torch.autograd.grad(theirs, raws, cotangents))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_range(dtype):
    inf, nan = float("inf"), float("nan")
    raw = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 700.0, -80.0, 1e30, -1e30, inf, -inf, nan], dtype=dtype)
    raw.requires_grad_()
    ours, theirs = ops.softplus([raw])[0], ops.plain_softplus(raw)
    torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=0, equal_nan=True)
    (gradient,) = torch.autograd.grad(ours.sum(), raw)
    wanted = torch.sigmoid(raw.detach())
    torch.testing.assert_close(gradient, wanted, rtol=4 * torch.finfo(dtype).eps, atol=1e-37, equal_nan=True)


def test_any_strides():
    base = torch.randn(6, 8)
    raws = [base.T, base[:, ::2], base[:1].expand(5, 8), base[0, 0]]
    for r in (r.detach().requires_grad_() for r in raws):
        (ours,), theirs = ops.softplus([r]), ops.plain_softplus(r)
        assert ours.is_contiguous()
        _near([ours], [theirs])
        cotangent = torch.ones(()).expand_as(r)
        _near(torch.autograd.grad(ours, r, cotangent), torch.autograd.grad(theirs, r, cotangent))


def test_the_number_of_threads_changes_no_bit():
    raws = _raws(torch.float32)
    cotangents = [torch.randn_like(r) for r in raws]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([*ops.softplus(raws), *softplus_backward(raw=raws, cotangents=cotangents)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_unneeded_gradients_are_not_computed():
    raws = _raws(shapes=[(2, 3), (4, 2), (1, 4)])
    raws[1].requires_grad_(False)
    weights = ops.softplus(raws)
    gradients = torch.autograd.grad(weights[2].sum() + weights[1].sum(), [raws[0], raws[2]], allow_unused=True)
    assert gradients[0] is None
    assert ops.softplus([]) == []
    _near([gradients[1]], [torch.sigmoid(raws[2])])


def test_derivatives_of_any_order():
    raws = _raws(shapes=[(2, 3), (1, 2)], spread=1.0)
    assert gradcheck(lambda *r: tuple(ops.softplus(r)), raws, check_batched_grad=True)
    assert gradgradcheck(lambda *r: tuple(ops.softplus(r)), raws)


def test_opcheck():
    raws = _raws(shapes=[(2, 3), (1, 2)])
    softplus.check(raw=raws)
    detached = [r.detach() for r in raws]
    softplus.check(raw=detached)
    softplus_backward.check(raw=detached, cotangents=[torch.randn_like(r) for r in detached])


def test_transformations_use_pytorchs_softplus():
    kind = il.NonNegative("softplus")
    raw = torch.randn(3, 4, dtype=torch.float64)
    direction = torch.randn_like(raw)
    slope = torch.sigmoid(raw)
    torch.testing.assert_close(grad(lambda r: kind(r).sum())(raw), slope)
    torch.testing.assert_close(vmap(kind)(raw), ops.plain_softplus(raw))
    torch.testing.assert_close(jvp(kind, (raw,), (direction,))[1], slope * direction)
    with forward_ad.dual_level():
        weight = kind(forward_ad.make_dual(raw, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(weight).tangent, slope * direction)
        with pytest.raises(NotImplementedError, match="softplus: the operator itself has no forward-mode derivative"):
            softplus(raw=[forward_ad.make_dual(raw, direction)])
    torch.testing.assert_close(torch.compile(kind, backend="eager", fullgraph=True)(raw), kind(raw))


@pytest.mark.parametrize("name", ["bfloat16", "meta", "fake", "subclass"])
def test_other_tensors_use_pytorchs_softplus(name):
    class Own(torch.Tensor):
        pass

    raw = torch.randn(3, 4)
    if name == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            weight = il.NonNegative("softplus")(mode.from_tensor(raw))
        assert weight.shape == raw.shape
        return
    other = {"bfloat16": raw.bfloat16, "meta": lambda: raw.to("meta"), "subclass": lambda: raw.as_subclass(Own)}[name]()
    weight = il.NonNegative("softplus")(other)
    assert (weight.dtype, weight.device, type(weight)) == (other.dtype, other.device, type(other))


def test_the_reference_backend_is_plain():
    layer = il.BrenierMap(3, (4, 5), nonneg="softplus")
    with il.use_backend("reference"):
        names = {w.grad_fn.name() for w in layer.nonneg_weights()}
    assert names == {"SoftplusBackward0"}
    assert {w.grad_fn.name() for w in layer.nonneg_weights()} != names


def test_a_layer_with_a_hook_on_one_weight_and_a_copy():
    layer = il.BrenierMap(3, (4, 5), nonneg="softplus")
    seen = []
    layer.raw_weights[1].register_hook(lambda g: seen.append(g.shape))
    layer(torch.randn(2, 3)).sum().backward()
    assert seen == [torch.Size([1, 5])]
    assert all(r.grad is not None for r in layer.raw_weights)
    torch.testing.assert_close(copy.deepcopy(layer).nonneg_weights(), layer.nonneg_weights())


@pytest.mark.parametrize(
    ("raw", "cotangents", "words"),
    [
        ([torch.ones(2, dtype=torch.int64)], [torch.ones(2)], r"raw\[0\]: got dtype Long, wanted float64 or float32"),
        ([torch.ones(2)], [], "cotangents: got 0, wanted 1"),
        ([torch.ones(2)], [torch.ones(3)], r"cotangents\[0\]: got shape \[3\], wanted \[2\]"),
        ([torch.ones(2)], [torch.ones(2).double()], r"cotangents\[0\]: got dtype Double, wanted Float"),
    ],
)
def test_refusals(raw, cotangents, words):
    with pytest.raises(ValueError, match=words):
        softplus_backward(raw=raw, cotangents=cotangents)
