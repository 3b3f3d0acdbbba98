"""torch.compile: compiled layers and decoders compute what they compute without it."""

import pytest
import torch
from torch._dynamo import compiled_autograd
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import ilvae_fast as il


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


# Inductor reads what other backends of torch.compile do not look at
@pytest.mark.parametrize("name", ["potential_and_map", "jvp"])
def test_compiled_methods_train(name):
    dtype = torch.float64
    layer = il.BrenierMap(5, (8, 7), inverse_lipschitz=il.Trained(0.5), dtype=dtype)
    x = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    variables = [x, *layer.parameters()]

    def loss(x):
        values = layer.jvp(x, x + 1) if name == "jvp" else getattr(layer, name)(x)
        return sum(v.square().sum() for v in (values if isinstance(values, tuple) else (values,)))

    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), variables)
    expected = torch.autograd.grad(loss(x), variables)
    torch.testing.assert_close(compiled, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["checkpoint in region", "region in checkpoint"])
@pytest.mark.parametrize(("name", "nonneg"), [("forward", "softplus"), ("jvp", "abs"), ("decoder", "abs")])
def test_compiled_checkpoints(name, nonneg, kind):
    dtype = torch.float64
    layer = (
        il.BrenierDecoder(5, 9, nonneg=nonneg, dtype=dtype)
        if name == "decoder"
        else il.BrenierMap(5, (8, 7), nonneg=nonneg, dtype=dtype)
    )
    x = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    variables = [x, *layer.parameters()]

    def loss(x):
        value = layer.jvp(x, 2 * x)[1] if name == "jvp" else layer(x)
        return (value * 1.0).square().sum()

    def checkpointed(function):
        return lambda x: checkpoint(function, x, use_reentrant=False)

    tried = torch.compile(checkpointed(loss)) if kind == "checkpoint in region" else checkpointed(torch.compile(loss))
    compiled = torch.autograd.grad(tried(x), variables)
    torch.testing.assert_close(compiled, torch.autograd.grad(loss(x), variables), rtol=1e-10, atol=1e-10)


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


@pytest.mark.parametrize("nonneg", ["square", "softplus"])
@pytest.mark.parametrize("name", ["forward", "potential", "jvp"])
def test_compiled_autograd_of_an_eager_forward_pass(name, nonneg):
    layer = il.BrenierMap(3, (4, 5), nonneg=nonneg, inverse_lipschitz=il.Trained(0.5), dtype=torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    variables = [x, *layer.parameters()]

    def loss():
        value = layer.jvp(x, x.detach())[1] if name == "jvp" else getattr(layer, name)(x)
        return value.square().sum()

    expected = torch.autograd.grad(loss(), variables)
    value = loss()
    torch._dynamo.reset()
    counters["compiled_autograd"].clear()
    with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="aot_eager")):
        value.backward()
    assert counters["compiled_autograd"]["captures"] == 1
    torch.testing.assert_close([v.grad for v in variables], list(expected), rtol=1e-12, atol=1e-12)
