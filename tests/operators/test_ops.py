"""The operators under PyTorch's transformations: opcheck, torch.compile, torch.func, forward mode."""

import threading
import time
from typing import ClassVar

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ilvae_fast as il
from cases import Case
from ilvae_fast import functional

OPS = torch.ops.ilvae_fast
ACTIVATIONS = tuple(map(il.Activation, ("softplus", "celu", "softplus")))
EMBEDDINGS = ["none", "identity", "dense"]
RELEASE = tuple(int(part) for part in torch.__version__.split(".")[:2])


def _tensors(embedding, dtype=torch.float64, leading=(6,)):
    return Case(3, (4, 5), ACTIVATIONS, embedding, leading, 0.5, 11).tensors(dtype)


def _operands(tensors):
    n = tensors.named
    x, skip, bias, weights = tensors.positional()
    return x, skip, bias, weights, n["inverse_lipschitz"], n.get("embedding")


CODES = ([0, 3, 0], [1.0, 1.0, 1.0])


@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck(embedding, requires_grad, dtype):
    tensors = _tensors(embedding, dtype, leading=(2, 3))
    if requires_grad:
        tensors.requires_grad()
    operands = _operands(tensors)
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if dtype == torch.float64:  # compares gradients to rounding
        utilities.append("test_aot_dispatch_dynamic")
    for wanted in [(True, True), (False, True), (True, False)]:
        opcheck(OPS.potential_and_map.default, (*operands, *CODES, *wanted), test_utils=utilities)
    if not requires_grad:
        opcheck(OPS.potential_and_map.default, (*operands, *CODES, True, True, True), test_utils=utilities)
    if requires_grad and RELEASE < (2, 13):
        # differentiating the training terms takes torch.func three levels deep, which older AOTAutograd refuses
        utilities = [name for name in utilities if name != "test_aot_dispatch_dynamic"]
    everything = 0b1111111 if embedding == "dense" else 0b1101111
    for v, u in [(tensors.v, None), (None, tensors.u), (tensors.v, tensors.u)]:
        for wanted in (everything, 0b1):
            opcheck(OPS.training_terms.default, (*operands, v, u, [], *CODES, wanted), test_utils=utilities)
    opcheck(OPS.map_jvp.default, (*operands, torch.randn_like(operands[0]), *CODES), test_utils=utilities)


def test_the_operator_itself_refuses_forward_mode_and_saving_under_autograd():
    tensors = _tensors("none")
    x, *rest = _operands(tensors)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        OPS.potential_and_map(forward_ad.make_dual(x, x), *rest, *CODES, False, True)
    with pytest.raises(ValueError, match="save: got True"):
        OPS.potential_and_map(x.requires_grad_(), *rest, *CODES, False, True, True)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_training_terms_refuse_what_was_not_saved_for_them(embedding):
    tensors = _tensors(embedding)
    operands = _operands(tensors)
    saved = OPS.potential_and_map(*operands, *CODES, False, True, True)[2]
    good = OPS.training_terms(*operands, tensors.v, None, saved, *CODES, 1)[0]
    torch.testing.assert_close(good, OPS.training_terms(*operands, tensors.v, None, [], *CODES, 1)[0])
    potential_only = OPS.potential_and_map(*operands, *CODES, True, False, True)[2]
    torch.testing.assert_close(good, OPS.training_terms(*operands, tensors.v, None, potential_only, *CODES, 1)[0])
    wrong = [
        saved[:2],
        [saved[0][:3], *saved[1:]],
        [saved[0].float(), *saved[1:]],
        [saved[0].t().contiguous().t(), *saved[1:]],
        [saved[0], saved[1][:, :2], saved[2]],
        [torch.ones(3, dtype=torch.float64)] * 3,
    ]
    for bad in wrong:
        with pytest.raises(ValueError, match="saved"):
            OPS.training_terms(*operands, tensors.v, None, bad, *CODES, 1)
    for wanted in (-1, 1 << 40):
        with pytest.raises(ValueError, match="wanted: got"):
            OPS.training_terms(*operands, tensors.v, None, [], *CODES, wanted)
    for codes in ([9, 3, 0], [-1, 3, 0], [0, 6, 0], [0, 3]):
        with pytest.raises(ValueError, match="activations"):
            OPS.potential_and_map(*operands, codes, CODES[1], False, True)


# torch.func: each transformation against the same one of the reference


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
    tensors = _tensors(embedding)
    with il.use_backend("reference"):
        expected = _transformed(name, tensors)
    ours = _transformed(name, tensors)
    assert len(ours) == len(expected) > 0
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11 * (1 + float(b.abs().max())))


