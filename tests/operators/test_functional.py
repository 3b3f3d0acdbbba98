"""Values and gradients of the functions against the reference, in every dtype; calling conventions; refusals."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ilvae_fast as il
from cases import EMBEDDINGS, SMALL, WAYS, Case, cases
from comparison import assert_as_accurate_as_eager, assert_equal_to_rounding
from ilvae_fast import Activation, functional, reference
from ilvae_fast.operators import operands
from raw_operators import Operands, training_terms

COTANGENTS = [(True, False), (False, True), (True, True)]


@given(cases(), st.sampled_from(COTANGENTS))
def test_float64_values_and_gradients_equal_the_reference(case, cotangents):
    tensors = case.tensors(torch.float64)
    for name, ours, theirs in zip(
        ("potential", "map"), tensors.outputs(functional), tensors.outputs(reference), strict=True
    ):
        assert_equal_to_rounding(name, ours.detach(), theirs.detach())
    expected = tensors.gradients(reference, *cotangents)
    terms = tensors.absolute_terms(*cotangents)
    for name, ours in tensors.gradients(functional, *cotangents).items():
        assert_equal_to_rounding(f"gradient of {name}", ours, expected[name], terms.get(name))


def _low_precision(dtype):
    # In 16 bits, rounding decides on which side of a kink of s or s' a pre-activation falls.
    smooth = ["softplus", "smooth_leaky_relu", "identity"]
    kinds = {"first": smooth, "later": smooth} if dtype == torch.bfloat16 else {}
    # 64 rows, and six orders of units and coordinates below: a single eager error varies too much
    return st.tuples(st.just(dtype), cases(max_depth=6, max_width=40, leading=(64,), **kinds))


@given(st.sampled_from([torch.float32, torch.bfloat16]).flatmap(_low_precision), st.sampled_from(COTANGENTS))
def test_low_precision_is_as_accurate_as_eager(dtype_and_case, cotangents):
    dtype, case = dtype_and_case
    tensors = case.tensors(dtype)
    if dtype == torch.bfloat16:
        # We round products before the bias is added, eager after: where the bias cancels them, eager is more accurate.
        tensors.named["bias"].zero_()
    orders = [tensors.rearranged(seed) for seed in range(6)]
    exact = tensors.double()

    names = ("potential", "map")
    outputs = [restore(dict(zip(names, t.outputs(reference), strict=True))) for t, restore in orders]
    for name, ours, truth in zip(names, tensors.outputs(), exact.outputs(reference), strict=True):
        eager = torch.stack([o[name] for o in outputs])
        assert_as_accurate_as_eager(name, ours.detach(), eager, truth.detach())

    terms = tensors.absolute_terms(*cotangents)
    gradients = [restore(t.gradients(reference, *cotangents)) for t, restore in orders]
    truth = exact.gradients(reference, *cotangents)
    for name, ours in tensors.gradients(functional, *cotangents).items():
        assert ours.dtype == tensors.named[name].dtype
        eager = torch.stack([g[name].detach() for g in gradients])
        assert_as_accurate_as_eager(f"gradient of {name}", ours, eager, truth[name], terms.get(name))


@given(cases(empty=False), st.sampled_from(COTANGENTS), st.sets(st.sampled_from(functional.BrenierGradients._fields)))
def test_vjp_computes_what_is_asked_and_nothing_else(case, cotangents, wrt):
    tensors = case.tensors(torch.float64)
    with_map, with_potential = cotangents
    result = functional.brenier_map_vjp(
        *tensors.positional(),
        **tensors.options(),
        map_cotangent=tensors.v if with_map else None,
        potential_cotangent=tensors.u if with_potential else None,
        wrt=tuple(wrt),
    )
    expected = tensors.gradients(reference, *cotangents)
    terms = tensors.absolute_terms(*cotangents)
    for name in functional.BrenierGradients._fields:
        value = getattr(result, name)
        if name not in wrt or (name == "embedding" and case.embedding != "dense"):
            assert value is None
        elif name == "weights":
            for k, w in enumerate(value):
                assert_equal_to_rounding(name, w, expected[f"weights[{k}]"], terms[f"weights[{k}]"])
        else:
            assert_equal_to_rounding(name, value, expected[name], terms.get(name))


@given(cases(empty=False))
def test_jvp_equals_the_reference(case):
    tensors = case.tensors(torch.float64)
    x, *rest = tensors.positional()
    tangent = torch.randn_like(x)
    ours = functional.brenier_map_jvp(x, tangent, *rest, **tensors.options())
    with il.use_backend("reference"):
        theirs = functional.brenier_map_jvp(x, tangent, *rest, **tensors.options())
    assert_equal_to_rounding("map", ours[0], theirs[0])
    assert_equal_to_rounding("derivative", ours[1], theirs[1])


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("wrt", [(), ("inverse_lipschitz",), ("embedding",)], ids=str)
def test_vjp_of_nothing_is_nothing(backend, wrt):
    """Neither a constant that is a number nor an absent embedding has a gradient."""
    tensors = SMALL.tensors(torch.float64)
    options = {**tensors.options(), "inverse_lipschitz": 0.5, "wrt": wrt}
    with il.use_backend(backend):
        assert set(functional.brenier_map_vjp(*tensors.positional(), map_cotangent=tensors.v, **options)) == {None}


CASE = Case(4, (5, 3), SMALL.activations, "none", (3,), 0.7, 1)
SMOOTH = tuple(map(il.Activation, ("softplus", "smooth_leaky_relu", "softplus")))


@pytest.mark.parametrize("embedding", ["none", "identity", "dense"])
def test_gradcheck_and_gradgradcheck(embedding):
    tensors = (
        replace(CASE, embedding=embedding, leading=(2,), activations=SMOOTH).tensors(torch.float64).requires_grad()
    )

    def both(*values):
        named = dict(zip(tensors.named, values, strict=True))
        return type(tensors)(tensors.case, named, tensors.u, tensors.v).outputs()

    inputs = tuple(tensors.named.values())
    assert torch.autograd.gradcheck(both, inputs)
    assert torch.autograd.gradgradcheck(both, inputs)
    assert torch.autograd.gradgradcheck(lambda *v: both(*v)[1], inputs)


@pytest.mark.parametrize("embedding", ["none", "identity", "dense"])
def test_gradcheck_of_training_terms_and_jvp(embedding):
    tensors = (
        replace(CASE, embedding=embedding, leading=(2,), activations=SMOOTH).tensors(torch.float64).requires_grad()
    )
    u, v = tensors.u.requires_grad_(), tensors.v.requires_grad_()
    tangent = torch.randn_like(tensors.named["x"]).requires_grad_()

    def terms(u, v, *values):
        t = type(tensors)(tensors.case, dict(zip(tensors.named, values, strict=True)), u, v)
        result = functional.brenier_map_vjp(
            *t.positional(), **t.options(), map_cotangent=v, potential_cotangent=u, wrt=("x", "bias", "weights")
        )
        return result.x, result.bias, *result.weights

    def jvp(tangent, *values):
        t = type(tensors)(tensors.case, dict(zip(tensors.named, values, strict=True)), u, v)
        x, *rest = t.positional()
        return functional.brenier_map_jvp(x, tangent, *rest, **t.options())

    assert torch.autograd.gradcheck(terms, (u, v, *tensors.named.values()))
    assert torch.autograd.gradcheck(jvp, (tangent, *tensors.named.values()))


@pytest.mark.parametrize("embedding", ["none", "identity", "dense"])
def test_third_order_equals_the_reference(embedding):
    tensors = replace(CASE, embedding=embedding, activations=SMOOTH).tensors(torch.float64).requires_grad()
    variables = list(tensors.named.values())

    def third(module):
        phi, t = tensors.outputs(module)
        total = (tensors.v * t).sum() + (tensors.u * phi).sum()
        for order in range(3):
            gradients = torch.autograd.grad(total, variables, create_graph=order < 2)
            total = sum((g * g).sum() for g in gradients)
        return gradients

    for name, ours, theirs in zip(tensors.named, third(functional), third(reference), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max())), name


def test_gradients_of_frozen_arguments_are_not_computed():
    tensors = replace(CASE, route="matmul").tensors(torch.float64)
    operands, position = Operands.of(tensors), training_terms.names.index("wanted")

    def profiled():
        """The matrix products of a backward pass, and which gradients it asks for."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            tensors.outputs()[1].sum().backward()
        events = profile.events()
        products = [e.name for e in events if e.name in ("aten::mm", "aten::addmm_")]
        (wanted,) = {e.concrete_inputs[position] for e in events if e.name == "ilvae_fast::training_terms"}
        return len(products), wanted

    tensors.named["x"].requires_grad_()
    of_x_alone, wanted = profiled()
    assert wanted == operands.wanted("x")
    tensors.requires_grad()
    of_everything, wanted = profiled()
    assert wanted == operands.wanted()
    assert tensors.named["bias"].grad is not None
    assert of_everything == of_x_alone + 2 + 2  # two for skip_weight, one for each of two weights


