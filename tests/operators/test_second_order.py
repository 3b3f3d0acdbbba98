"""Derivatives of derivatives that the operators make themselves: equal to the reference, and not by way of it."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import ilvae_fast as il
from ilvae_fast.operators import log
from ilvae_fast.operators.hessian import hessian as closed_hessian
from ilvae_fast.operators.transforms import pull_back

F64 = {"dtype": torch.float64}
EMBEDDINGS = ["none", "identity", "dense"]


class Problem:
    """A potential of x with all its operands as variables."""

    def __init__(self, embedding="none", output="softplus", rows=(6,)):
        torch.manual_seed(0)
        m = 3 if embedding == "none" else 2
        self.layer = il.BrenierMap(3, (5, 4), output_activation=output, inverse_lipschitz=il.Trained(0.3), **F64)
        self.x = torch.randn(*rows, m, requires_grad=True, **F64)
        self.embedding = {"none": None, "identity": 3, "dense": torch.randn(3, m, requires_grad=True, **F64)}[embedding]
        self.variables = [self.x, *self.layer.parameters()]
        if isinstance(self.embedding, torch.Tensor):
            self.variables.append(self.embedding)

    def arguments(self):
        layer = self.layer
        activations = ("softplus", "softplus", layer._activations.layers[-1])
        options = {"inverse_lipschitz": layer.inverse_lipschitz, "embedding": self.embedding}
        return (layer.skip_weight, layer.bias, layer.nonneg_weights()), {"activations": activations, **options}

    def potential(self, x):
        operands, options = self.arguments()
        return il.functional.potential(x, *operands, **options)

    def map(self, x):
        operands, options = self.arguments()
        return il.functional.brenier_map(x, *operands, **options)


@pytest.fixture
def never_plain(monkeypatch):
    """Calls by plain autograd, as the log of choices has them; the list stays empty where there are none."""
    calls = []
    monkeypatch.setattr(log, "plain", lambda function, x: calls.append(function))
    return calls


def _compared(function, calls):
    ours = function()
    assert calls == []
    with il.use_backend("reference"):
        expected = function()
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11 * (1 + float(b.detach().abs().max())))
    calls.clear()


@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize("rows", [(), (6,), (2, 3)])
def test_code_that_takes_the_map_by_autograd_of_the_potential(embedding, rows, never_plain):
    problem = Problem(embedding, rows=rows)
    u = torch.randn(rows, requires_grad=True, **F64)

    def step():
        (g,) = torch.autograd.grad((u * problem.potential(problem.x)).sum(), problem.x, create_graph=True)
        return torch.autograd.grad(g.pow(3).sum(), [u, *problem.variables])

    _compared(step, never_plain)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_gradients_in_the_cotangent_of_a_product(embedding, never_plain):
    problem = Problem(embedding)
    v = torch.randn(6, 3, requires_grad=True, **F64)

    def step():  # forward mode by double backward, as torch.autograd.functional.jvp does it
        (g,) = torch.autograd.grad(problem.map(problem.x), problem.x, v, create_graph=True)
        return torch.autograd.grad(g.pow(2).sum(), v)

    _compared(step, never_plain)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_gradients_in_the_tangent_of_a_jvp(embedding, never_plain):
    problem = Problem(embedding)
    tangent = torch.randn_like(problem.x).requires_grad_()

    def step():
        operands, options = problem.arguments()
        _, along = il.functional.brenier_map_jvp(problem.x, tangent, *operands, **options)
        return torch.autograd.grad(along.pow(2).sum(), tangent)

    _compared(step, never_plain)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize("output", ["identity", "softplus"])
@pytest.mark.parametrize(
    "name", ["hessian", "jacfwd of grad", "jvp of grad", "jacfwd of the map", "jvp of the potential", "dual level"]
)
def test_forward_mode_in_x(embedding, output, name, never_plain):
    problem = Problem(embedding, output)
    x, v = problem.x.detach(), torch.randn_like(problem.x)

    def level():
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, v)
            return [forward_ad.unpack_dual(f(dual)).tangent for f in (problem.potential, problem.map)]

    functions = {
        "hessian": lambda: [vmap(hessian(problem.potential))(x)],
        "jacfwd of grad": lambda: [vmap(jacfwd(grad(problem.potential)))(x)],
        "jvp of grad": lambda: [jvp(lambda x: grad(lambda x: problem.potential(x).sum())(x), (x,), (v,))[1]],
        "jacfwd of the map": lambda: [vmap(jacfwd(problem.map))(x)],
        "jvp of the potential": lambda: jvp(problem.potential, (x,), (v,)),
        "dual level": level,
    }
    with torch.no_grad():
        _compared(functions[name], never_plain)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize("of", ["potential", "map"])
def test_third_derivatives(embedding, of):
    problem = Problem(embedding)

    def step():
        value = getattr(problem, of)(problem.x)
        (first,) = torch.autograd.grad(value.pow(2).sum(), problem.x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), problem.x, create_graph=True)
        return torch.autograd.grad(second.pow(2).sum(), problem.variables)

    ours = step()
    with il.use_backend("reference"):
        expected = step()
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * (1 + float(b.abs().max())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_gradient_in_lower_precision(dtype):
    torch.manual_seed(0)
    exact = il.BrenierMap(8, (32, 16), **F64)
    layer = il.BrenierMap(8, (32, 16), dtype=dtype)
    layer.load_state_dict(exact.state_dict())
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(64, 8, dtype=dtype)

    def step(layer, x):
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(layer.potential(x).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), [x, *layer.parameters()])

    for a, b in zip(step(layer, x), step(exact, x.double()), strict=True):
        assert a.dtype == dtype
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * float(b.abs().max()))


# The closed Hessian


@pytest.mark.parametrize("output", ["identity", "softplus"])
@pytest.mark.parametrize("activation", ["softplus", "celu", "leaky_relu", "smooth_leaky_relu"])
@pytest.mark.parametrize(("d", "rows"), [(1, (3,)), (3, ()), (3, (2, 4)), (7, (2,))])
def test_the_closed_hessian_and_its_gradients(output, activation, d, rows):
    torch.manual_seed(0)
    options = {"activation": activation, "output_activation": output, "inverse_lipschitz": il.Trained(0.3)}
    layer = il.BrenierMap(d, (5, 4, 6), **options, **F64)
    x = torch.randn(*rows, d, requires_grad=True, **F64)
    ours = closed_hessian(layer.operands(x))
    with il.use_backend("reference"):
        expected = torch.stack([layer.jvp(x, e.expand_as(x))[1] for e in torch.eye(d, **F64)], -1)
    torch.testing.assert_close(ours, expected)
    variables = [x, *layer.parameters()]
    options = {"create_graph": True, "materialize_grads": True}  # no curvature, no gradient
    pairs = [torch.autograd.grad(h.pow(3).sum(), variables, **options) for h in (ours, expected)]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    if activation != "leaky_relu":
        pairs = [torch.autograd.grad(sum(g.pow(2).sum() for g in gradients), variables) for gradients in pairs]
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_closed_hessian_in_lower_precision(dtype):
    torch.manual_seed(0)
    layer = il.BrenierMap(4, (16, 8), dtype=dtype)
    x = torch.randn(32, 4, dtype=dtype)
    ours = closed_hessian(layer.operands(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(closed_hessian(layer.operands(x)), ours)
    exact = il.BrenierMap(4, (16, 8), **F64)
    exact.load_state_dict(layer.state_dict())
    expected = closed_hessian(exact.operands(x.double()))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


# Hooks of saved tensors, which torch.func refuses


def _penalty(layer, x):
    (g,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    return g.square().sum()


def test_second_order_with_saved_tensors_elsewhere():
    torch.manual_seed(0)
    layer, x = il.BrenierMap(3, (5, 4), **F64), torch.randn(6, 3, requires_grad=True, **F64)
    variables = [x, *layer.parameters()]
    expected = torch.autograd.grad(_penalty(layer, x), variables)
    with torch.autograd.graph.save_on_cpu():
        offloaded = torch.autograd.grad(_penalty(layer, x), variables)
    checkpointed = torch.autograd.grad(checkpoint(_penalty, layer, x, use_reentrant=False), variables)
    for a, b, c in zip(expected, offloaded, checkpointed, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_a_pull_back_of_what_does_not_depend_on_its_argument():
    a = torch.randn(3)
    (value, _), pull = pull_back(lambda t: (2 * t, torch.ones(2)), (a,))
    assert not value.requires_grad
    assert torch.equal(pull((torch.ones(3), torch.ones(2)))[0], torch.full((3,), 2.0))
    _, pull = pull_back(lambda t: (torch.ones(2),), (a,))
    assert torch.equal(pull((torch.ones(2),))[0], torch.zeros(3))


def test_values_of_the_reference_require_gradients_only_where_operands_do():
    layer, x = il.BrenierMap(3, (5, 4)).requires_grad_(False), torch.randn(6, 3)
    with il.use_backend("reference"):
        assert not any(t.requires_grad for t in layer.jvp(x, x))
        assert not any(g.requires_grad for g in _vjp(layer, x))
        assert layer.jvp(x, x.clone().requires_grad_())[1].requires_grad
        assert layer.jvp(x.clone().requires_grad_(), x)[1].requires_grad
        assert _vjp(layer, x, x.clone().requires_grad_())[0].requires_grad


def _vjp(layer, x, v=None):
    options = {"activations": layer._activations, "wrt": ("x", "bias")}
    operands = layer.skip_weight, layer.bias, layer.nonneg_weights()
    gradients = il.functional.brenier_map_vjp(x, *operands, map_cotangent=x if v is None else v, **options)
    return [gradients.x, gradients.bias]


def test_jacobians_by_both_modes_agree_with_plain():
    problem = Problem()
    with torch.no_grad():
        forward, backward = (vmap(mode(problem.map))(problem.x) for mode in (jacfwd, jacrev))
        with il.use_backend("reference"):
            expected = vmap(jacrev(problem.map))(problem.x)
    torch.testing.assert_close(forward, expected)
    torch.testing.assert_close(backward, expected)
