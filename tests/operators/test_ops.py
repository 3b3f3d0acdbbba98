"""The operators by themselves: opcheck, refusals, and who sees them called."""

import threading
import time
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ilvae_fast as il
from cases import EMBEDDINGS, SMALL
from ilvae_fast import functional
from raw_operators import (
    UTILITIES,
    Operands,
    map_jvp,
    map_jvp_backward,
    potential_and_map,
    training_terms,
    training_terms_backward,
)

OPERATORS = {"potential_and_map": potential_and_map, "training_terms": training_terms, "map_jvp": map_jvp}
RELEASE = tuple(int(part) for part in torch.__version__.split(".")[:2])


@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck(embedding, requires_grad, dtype):
    tensors = replace(SMALL, embedding=embedding, leading=(2, 3)).tensors(dtype)
    if requires_grad:
        tensors.requires_grad()
    operands = Operands.of(tensors)
    # AOTAutograd's gradients are compared to within float64 rounding
    utilities = [name for name in UTILITIES if name != "test_aot_dispatch_dynamic" or dtype == torch.float64]
    for want_potential, want_map in [(True, True), (False, True), (True, False)]:
        potential_and_map.check(operands, want_potential=want_potential, want_map=want_map, utilities=utilities)
    if not requires_grad:
        potential_and_map.check(operands, want_potential=True, want_map=True, save=True, utilities=utilities)
    elif RELEASE < (2, 13):
        # differentiating the training terms takes torch.func three levels deep, which older AOTAutograd refuses
        utilities = [name for name in utilities if name != "test_aot_dispatch_dynamic"]
    for v, u in [(tensors.v, None), (None, tensors.u), (tensors.v, tensors.u)]:
        for wanted in (operands.wanted(), operands.wanted("x")):
            training_terms.check(
                operands, map_cotangent=v, potential_cotangent=u, saved=[], wanted=wanted, utilities=utilities
            )
    map_jvp.check(operands, tangent=torch.randn_like(operands.x), utilities=utilities)


def test_the_operator_itself_refuses_forward_mode_and_saving_under_autograd():
    operands = Operands.of(SMALL.tensors(torch.float64))
    outputs = {"want_potential": False, "want_map": True}
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        potential_and_map(replace(operands, x=forward_ad.make_dual(operands.x, operands.x)), **outputs)
    operands.x.requires_grad_()
    with pytest.raises(ValueError, match="save: got True"):
        potential_and_map(operands, **outputs, save=True)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_training_terms_refuse_what_was_not_saved_for_them(embedding):
    tensors = replace(SMALL, embedding=embedding).tensors(torch.float64)
    operands = Operands.of(tensors)

    def gradient_of_x(saved):
        call = {"map_cotangent": tensors.v, "potential_cotangent": None, "wanted": operands.wanted("x")}
        return training_terms(operands, **call, saved=saved)[0]

    recomputed = gradient_of_x([])
    saved = potential_and_map(operands, want_potential=False, want_map=True, save=True)[2]
    torch.testing.assert_close(gradient_of_x(saved), recomputed)
    by_the_potential = potential_and_map(operands, want_potential=True, want_map=False, save=True)[2]
    torch.testing.assert_close(gradient_of_x(by_the_potential), recomputed)
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
            gradient_of_x(bad)


@pytest.mark.parametrize("wanted", [-1, 1 << 40])
def test_training_terms_refuse_gradients_that_do_not_exist(wanted):
    tensors = SMALL.tensors(torch.float64)
    with pytest.raises(ValueError, match="wanted: got"):
        training_terms(Operands.of(tensors), map_cotangent=tensors.v, potential_cotangent=None, saved=[], wanted=wanted)


SECOND_ORDER = {"training_terms_backward": training_terms_backward, "map_jvp_backward": map_jvp_backward}