@pytest.mark.parametrize("leading", [(), (0,), (2, 0, 3), (2, 3), (1, 1, 1, 4)])
@pytest.mark.parametrize("embedding", ["none", "identity", "dense"])
def test_leading_shapes(leading, embedding):
    tensors = replace(CASE, leading=leading, embedding=embedding).tensors(torch.float64)
    phi, t = tensors.outputs()
    assert phi.shape == leading
    assert t.shape == (*leading, 4)
    gradients = tensors.gradients(functional, True, True)
    expected = tensors.gradients(reference, True, True)
    for name in gradients:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-12, atol=1e-13)


def test_strides_do_not_matter():
    tensors = replace(CASE, leading=(6,)).tensors(torch.float64)
    x, skip, bias, weights = tensors.positional()
    expected = tensors.outputs()[1]

    def strided(t):
        return t.new_empty(*[2 * n for n in t.shape])[tuple(slice(None, None, 2) for _ in t.shape)].copy_(t)

    ours = functional.brenier_map(
        x.t().contiguous().t(), strided(skip), strided(bias), [strided(w) for w in weights], **tensors.options()
    )
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)
    row = x[:1].expand(6, 4)
    torch.testing.assert_close(
        functional.brenier_map(row, skip, bias, weights, **tensors.options()), expected[:1].expand(6, 4)
    )
    v = tensors.v[:1].expand(6, 4)
    expanded = functional.brenier_map_vjp(x, skip, bias, weights, **tensors.options(), map_cotangent=v)
    plain = functional.brenier_map_vjp(x, skip, bias, weights, **tensors.options(), map_cotangent=v.contiguous())
    torch.testing.assert_close(expanded.skip_weight, plain.skip_weight)


