"""torch.func and forward mode: each transformation of the operators against the same one of the reference."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import ilvae_fast as il
from cases import EMBEDDINGS, SMALL
from ilvae_fast import functional
from raw_operators import potential_and_map


def _map_of(tensors):
    _, skip, bias, weights = tensors.positional()
    options = tensors.options()

    def function(x, skip=skip, bias=bias, weights=weights, constant=options["inverse_lipschitz"]):
        return functional.brenier_map(x, skip, bias, weights, **{**options, "inverse_lipschitz": constant})

    return function


def _transformed(name, tensors, compiled=False):
    """The named transformation of the current backend's map."""
    x, skip, bias, weights = tensors.positional()
    tangent = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    t = _map_of(tensors)
    options = tensors.options()

    def phi(x):
        return functional.potential(x, skip, bias, weights, **options)

    def terms(x, v):
        gradients = functional.brenier_map_vjp(
            x, skip, bias, weights, **options, map_cotangent=v, wrt=("x", "bias", "weights")
        )
        return gradients.x, gradients.bias, gradients.weights

    def along(x):
        return functional.brenier_map_jvp(x, tangent.expand_as(x), skip, bias, weights, **options)[1]

    parameters = (skip, bias, weights, options["inverse_lipschitz"])
    cases = {
        "grad": lambda x: grad(lambda x: phi(x).sum())(x),
        "grad of parameters": lambda x: grad(lambda p: (t(x, *p) ** 3).sum())(parameters),
        "vjp": lambda x: vjp(t, x)[1](torch.ones_like(tensors.v)),
        "jvp": lambda x: jvp(t, (x,), (tangent,)),
        "jvp of parameters": lambda x: jvp(
            lambda s, w: t(x, s, bias, w), (skip, weights), (torch.ones_like(skip), [0.3 * w for w in weights])
        ),
        "jacrev": lambda x: jacrev(t)(x),
        "vmap of jacrev": lambda x: vmap(jacrev(t))(x),
        "jacfwd": lambda x: jacfwd(t)(x),
        "vmap of jacfwd": lambda x: vmap(jacfwd(t))(x),
        "vmap of hessian": lambda x: vmap(hessian(phi))(x),
        "forward over reverse": lambda x: vmap(jacfwd(grad(lambda x: (t(x) ** 2).sum())))(x),
        "reverse over forward": lambda x: grad(lambda x: jvp(t, (x,), (tangent,))[1].square().sum())(x),
        "third order": lambda x: grad(lambda x: (jacrev(grad(lambda x: (t(x) ** 2).sum()))(x) ** 2).sum())(x),
        "per-sample gradients": lambda x: vmap(grad(lambda s, x: (t(x, s) ** 2).sum()), (None, 0))(skip, x),
        "vmap over parameters": lambda x: vmap(lambda s: t(x, s))(torch.stack([skip, 2 * skip])),
        "vmap over another dimension": lambda x: vmap(t, 1, 1)(x.unsqueeze(1).expand(-1, 4, -1)),
        "vmap of vmap": lambda x: vmap(vmap(t))(x.unflatten(0, (2, -1))),
        "vmap of the training terms": lambda x: vmap(terms)(x, torch.ones_like(tensors.v)),
        "grad of the jvp function": lambda x: grad(lambda x: along(x).square().sum())(x),
        # expanded, as where all columns of a Jacobian are asked for at once
        "jvp of the jvp function": lambda x: jvp(along, (x.expand(2, *x.shape),), (tangent.expand(2, *x.shape),)),
        "forward_ad": lambda x: _forward_ad(t, x, tangent),
        "forward_ad of the jvp function": lambda x: _forward_ad(along, x, tangent),
        "forward_ad of the training terms": lambda x: _forward_ad(lambda x: terms(x, tensors.v)[0], x, tangent),
    }
    function = cases[name]
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    result = function(x)
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def _forward_ad(function, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent.clone()


TRANSFORMATIONS = [
    "grad",
    "grad of parameters",
    "vjp",
    "jvp",
    "jvp of parameters",
    "jacrev",
    "vmap of jacrev",
    "jacfwd",
    "vmap of jacfwd",
    "vmap of hessian",
    "forward over reverse",
    "reverse over forward",
    "third order",
    "per-sample gradients",
    "vmap over parameters",
    "vmap over another dimension",
    "vmap of vmap",
    "vmap of the training terms",
    "grad of the jvp function",
    "jvp of the jvp function",
    "forward_ad",
    "forward_ad of the jvp function",
    "forward_ad of the training terms",
]


@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_torch_func(name, embedding):
    tensors = replace(SMALL, embedding=embedding).tensors(torch.float64)
    with il.use_backend("reference"):
        expected = _transformed(name, tensors)
    ours = _transformed(name, tensors)
    assert len(ours) == len(expected) > 0
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11 * (1 + float(b.abs().max())))