@pytest.mark.parametrize("name", SECOND_ORDER)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"needed": -1}, "needed: got -1, wanted bits of the"),
        ({"needed": 1 << 40}, "needed: got 1099511627776"),
        ({"needed": "the embedding"}, "needed: got"),  # there is none
        ({"cotangents": []}, "cotangents: got 0, wanted"),
        ({"x": torch.tensor(1.0, dtype=torch.float64)}, "x: got a tensor without dimensions"),
        ({"skip_weight": torch.tensor(1.0, dtype=torch.float64)}, "skip_weight: got a tensor without dimensions"),
        ({"weights": [torch.ones(5)] * 2}, r"weights\[0\]: got \(5,\), wanted a matrix"),
        ({"wanted": 1 << 40}, "wanted: got 1099511627776"),
    ],
)
def test_operators_of_second_order_refuse_what_autograd_never_asks(name, changes, words):
    tensors = SMALL.tensors(torch.float64)
    operands = Operands.of(tensors)
    if name == "map_jvp_backward":
        if "wanted" in changes:
            return  # it has no such argument
        own = {"cotangents": [tensors.v, tensors.v], "tangent": torch.randn_like(operands.x), "needed": 1}
    else:
        own = {"map_cotangent": tensors.v, "potential_cotangent": tensors.u, "wanted": 1, "needed": 1}
        own["cotangents"] = [torch.ones_like(operands.x)]
    operator = SECOND_ORDER[name]
    assert operator(operands, **own)[0].shape == tensors.v.shape
    if changes.get("needed") == "the embedding":
        changes = {"needed": 1 << (6 if "wanted" in own else 5)}
    with pytest.raises(ValueError, match=words):
        operator(**{**operator.arguments(operands, **own), **changes})


@pytest.mark.parametrize("codes", [[9, 3, 0], [-1, 3, 0], [0, 6, 0], [0, 3]], ids=str)
def test_operators_refuse_activations_that_do_not_exist(codes):
    operands = replace(Operands.of(SMALL.tensors(torch.float64)), activations=codes)
    with pytest.raises(ValueError, match="activations"):
        potential_and_map(operands, want_potential=False, want_map=True)


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
    """Calls every operator once, through its function."""
    _, *arguments = tensors.positional()
    options = {"activations": SMALL.activations, "inverse_lipschitz": tensors.named["inverse_lipschitz"]}
    t = functional.brenier_map(x, *arguments, **options)
    g = functional.brenier_map_vjp(x, *arguments, map_cotangent=tensors.v, **options)
    return t, g.x, functional.brenier_map_jvp(x, torch.ones_like(x), *arguments, **options)[1]


@pytest.mark.parametrize("how", ["__torch_function__", "function mode", "dispatch mode", "make_fx", "jit.trace"])
def test_observers_see_the_operators(how):
    """Without observers, calls bypass torch.ops; observers must see every operator all the same."""
    tensors = SMALL.tensors(torch.float64)
    x = tensors.named["x"]
    expected = _each_operator(tensors, x)
    if how in ("make_fx", "jit.trace"):

        def function(x):
            return _each_operator(tensors, x)

        if how == "make_fx":
            graph = make_fx(function)(x)
            seen = {str(node.target) for node in graph.graph.nodes}
            assert {f"ilvae_fast.{name}.default" for name in OPERATORS} <= seen
        else:
            graph = torch.jit.trace(function, x)
            assert all(f"ilvae_fast::{name}" in str(graph.inlined_graph) for name in OPERATORS)
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
    assert {operator.overload for operator in OPERATORS.values()} <= set(seen)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a.as_subclass(torch.Tensor), b)


def test_an_argument_of_the_wrong_type_is_named():
    tensors = SMALL.tensors(torch.float64)
    x, skip, bias, weights = tensors.positional()
    for bad in ((x, skip.numpy(), bias, weights), (x, skip, bias, [*weights[:-1], 3])):
        with pytest.raises((TypeError, RuntimeError), match="skip_weight" if bad[1] is not skip else "weights"):
            functional.brenier_map(*bad, activations=SMALL.activations)


def test_other_python_threads_run_during_a_call():
    layer = il.BrenierMap(64, (256, 256)).requires_grad_(False)
    thread = threading.Thread(target=layer, args=(torch.randn(1 << 18, 64),))
    thread.start()
    ticks = 0
    while thread.is_alive():
        time.sleep(1e-3)
        ticks += 1
    assert ticks > 20
