"""Operators and functions with arbitrary tensors: shapes, dtypes, strides, values, what is no tensor at all."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import ilvae_fast as il
import raw_operators as raw
from cases import EMBEDDINGS, FIRST, LATER, WAYS, Case, Tensors
from comparison import assert_equal_to_rounding
from ilvae_fast import functional

from . import Finding, Refused, call

DTYPES = (torch.float64, torch.float64, torch.float32, torch.bfloat16)
OTHER_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64)
# what says in words what is wrong: our own errors, and those of torch about what is no operand of any operator
CLEAR = (ValueError, TypeError, RuntimeError)
ODD = (None, 3, -1, 2.5, math.nan, "fused", (), [], [None], {}, b"x", True)


def one(source: random.Random) -> str:
    """One call of an operator or a function. Returns what became of it."""
    case, tensors = _problem(source)
    spoiled = source.random() < 0.45
    kind = source.choice(("function", "function", "gradients", "vjp", "jvp", "operator", "operator", "softplus"))
    try:
        if kind == "softplus":
            return _softplus(source, tensors, spoiled)
        if kind == "operator":
            return _operator(source, tensors, spoiled)
        return _function(source, kind, case, tensors, spoiled)
    except Refused as error:
        if not spoiled:
            raise Finding(f"refused: {error}; {kind} of {case}") from error
        return "refused"


# The problem


def _problem(source: random.Random) -> tuple[Case, Tensors]:
    depth = source.choice((1, 1, 2, 2, 3, 5))
    widest = source.choice((3, 9, 40, 70))
    route, recompute = source.choice(WAYS)
    leading = tuple(source.choice((0, 1, 2, 3, 5, 17, 33)) for _ in range(source.choice((0, 1, 1, 1, 2, 3))))
    case = Case(
        width=source.randint(1, widest),
        hidden=tuple(source.randint(1, widest) for _ in range(depth)),
        activations=(_activation(source, FIRST), *(_activation(source, LATER) for _ in range(depth))),
        embedding=source.choice(EMBEDDINGS),
        leading=leading if math.prod(leading) < 2000 else leading[:1],
        constant=source.choice((0.0, 0.3, 1.0, 5.0)),
        seed=source.randrange(2**16),
        route=route,
        recompute=recompute,
    )
    tensors = case.tensors(source.choice(DTYPES))
    tensors.named = {name: _laid_out(source, t) for name, t in tensors.named.items()}
    tensors.u, tensors.v = _laid_out(source, tensors.u), _laid_out(source, tensors.v)
    return case, tensors


def _activation(source: random.Random, names: tuple[str, ...]) -> il.Activation:
    name = source.choice(names)
    parameters = {"softplus": (0.5, 1.0, 5.0), "celu": (0.5, 1.0, 2.0)}
    known = (0.0, 0.2, 1.0) if "leaky" in name else parameters.get(name, (None,))
    return il.Activation(name, source.choice(known))


def _laid_out(source: random.Random, t: Tensor) -> Tensor:
    """The same values in another layout."""
    how = source.randrange(6)
    if how == 0 and t.dim() >= 2:
        return t.mT.contiguous().mT
    if how == 1 and t.dim() >= 1:  # every other element, and not from the first on
        spread = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), math.nan)
        spread[..., 1::2] = t
        return spread[..., 1::2]
    if how == 2 and t.dim() >= 1:  # a part of a larger tensor, off the alignment of vectors
        larger = t.new_full((t.numel() + 1,), math.nan)
        larger[1:] = t.reshape(-1)
        return larger[1:].view(t.shape)
    if how == 3 and t.dim() >= 2 and t.shape[0] > 1:
        return t[:1].expand(t.shape)  # other values, overlapping in memory
    return t


# Spoiled arguments


def _spoiled(source: random.Random, value: Any, tensor: bool = False) -> Any:
    """Another value for an argument, likely a bad one; with ``tensor`` another tensor for a tensor."""
    if not isinstance(value, Tensor) or (not tensor and source.random() < 0.15):
        return source.choice(ODD)
    if value.layout is not torch.strided:
        return value.to_dense()
    t = value.detach()
    how = source.randrange(12) if value.device.type == "cpu" else 9
    if how == 0:
        return t.to(source.choice(OTHER_DTYPES))
    if how == 1 and t.numel() and t.is_floating_point():
        t = t.clone(memory_format=torch.contiguous_format)
        t.view(-1)[source.randrange(t.numel())] = source.choice((math.nan, math.inf, -math.inf, -1.0, 1e30, 1e-40))
        return t
    if how == 2 and t.is_floating_point():
        return t * source.choice((0.0, -1.0, 1e6, 1e20, 1e-30))
    if how == 3 and t.dim():
        return t.narrow(source.randrange(t.dim()), 0, 0)
    if how == 4:
        return t.unsqueeze(0)
    if how == 5 and t.dim():
        return t[0] if len(t) else t.reshape(-1)
    if how == 6 and t.dim() >= 2:
        return t.mT
    if how == 7:
        return t.reshape(-1)
    if how == 8 and t.dim():
        return torch.cat([t, t[..., :1]], -1)
    if how == 9:
        return t.to("meta")
    if how == 10 and t.dim():
        return t.to_sparse()
    return t.expand(2, *t.shape)


def _spoil(source: random.Random, arguments: dict[str, Any]) -> None:
    for _ in range(source.choice((1, 1, 2))):
        name = source.choice(sorted(arguments))
        if name == "weights" and isinstance(arguments[name], list) and source.random() < 0.8:
            weights = list(arguments[name])
            k = source.randrange(len(weights)) if weights else 0
            how = source.randrange(4)
            if how == 0 and weights:
                weights[k] = _spoiled(source, weights[k])
            elif how == 1:
                weights = weights[:k]
            elif how == 2:
                weights = weights * 60
            else:
                weights = weights[::-1]
            arguments[name] = weights
        else:
            arguments[name] = _spoiled(source, arguments[name])


# Functions


def _function(source: random.Random, kind: str, case: Case, tensors: Tensors, spoiled: bool) -> str:
    x, skip_weight, bias, weights = tensors.positional()
    arguments: dict[str, Any] = {"x": x, "skip_weight": skip_weight, "bias": bias, "weights": weights}
    arguments |= tensors.options()
    route = arguments["route"]
    if kind in ("function", "gradients"):
        function = source.choice((functional.potential, functional.brenier_map, functional.potential_and_map))
        arguments["recompute"] = case.recompute if kind == "gradients" else source.choice((None, True, False))
    elif kind == "vjp":
        function = functional.brenier_map_vjp
        given = source.choice(((True, False), (False, True), (True, True)))
        arguments["map_cotangent"] = tensors.v if given[0] else None
        arguments["potential_cotangent"] = tensors.u if given[1] else None
        arguments["wrt"] = [n for n in functional.BrenierGradients._fields if source.random() < 0.7]
    else:
        function = functional.brenier_map_jvp
        arguments["tangent"] = _laid_out(source, torch.randn(x.shape, dtype=torch.float64).to(x.dtype))
    if source.random() < 0.2:
        arguments["validate"] = True
    plain = dict(arguments)
    if spoiled:
        _spoil(source, arguments)
    if kind == "gradients":
        for value in [*arguments.values(), *(arguments["weights"] if isinstance(arguments["weights"], list) else ())]:
            if isinstance(value, Tensor) and value.is_floating_point() and source.random() < 0.7:
                value.requires_grad_()
    ours = call(function, clear=CLEAR, **arguments)
    outputs = [t for t in _flat(ours) if isinstance(t, Tensor)]
    if kind == "gradients" and any(t.requires_grad for t in outputs):
        loss = sum(t.double().sum() for t in outputs if t.requires_grad)
        call(loss.backward, clear=CLEAR)
        outputs += [t.grad for t in arguments.values() if isinstance(t, Tensor) and t.grad is not None]
    if spoiled:
        return "taken"
    if x.dtype != torch.float64:
        _same_as_contiguous(function, plain, ours, route)
        return "agrees"
    with il.use_backend("reference"):
        theirs = function(**{**plain, "validate": False})
    for k, (a, b) in enumerate(zip(_flat(ours), _flat(theirs), strict=True)):
        if a is None or b is None:
            _check(a is b, f"{function.__name__}[{k}]: {a} but the reference {b}")
        else:
            _equal(f"{function.__name__}[{k}] of {case}", a.detach(), b.detach(), tensors, function)
    return "equal"


def _flat(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [item for part in value for item in _flat(part)]
    return [value]


def _check(holds: bool, words: str) -> None:
    if not holds:
        raise Finding(words)


def _equal(name: str, ours: Tensor, theirs: Tensor, tensors: Tensors, function: Any) -> None:
    terms = None
    if function is functional.brenier_map_vjp:  # sums over rows: their terms may cancel
        rows = max(1, tensors.u.numel())
        terms = theirs.abs().amax().expand(1) * rows if theirs.numel() else None
    try:
        assert_equal_to_rounding(name, ours, theirs, terms)
    except AssertionError as error:
        raise Finding(str(error)) from error


def _same_as_contiguous(function: Any, arguments: dict[str, Any], ours: Any, route: str) -> None:
    """In low precision: layouts decide about nothing on the fused route (float64 is compared with the reference)."""
    if route != "fused":
        return

    def contiguous(value: Any) -> Any:
        if isinstance(value, list):
            return [contiguous(v) for v in value]
        return value.detach().clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value

    again = function(**{name: contiguous(value) for name, value in arguments.items()})
    for a, b in zip(_flat(ours), _flat(again), strict=True):
        if isinstance(a, Tensor):
            same = torch.equal(a.detach().nan_to_num(), b.detach().nan_to_num())
            _check(a.dtype == b.dtype and same, f"{function.__name__}: another layout, other bits")


# Operators themselves


def _operator(source: random.Random, tensors: Tensors, spoiled: bool) -> str:
    operands = raw.Operands.of(tensors)
    operands = replace(operands, route=source.choice((raw.AUTO, raw.MATMUL)))
    name = source.choice(("potential_and_map", "training_terms", "map_jvp", "training_terms_backward",
                          "map_jvp_backward"))  # fmt: skip
    own: dict[str, Any] = {}
    tangent = torch.randn(operands.x.shape, dtype=torch.float64).to(operands.x.dtype)
    if name == "potential_and_map":
        own = {"want_potential": source.random() < 0.7, "want_map": source.random() < 0.7}
        own |= {"save": source.random() < 0.3, "recompute": source.choice((None, True, False))}
    elif name.startswith("training_terms"):
        own = {"map_cotangent": tensors.v, "potential_cotangent": tensors.u, "wanted": operands.wanted()}
        if name == "training_terms":
            own["saved"] = []
            if source.random() < 0.4:
                own["saved"] = raw.potential_and_map(operands, want_potential=True, want_map=True, save=True)[2]
        else:
            terms = raw.training_terms(operands, **own, saved=[])
            own["cotangents"] = [torch.ones_like(t) for bit, t in enumerate(terms) if own["wanted"] >> bit & 1]
            own["needed"] = source.randrange(1 << 4)
    else:
        own = {"tangent": tangent}
        if name == "map_jvp_backward":
            own["cotangents"] = [tensors.v, tensors.v]
            own["needed"] = source.randrange(1 << 3)
    arguments = getattr(raw, name).arguments(operands, **own)
    if spoiled:
        _spoil(source, arguments)
        if source.random() < 0.2:
            key = source.choice(("wanted", "needed", "route", "saved"))
            if key in arguments:
                odd = {"wanted": -1, "needed": 1 << 62, "route": 7, "saved": [torch.ones(3)] * 3}[key]
                arguments[key] = source.choice((odd, 1 << 40)) if key != "saved" else odd
    results = call(getattr(raw, name).overload, clear=CLEAR, **arguments)
    for t in _flat(results):
        if isinstance(t, Tensor) and t.device.type == "cpu" and not t.is_sparse:
            t.detach().double().sum().item()  # reads every element
    return "taken" if spoiled else "run"


def _softplus(source: random.Random, tensors: Tensors, spoiled: bool) -> str:
    raws = [t if t.dtype != torch.bfloat16 else t.float() for t in tensors.positional()[3]]
    cotangents = [torch.randn(t.shape, dtype=t.dtype) for t in raws]
    backward = source.random() < 0.5
    arguments: dict[str, Any] = {"raw": raws, **({"cotangents": cotangents} if backward else {})}
    if spoiled:
        name = source.choice(sorted(arguments))
        values = list(arguments[name])
        if values and source.random() < 0.8:
            k = source.randrange(len(values))
            values[k] = _spoiled(source, values[k])
            arguments[name] = values
        else:
            arguments[name] = source.choice((values[:-1], values * 2, *ODD))
    operator = raw.softplus_backward if backward else raw.softplus
    ours = call(operator.overload, clear=CLEAR, **arguments)
    if spoiled:
        return "taken"
    for k, (t, a) in enumerate(zip(raws, ours, strict=True)):
        double = t.double()
        # not torch's softplus, which from 20 on is the identity
        theirs = cotangents[k].double() * double.sigmoid() if backward else double.logaddexp(double.new_zeros(()))
        error = (a.double() - theirs).abs().max() if t.numel() else torch.zeros(())
        allowed = 8 * torch.finfo(t.dtype).eps * theirs.abs().max() if t.numel() else 0
        _check(bool(error <= allowed), f"softplus of {t.dtype}: error {float(error):.3g}, allowed {float(allowed):.3g}")
    return "equal"