@pytest.mark.parametrize("name", ["grad", "grad of parameters", "jvp", "vmap of jacrev"])
def test_torch_func_inside_a_compiled_region(name):
    tensors = SMALL.tensors(torch.float64)
    expected = _transformed(name, tensors)
    for a, b in zip(_transformed(name, tensors, compiled=True), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_an_outer_backward_sees_through_torch_func():
    tensors = replace(SMALL, embedding="dense").tensors(torch.float64).requires_grad()
    t = _map_of(tensors)
    x = tensors.named["x"].detach()
    loss = jvp(t, (x,), (torch.ones_like(x),))[1].square().sum()
    ours = torch.autograd.grad(loss, tensors.named["skip_weight"])
    with il.use_backend("reference"):
        loss = jvp(t, (x,), (torch.ones_like(x),))[1].square().sum()
        theirs = torch.autograd.grad(loss, tensors.named["skip_weight"])
    torch.testing.assert_close(ours, theirs)


def test_functional_call_and_ensembles():
    layers = [il.BrenierMap(3, (4,), dtype=torch.float64) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(5, 3, dtype=torch.float64)
    ours = vmap(lambda p, b: functional_call(layers[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(ours, torch.stack([layer(x) for layer in layers]))


@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize("way", ["is_grads_batched", "vmap"])
@pytest.mark.parametrize("name", ["brenier_map", "potential", "jvp", "vjp"])
def test_batched_cotangents_equal_single_ones(name, way, embedding):
    tensors = replace(SMALL, embedding=embedding).tensors(torch.float64)
    tensors.requires_grad()
    x, *rest = tensors.positional()
    variables = [x, rest[0], rest[1], *rest[2]]
    options = tensors.options()
    value = {
        "brenier_map": lambda: functional.brenier_map(x, *rest, **options),
        "potential": lambda: functional.potential(x, *rest, **options),
        "jvp": lambda: functional.brenier_map_jvp(x, x.detach().flip(0), *rest, **options)[1],
        "vjp": lambda: functional.brenier_map_vjp(x, *rest, map_cotangent=tensors.v, **options).skip_weight,
    }[name]()

    def pull(cotangent, **how):
        return torch.autograd.grad(value, variables, cotangent, retain_graph=True, allow_unused=True, **how)

    for count in (0, 1, 3) if way == "vmap" else (1, 3):
        cotangents = torch.randn(count, *value.shape, dtype=torch.float64)
        batched = pull(cotangents, is_grads_batched=True) if way != "vmap" else vmap(pull)(cotangents)
        one_by_one = [pull(c) for c in cotangents]
        for k, (variable, ours) in enumerate(zip(variables, batched, strict=True)):
            assert ours.shape == (count, *variable.shape)
            for a, b in zip(ours, one_by_one, strict=True):
                assert torch.equal(a, b[k])


def test_nested_batches_of_cotangents():
    layer = il.BrenierMap(3, (4, 5), dtype=torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    variables, t = [x, *layer.parameters()], layer(x)

    def pull(v, scale):
        return torch.autograd.grad(t, variables, v * scale, retain_graph=True)

    v, scale = torch.randn(4, 2, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    nested = vmap(vmap(pull, (None, 0)), (0, None))(v, scale)
    for a, b in zip(nested, pull(v[3], scale[2]), strict=True):
        torch.testing.assert_close(a[3, 2], b)


def test_vectorised_jacobians_and_hessians():
    layer = il.BrenierMap(3, (4, 5), dtype=torch.float64)
    x = torch.randn(3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(layer, x, vectorize=True)
    torch.testing.assert_close(jacobian, layer.jacobian(x))
    hessian = torch.autograd.functional.hessian(layer.potential, x, vectorize=True)
    torch.testing.assert_close(hessian, layer.jacobian(x))


def test_forward_mode_under_autocast_has_one_dtype():
    layer, x = il.BrenierMap(3, (5,)), torch.randn(4, 3)

    def function(x):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        return y @ y.mT

    value, derivative = jvp(function, (x,), (torch.ones_like(x),))
    assert value.dtype == derivative.dtype == torch.bfloat16
    exact = jvp(lambda x: layer(x) @ layer(x).mT, (x,), (torch.ones_like(x),))[1]
    assert float((derivative.float() - exact).norm() / exact.norm()) < 0.05
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(function(forward_ad.make_dual(x, x))).tangent.dtype == torch.bfloat16


def test_functionalisation_sees_the_operators():
    layer, x = il.BrenierMap(3, (5,), dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(functionalize(layer)(x), layer(x))
    graph = make_fx(functionalize(layer))(x).graph
    assert potential_and_map.overload in [node.target for node in graph.nodes]