@pytest.mark.parametrize("name", ["grad", "grad of parameters", "jvp", "vmap of jacrev"])
def test_torch_func_inside_a_compiled_region(name):
    tensors = _tensors("none")
    expected = _transformed(name, tensors)
    for a, b in zip(_transformed(name, tensors, compiled=True), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_an_outer_backward_sees_through_torch_func():
    tensors = _tensors("dense").requires_grad()
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
def test_a_batch_of_cotangents_is_one_after_the_other(name, way, embedding):
    tensors = _tensors(embedding)
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
    assert OPS.potential_and_map.default in [node.target for node in graph.nodes]


# torch.compile


@pytest.mark.parametrize("embedding", ["identity", "orthogonal", "full_rank"])
def test_compiled_decoder_forward_and_backward(embedding):
    decoder = il.BrenierDecoder(3, 6, ((8,), (9, 8)), embedding=embedding, dtype=torch.float64)
    compiled = torch.compile(decoder, fullgraph=True)
    z = torch.randn(16, 3, dtype=torch.float64, requires_grad=True)
    variables = [z, *decoder.parameters()]
    for rows in (16, 7):
        results = []
        for module in (compiled, decoder):
            value = module(z[:rows])
            results.append([value, *torch.autograd.grad(value.square().sum(), variables)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_compiled_methods():
    layer = il.BrenierMap(5, (8, 7), dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    for name, arguments in {"potential": (x,), "potential_and_map": (x,), "jvp": (x, x), "jacobian": (x,)}.items():
        method = getattr(layer, name)
        torch.testing.assert_close(torch.compile(method, fullgraph=True)(*arguments), method(*arguments))


def test_compiled_under_autocast():
    layer = il.BrenierMap(5, (8, 7))
    x = torch.randn(4, 5)
    compiled = torch.compile(layer, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = compiled(x), layer(x)
    assert a.dtype == torch.bfloat16
    torch.testing.assert_close(a, b)


def test_a_schedule_of_constants_compiles_once():
    layer = il.BrenierMap(5, (8, 7))
    count = 0

    def backend(graph, _):
        nonlocal count
        count += 1
        return graph

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = torch.randn(4, 5)
    results = []
    for constant in (0.1, 0.2, 0.5, 1.0, 2.0):
        layer.inverse_lipschitz = constant
        results.append(compiled(x))
        torch.testing.assert_close(results[-1], layer(x))
    assert count == 1
    torch.testing.assert_close(results[-1] - results[0], 1.9 * x)


def test_double_backward_of_a_compiled_region_is_refused():
    layer = il.BrenierMap(3, (4,))
    compiled = torch.compile(layer, backend="aot_eager")
    x = torch.randn(2, 3, requires_grad=True)
    loss = compiled(x).square().sum()
    with pytest.raises(RuntimeError, match=r"double backward|create_graph=False"):
        torch.autograd.grad(torch.autograd.grad(loss, x, create_graph=True)[0].sum(), x)


class _Watched(torch.Tensor):
    seen: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, arguments, options or {})


class _FunctionMode(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, arguments=(), options=None):
        self.seen.append(function)
        return function(*arguments, **(options or {}))


class _DispatchMode(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.seen.append(function)
        return function(*arguments, **(options or {}))


def _each_operator(tensors, x):
    """Every operator once, by its function."""
    _, *arguments = tensors.positional()
    options = {"activations": ACTIVATIONS, "inverse_lipschitz": tensors.named["inverse_lipschitz"]}
    t = functional.brenier_map(x, *arguments, **options)
    g = functional.brenier_map_vjp(x, *arguments, map_cotangent=tensors.v, **options)
    return t, g.x, functional.brenier_map_jvp(x, torch.ones_like(x), *arguments, **options)[1]


NAMES = ("potential_and_map", "training_terms", "map_jvp")


@pytest.mark.parametrize("how", ["__torch_function__", "function mode", "dispatch mode", "make_fx", "jit.trace"])
def test_whoever_watches_sees_the_operators(how):
    """Calls go to the operators directly where nobody watches, and nobody may lose sight of one by that."""
    tensors = _tensors("none")
    x = tensors.named["x"]
    expected = _each_operator(tensors, x)
    if how in ("make_fx", "jit.trace"):

        def function(x):
            return _each_operator(tensors, x)

        if how == "make_fx":
            graph = make_fx(function)(x)
            seen = {str(node.target) for node in graph.graph.nodes}
            assert {f"ilvae_fast.{name}.default" for name in NAMES} <= seen
        else:
            graph = torch.jit.trace(function, x)
            assert all(f"ilvae_fast::{name}" in str(graph.inlined_graph) for name in NAMES)
        for a, b in zip(graph(2 * x), function(2 * x), strict=True):
            torch.testing.assert_close(a, b)
        return
    if how == "__torch_function__":
        _Watched.seen.clear()
        results = _each_operator(tensors, x.as_subclass(_Watched))
        seen = _Watched.seen
        assert all(type(r) is _Watched for r in results)
    else:
        with _FunctionMode() if how == "function mode" else _DispatchMode() as mode:
            results = _each_operator(tensors, x)
        seen = mode.seen
    assert {getattr(OPS, name).default for name in NAMES} <= set(seen)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a.as_subclass(torch.Tensor), b)


def test_an_argument_of_the_wrong_type_is_named():
    tensors = _tensors("none")
    x, skip, bias, weights = tensors.positional()
    for bad in ((x, skip.numpy(), bias, weights), (x, skip, bias, [*weights[:-1], 3])):
        with pytest.raises((TypeError, RuntimeError), match="skip_weight" if bad[1] is not skip else "weights"):
            functional.brenier_map(*bad, activations=ACTIVATIONS)


def test_other_python_threads_run_during_a_call():
    layer = il.BrenierMap(64, (256, 256)).requires_grad_(False)
    thread = threading.Thread(target=layer, args=(torch.randn(1 << 18, 64),))
    thread.start()
    ticks = 0
    while thread.is_alive():
        time.sleep(1e-3)
        ticks += 1
    assert ticks > 20