def test_no_grad_and_inference_mode_give_the_same_values():
    tensors = CASE.tensors(torch.float64).requires_grad()
    expected = tensors.outputs()
    with torch.no_grad():
        ours = tensors.outputs()
    assert not ours[1].requires_grad
    torch.testing.assert_close(ours, expected)
    with torch.inference_mode():
        torch.testing.assert_close(tensors.outputs(), expected)
        torch.testing.assert_close(tensors.outputs(reference), expected)


@pytest.mark.parametrize(("route", "recompute"), WAYS)
def test_memory_saved_for_the_backward_pass(route, recompute):
    case = replace(CASE, width=20, hidden=(64, 64), leading=(256,), route=route, recompute=recompute)
    tensors = case.tensors(torch.float32).requires_grad()
    own = {t.untyped_storage().data_ptr() for t in tensors.named.values()}

    def saved_bytes(module):
        storages = {}

        def pack(t):
            if t.untyped_storage().data_ptr() not in own:
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            result = module.brenier_map(*tensors.positional(), **tensors.differentiable_options(module))
        del result
        return sum(storages.values())

    if recompute is False:
        assert 0 < saved_bytes(functional) <= saved_bytes(reference) / 2
    else:  # by default, so small a network recomputes
        assert saved_bytes(functional) == 0
    with torch.no_grad():
        assert saved_bytes(functional) == 0


def test_a_python_float_and_a_tensor_constant_agree():
    tensors = CASE.tensors(torch.float64)
    options = tensors.options()
    expected = functional.brenier_map(*tensors.positional(), **options)
    for constant in (0.7, torch.tensor(0.7, dtype=torch.float64)):
        ours = functional.brenier_map(*tensors.positional(), **{**options, "inverse_lipschitz": constant})
        torch.testing.assert_close(ours, expected)


def test_changing_an_argument_in_place_before_backward_is_refused():
    tensors = CASE.tensors(torch.float64).requires_grad()
    t = tensors.outputs()[1]
    with torch.no_grad():
        tensors.named["inverse_lipschitz"].fill_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        t.sum().backward()


