"""Every nesting of the transformations of ``torch.func``, to depth 3, of every public function.

The compiled operators against the reference, which is plain autograd and has no function with rules of its own.
At depth 3 the functions take turns, and hessian, which is jacfwd of jacrev and so deeper than it looks, is left out.
The environment variable ILVAE_FAST_ALL_NESTINGS asks for everything: 399 nestings of each of six functions.
"""

import itertools
import os

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import ilvae_fast as il
from ilvae_fast import functional

TRANSFORMATIONS = {
    "grad": lambda f: grad(lambda x: f(x).sum()),
    "vjp": lambda f: lambda x: _pulled(*vjp(f, x)),
    "jvp": lambda f: lambda x: jvp(f, (x,), (torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x),))[1],
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "vmap": lambda f: lambda x: vmap(f)(torch.stack([x, 1 - x])),
}
FUNCTIONS = ("potential", "brenier_map", "potential_and_map", "brenier_map_vjp", "brenier_map_jvp", "decoder")
EVERYTHING = "ILVAE_FAST_ALL_NESTINGS" in os.environ


def _pulled(value, pull):
    return pull(torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value))[0]


def _function(name, variable):
    """The named function of one tensor, with one result."""
    torch.manual_seed(0)
    if name == "decoder":
        decoder = il.BrenierDecoder(1, 2, ((2,), (2,)), dtype=torch.float64).requires_grad_(False)
        return decoder, torch.randn(1, dtype=torch.float64)
    layer = il.BrenierMap(2, (2,), dtype=torch.float64).requires_grad_(False)
    skip = layer.skip_weight + 0.3 * torch.randn_like(layer.skip_weight)
    x, v = torch.randn(2, 2, dtype=torch.float64)
    rest = (layer.bias, layer.nonneg_weights())
    options = {"activations": ("softplus", "identity"), "inverse_lipschitz": 0.5}
    functions = {
        "potential": lambda x, skip: functional.potential(x, skip, *rest, **options),
        "brenier_map": lambda x, skip: functional.brenier_map(x, skip, *rest, **options),
        "potential_and_map": lambda x, skip: _joined(*functional.potential_and_map(x, skip, *rest, **options)),
        "brenier_map_vjp": lambda x, skip: _joined(
            *functional.brenier_map_vjp(x, skip, *rest, map_cotangent=v, wrt=("x", "bias"), **options)[:3:2]
        ),
        "brenier_map_jvp": lambda x, skip: _joined(*functional.brenier_map_jvp(x, v, skip, *rest, **options)),
    }
    function = functions[name]
    if variable == "x":
        return lambda x: function(x, skip), x
    return lambda skip: function(x, skip), skip


def _joined(*tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def _check(name, variable, names):
    function, at = _function(name, variable)
    for transformation in names:
        function = TRANSFORMATIONS[transformation](function)
    with il.use_backend("reference"):
        expected = function(at)
    ours = function(at)
    torch.testing.assert_close(
        ours, expected, rtol=1e-9, atol=1e-10 * (1 + float(expected.abs().max())), msg=lambda m: f"{names}: {m}"
    )


def _nestings(depth):
    return list(itertools.product(TRANSFORMATIONS, repeat=depth))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nestings_of_one_and_two(name, depth):
    for names in _nestings(depth):
        _check(name, "x", names)


@pytest.mark.parametrize("outermost", [t for t in TRANSFORMATIONS if EVERYTHING or t != "hessian"])
def test_nestings_of_three(outermost):
    nestings = [names for names in _nestings(3) if names[-1] == outermost and (EVERYTHING or "hessian" not in names)]
    for k, names in enumerate(nestings):
        for name in FUNCTIONS if EVERYTHING else [FUNCTIONS[k % len(FUNCTIONS)]]:
            _check(name, "x", names)


def test_the_nestings_are_all_there():
    assert [len(_nestings(depth)) for depth in (1, 2, 3)] == [7, 49, 343]


@pytest.mark.parametrize("name", FUNCTIONS[:-1])
def test_nestings_over_a_parameter(name):
    for names in (*_nestings(1), *_nestings(2)[FUNCTIONS.index(name) :: 5]):
        _check(name, "skip_weight", names)


@pytest.mark.parametrize("inner", ["grad", "vjp", "jacrev", "vmap"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_open_dual_level_around_a_transformation(name, inner):
    function, at = _function(name, "x")
    transformed = TRANSFORMATIONS[inner](function)

    def tangent():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(transformed(forward_ad.make_dual(at, torch.ones_like(at)))).tangent.clone()

    with il.use_backend("reference"):
        expected = tangent()
    torch.testing.assert_close(tangent(), expected, rtol=1e-9, atol=1e-10)


def test_dual_levels_do_not_nest():
    # what the rules rely on: PyTorch itself refuses a forward mode of torch.func in an open dual level
    function, at = _function("brenier_map", "x")
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="Nested forward mode AD is not supported"):
        jacfwd(function)(forward_ad.make_dual(at, torch.ones_like(at)))


@pytest.mark.parametrize("nonneg", ["softplus", "square"])
def test_nested_forward_mode_of_a_layer(nonneg):
    layer, x = il.BrenierMap(3, (16, 8), nonneg=nonneg, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    jacobian = layer.jacobian(x)
    torch.testing.assert_close(jacfwd(jacfwd(layer.potential))(x), jacobian)
    bend = jacrev(jacrev(layer))(x)
    assert bend.abs().max() > 1e-3
    torch.testing.assert_close(jacfwd(hessian(layer.potential))(x), bend)
    along = jacfwd(lambda x: layer.jvp(x, torch.ones_like(x))[1])
    torch.testing.assert_close(along(x), bend.sum(1))
    torch.testing.assert_close(jacfwd(along)(x), jacrev(jacrev(jacrev(layer)))(x).sum(1))