@pytest.fixture
def nan_in_new_memory():
    """Every new tensor is full of NaN, so that a read of uninitialised memory shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


# Sizes that do not fill the tiles of matrix units, which may read beyond the columns of an operand (oneDNN #5717).
@pytest.mark.parametrize("hidden", [(14, 23, 15), (13, 33), (65, 64), (1, 54), (39, 97, 33)], ids=str)
@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("nan_in_new_memory")
def test_no_memory_is_read_before_it_is_written(dtype, recompute, embedding, hidden):
    case = Case(
        width=33,
        hidden=hidden,
        activations=(Activation("softplus"),) * (len(hidden) + 1),
        embedding=embedding,
        leading=(50,),
        constant=0.5,
        seed=1,
        route="matmul",
        recompute=recompute,
    )
    tensors = case.tensors(dtype)
    for name, value in zip(("potential", "map"), tensors.outputs(), strict=True):
        assert value.isfinite().all(), name
    for cotangents in COTANGENTS:
        for name, gradient in tensors.gradients(functional, *cotangents).items():
            assert gradient.isfinite().all(), f"gradient of {name}"


# refusals: the argument, what came, what was wanted

X, SKIP, BIAS = torch.randn(7, 3), torch.randn(10, 3), torch.randn(10)
WEIGHTS = [torch.rand(5, 4), torch.rand(1, 5)]
GOOD = {"x": X, "skip_weight": SKIP, "bias": BIAS, "weights": WEIGHTS, "activations": ("softplus",) * 3}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": X[:, :2]}, ValueError, r"x: got shape \(7, 2\), wanted \(\.\.\., 3\)"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: got shape"),
        ({"x": X.numpy()}, TypeError, "x: got ndarray, wanted a tensor"),
        ({"x": X.half()}, ValueError, "x: got dtype Half, wanted float64, float32 or bfloat16"),
        ({"x": X.long()}, ValueError, "x: got dtype Long"),
        ({"x": X.double()}, ValueError, "skip_weight: got dtype Float, wanted Double"),
        ({"x": X.to("meta")}, ValueError, "skip_weight: got device cpu, wanted meta"),
        ({"skip_weight": None}, TypeError, "skip_weight: got NoneType, wanted a tensor"),
        ({"skip_weight": torch.tensor(1.0)}, ValueError, "skip_weight: got a tensor without dimensions"),
        ({"skip_weight": SKIP[:9]}, ValueError, r"skip_weight: got shape \(9, 3\), wanted 10 rows"),
        ({"skip_weight": SKIP[None]}, ValueError, "skip_weight: got shape"),
        ({"bias": BIAS[:9]}, ValueError, r"bias: got shape \(9,\), wanted \(10,\)"),
        ({"weights": []}, ValueError, "weights: got none"),
        (
            {"weights": [WEIGHTS[0][:4], WEIGHTS[1]]},
            ValueError,
            r"weights\[0\]: got shape \(4, 4\), wanted as many rows",
        ),
        (
            {"weights": [WEIGHTS[0], torch.rand(2, 5)]},
            ValueError,
            r"weights\[1\]: got shape \(2, 5\), wanted \(1, n_K\)",
        ),
        ({"weights": [torch.rand(5, 0), WEIGHTS[1]]}, ValueError, r"weights\[0\]: got shape \(5, 0\)"),
        ({"activations": ("softplus",) * 2}, ValueError, "activations: got 2, wanted 3"),
        ({"activations": ("softplus",)}, ValueError, "activations: got 1"),
        ({"activations": ("softplus", "squared_leaky_relu", "relu")}, ValueError, r"activations\[1\].*non-decreasing"),
        ({"activations": ("sofplus",) * 3}, ValueError, r"activations\[0\]: got 'sofplus'.*nearest: 'softplus'"),
        ({"activations": (3, "relu", "relu")}, TypeError, r"activations\[0\]: got int"),
        ({"inverse_lipschitz": -0.1}, ValueError, "inverse_lipschitz: got -0.1, wanted a finite number >= 0"),
        ({"inverse_lipschitz": float("nan")}, ValueError, "inverse_lipschitz: got nan"),
        ({"inverse_lipschitz": float("inf")}, ValueError, "inverse_lipschitz: got inf"),
        ({"inverse_lipschitz": "1"}, TypeError, "inverse_lipschitz: got str"),
        ({"inverse_lipschitz": torch.ones(2)}, ValueError, r"inverse_lipschitz: got shape \(2,\)"),
        ({"inverse_lipschitz": torch.ones(1).half()}, ValueError, "inverse_lipschitz: got dtype Half"),
        ({"embedding": 4}, ValueError, "embedding: got 4, wanted the width of skip_weight, 3"),
        ({"embedding": torch.randn(3, 2)}, ValueError, r"embedding: got shape \(3, 2\), wanted \(3, 3\)"),
        ({"embedding": 3, "x": torch.randn(7, 4)}, ValueError, r"x: got shape \(7, 4\), wanted at most 3 columns"),
        ({"embedding": 3, "x": torch.randn(7, 0)}, ValueError, "x: got shape"),
        ({"route": "fastest"}, ValueError, "route: got 'fastest'"),
        ({"validate": True, "bias": 1.0}, TypeError, "bias: got float, wanted a tensor"),
        ({"validate": True, "bias": BIAS / 0}, ValueError, "bias: got 10 non-finite of 10 values"),
        ({"validate": True, "weights": [-WEIGHTS[0], WEIGHTS[1]]}, ValueError, r"weights\[0\]: got a smallest value"),
        (
            {"validate": True, "inverse_lipschitz": torch.tensor([-1.0])},
            ValueError,
            "inverse_lipschitz: got a smallest",
        ),
    ],
)
def test_refusals(changes, error, words):
    arguments = {**GOOD, **changes}
    with pytest.raises(error, match=words):
        functional.brenier_map(**arguments)


def test_the_arguments_that_refusals_vary_are_valid():
    assert functional.brenier_map(**GOOD, validate=True).shape == (7, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "got neither"),
        ({"map_cotangent": torch.randn(7, 2)}, r"map_cotangent: got shape \(7, 2\), wanted \(7, 3\)"),
        ({"map_cotangent": torch.randn(6, 3)}, "map_cotangent: got shape"),
        ({"potential_cotangent": torch.randn(7, 1)}, r"potential_cotangent: got shape \(7, 1\), wanted \(7\)"),
        ({"potential_cotangent": torch.ones(7).long()}, "potential_cotangent: got dtype Long"),
        ({"map_cotangent": X, "wrt": ("weight",)}, "wrt: got 'weight'.*nearest: 'weights'"),
    ],
)
def test_refusals_of_cotangents(options, words):
    with pytest.raises(ValueError, match=words):
        functional.brenier_map_vjp(**GOOD, **options)


def test_refusals_hold_for_symbolic_shapes_too():
    compiled = torch.compile(lambda x: functional.brenier_map(**{**GOOD, "x": x}), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="wanted"):
        compiled(X.half())


def test_a_cached_constant_serves_every_mode():
    from torch._subclasses import FakeTensorMode

    case = {"activations": ["softplus", "identity"], "inverse_lipschitz": 0.123}
    shapes = [(3, 2), (5, 2), (5,), (1, 4)]

    def run(*tensors):
        x, skip_weight, bias, w = tensors
        return il.functional.brenier_map(x, skip_weight, bias, [w], **case)

    def run_fake():
        with FakeTensorMode():
            assert run(*(torch.ones(shape) for shape in shapes)).shape == (3, 2)

    run_fake()
    tensors = [torch.ones(shape) for shape in shapes]
    with torch.inference_mode():
        first = run(*tensors)
    tensors = [t.requires_grad_() for t in tensors]
    second = run(*tensors)
    second.sum().backward()
    torch.testing.assert_close(second.detach(), first)
    run_fake()
    double = run(*(t.detach().double() for t in tensors))
    torch.testing.assert_close(double.float(), second.detach())
    assert double.dtype == torch.float64


@pytest.mark.parametrize("with_x", ["x in the parameters", "x is a parameter"])
def test_parameters_may_depend_on_x(with_x):
    torch.manual_seed(0)
    x, skip_weight = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    bias, weight = torch.zeros(6, dtype=torch.float64), torch.rand(1, 5, dtype=torch.float64)
    x.requires_grad_()
    skip_weight = x if with_x == "x is a parameter" else skip_weight + x.mean()
    results = []
    for module in (functional, reference):
        t = module.brenier_map(x, skip_weight, bias, [weight], activations=["softplus", "identity"])
        results.append([t, *torch.autograd.grad(t.square().sum(), x)])
    torch.testing.assert_close(*results)
    exact = functional.brenier_map_vjp(
        x, skip_weight, bias, [weight], activations=["softplus", "identity"], potential_cotangent=torch.ones(6).double()
    )
    torch.testing.assert_close(results[0][0], exact.x)


def test_a_transformation_caches_no_constant():
    layer, x = il.BrenierMap(3, (5,)), torch.randn(2, 3)

    def total(x):
        weights = layer.nonneg_weights()
        options = {"activations": ["softplus", "identity"], "inverse_lipschitz": 0.62831}
        return functional.brenier_map(x, layer.skip_weight, layer.bias, weights, **options).sum()

    torch.func.grad(total)(x)
    assert not any(value == 0.62831 for value, _ in operands._constants)
    total(x)
    assert any(value == 0.62831 for value, _ in operands._constants)
