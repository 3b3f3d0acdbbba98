"""BrenierMap: the gradient of an input-convex network plus ``L x``, as a module."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import functional, inversion
from ._backend import route_code
from ._errors import unknown_name
from .activations import Activation, as_activation, decode, encode
from .identity_start import initialize_identity_
from .initialization import initialize_
from .nonneg import NonNegative, as_nonnegative, of_code


@dataclass(frozen=True)
class Trained:
    """A trained inverse-Lipschitz constant: ``nonneg`` of a raw parameter, ``initial`` at first (> 0)."""

    initial: float = 1.0
    nonneg: str | NonNegative = "softplus"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.initial) and self.initial > 0):
            raise ValueError(f"il.Trained: got initial {self.initial!r}, wanted a finite number > 0")
        object.__setattr__(self, "nonneg", as_nonnegative(self.nonneg))


INITIALIZATIONS = ("random", "sparse", "identity")
# Defaults by measurement (benchmarks/defaults.py); that an argument is this very object says that nobody chose it.
ACTIVATION = Activation("softplus", 10.0)
NONNEG = NonNegative("square")
# Of a state. 1, which states do not say: the defaults were softplus with beta 1, for the activation and for nonneg.
VERSION = 2


def check_positive(argument: str, value: Any) -> int:
    """A positive integer, NumPy's and torch's too, as a Python int."""
    try:
        if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
            raise TypeError
        size = operator.index(value)
    except TypeError:
        cure = "; int(..) makes one of it" if isinstance(value, float) and value.is_integer() else ""
        raise TypeError(f"{argument}: got {type(value).__name__} {value!r}, wanted a positive int{cure}") from None
    if size < 1:
        raise ValueError(f"{argument}: got {size}, wanted at least 1")
    return size


def check_sizes(
    argument: str, value: Any, wanted: str = "a sequence of sizes", most: float = math.inf
) -> tuple[int, ...]:
    """At least one and at most so many positive integers; ``wanted`` says it in words."""
    try:
        sizes = () if isinstance(value, str) else tuple(value)
    except TypeError:  # not iterable
        sizes = ()
    if not 0 < len(sizes) <= most:
        raise ValueError(f"{argument}: got {value!r}, wanted {wanted}")
    return tuple(check_positive(f"{argument}[{k}]", size) for k, size in enumerate(sizes))


def check_widths(argument: str, value: Any) -> tuple[int, ...]:
    """The widths of a map's hidden layers."""
    most = functional.MAX_LAYERS
    return check_sizes(argument, value, f"a sequence of 1 to {most} widths", most)


def check_input(argument: str, value: Any, width: int | None, meaning: str, parameter: Tensor) -> None:
    """A tensor (..., width), None for any width, that goes with ``parameter``; ``meaning`` is the width's name."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{argument}: got {type(value).__name__}, wanted a tensor; torch.as_tensor makes one of arrays and lists"
        )
    shape, dtype, wanted, device = value.shape, value.dtype, parameter.dtype, value.device
    if width is not None and (not shape or shape[-1] != width):
        raise ValueError(f"{argument}: got shape {tuple(shape)}, wanted (..., {width}), {meaning} values each")
    if device != parameter.device:
        raise ValueError(
            f"{argument}: got device {device}, wanted {parameter.device}, where the parameters are: move either "
            "with .to(device)"
        )
    if dtype != wanted and not (
        torch.is_autocast_enabled(device.type) and value.is_floating_point() and torch.float64 not in (dtype, wanted)
    ):
        raise ValueError(
            f"{argument}: got dtype {dtype}, wanted {wanted}, that of the parameters: {argument}.to({wanted})"
        )
    if wanted == torch.float16 and device.type == "cpu":
        raise ValueError(f"{argument}: got {dtype} on the CPU, wanted float32 or bfloat16; float16 is for GPUs")


def check_tangent(v: Any, argument: str, value: Tensor) -> None:
    """A tangent at ``value``, which the user knows as ``argument``."""
    if not isinstance(v, Tensor):
        raise TypeError(f"v: got {type(v).__name__}, wanted a tensor")
    if v.shape != value.shape:
        raise ValueError(f"v: got shape {tuple(v.shape)}, wanted that of {argument}, {tuple(value.shape)}")


class BrenierMap(nn.Module):
    r"""``T(x) = grad G(x) + L x`` with an input-convex network ``G``: monotone and L-inverse Lipschitz.

    ``|T(x) - T(y)| >= L |x - y|`` for all x, y (Kinoshita et al., ICML 2023); with L > 0 and activations
    without kinks the map is a bijection of R^d. It is the Brenier map of optimal transport between its input's and its
    output's distribution.

    Args:
        in_features: d.
        hidden_features: widths n_1 .. n_K of the hidden layers, at most 55.
        activation: of the hidden layers, a name or :class:`ilvae_fast.Activation`. The default is nearly a ``relu``
            with a bend of width 1/10, where a plain ``"softplus"``, nearly a parabola, gives a nearly affine map.
        first_activation: of the first hidden layer, if another; convex, need not be monotone.
        output_activation: of the scalar output.
        nonneg: parametrisation of the non-negative weights, a name or :class:`ilvae_fast.NonNegative`.
        inverse_lipschitz: L. A float or a tensor with one element is a constant, kept in a buffer; assigning to the
            attribute fills it in place, which never recompiles. :class:`ilvae_fast.Trained` makes it a parameter.
        initialization: ``"random"``, a map of sensible scale, or ``"sparse"``, the same with its upper layers nearly
            switched off, for inputs on a subspace as in a decoder (:mod:`ilvae_fast.initialization`); or
            ``"identity"``, a map with ``T(x) ~ x`` for x of about unit variance, for transport
            (:mod:`ilvae_fast.identity_start`): it needs at least d hidden units if L < 1; with L >= 1 it starts near
            ``L x``.
        route, recompute: see :func:`ilvae_fast.plan`.
        validate: check parameters and inputs for NaN, infinity and sign at every call (synchronises with a GPU).
        device, dtype: of the parameters; L is kept at least in float32 whatever the layer's dtype.

    State: skip_weight (S+1, d), bias (S+1,), raw_weights.{0..K-1} [(n_2, n_1), .., (1, n_K)], inverse_lipschitz (1,)
    (raw_inverse_lipschitz (1,) if trained), and _extra_state, which says what function they are the weights of. A state
    of another function is refused, and one without it (written before there was one) unless activation and nonneg are
    given.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    raw_weights: nn.ParameterList
    _input = ("x", "in_features")  # what the user calls the argument and its width; the decoder has words of its own
    _unchosen: Sequence[str] = ()  # arguments that were left at their defaults
    _configured: float | None = None  # L as it was constructed, until another one is assigned or loaded

    def __init__(
        self,
        in_features: int,
        hidden_features: Sequence[int] = (128, 128),
        *,
        activation: str | Activation = ACTIVATION,
        first_activation: str | Activation | None = None,
        output_activation: str | Activation = "identity",
        nonneg: str | NonNegative = NONNEG,
        inverse_lipschitz: float | Tensor | Trained = 1.0,
        initialization: str = "random",
        route: str = "auto",
        recompute: bool | None = None,
        validate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = check_positive("in_features", in_features)
        self.hidden_features = check_widths("hidden_features", hidden_features)
        self._unchosen = [name for name, is_default in (
            ("activation", activation is ACTIVATION), ("nonneg", nonneg is NONNEG)
        ) if is_default]  # fmt: skip
        hidden = as_activation(activation)
        first = hidden if first_activation is None else as_activation(first_activation, "first_activation")
        output = as_activation(output_activation, "output_activation")
        if not hidden.monotone and len(self.hidden_features) > 1:
            raise ValueError(
                f"activation: got {hidden.name!r}, wanted a non-decreasing one for all hidden layers but the first: "
                f"first_activation={hidden.name!r}, activation=another"
            )
        if not output.monotone:
            raise ValueError(f"output_activation: got {output.name!r}, wanted a non-decreasing one")
        self._activations = encode([first, *[hidden] * (len(self.hidden_features) - 1), output])
        self.nonneg = as_nonnegative(nonneg)
        if initialization not in INITIALIZATIONS:
            raise unknown_name("initialization", initialization, INITIALIZATIONS)
        self.initialization = initialization
        route_code(route)
        self.route, self.recompute, self.validate = route, recompute, validate

        factory: dict[str, Any] = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        if factory["dtype"] not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype: got {dtype}, wanted float64, float32, bfloat16 or, on GPUs, float16")
        units = sum(self.hidden_features)
        self.skip_weight = nn.Parameter(torch.empty(units + 1, self.in_features, **factory))
        self.bias = nn.Parameter(torch.empty(units + 1, **factory))
        shapes = zip([*self.hidden_features[1:], 1], self.hidden_features, strict=True)
        self.raw_weights = nn.ParameterList([nn.Parameter(torch.empty(*shape, **factory)) for shape in shapes])

        constant_dtype = torch.promote_types(factory["dtype"], torch.float32)
        constant = torch.empty(1, device=device, dtype=constant_dtype)
        if isinstance(inverse_lipschitz, Trained):
            self.trained: NonNegative | None = as_nonnegative(inverse_lipschitz.nonneg)
            self.raw_inverse_lipschitz = nn.Parameter(constant)
            self.inverse_lipschitz = inverse_lipschitz.initial
        else:
            self.trained = None
            # register_buffer refuses a name that is a property
            self._buffers["inverse_lipschitz"] = constant
            if isinstance(inverse_lipschitz, Tensor) and inverse_lipschitz.numel() == 1:
                inverse_lipschitz = float(inverse_lipschitz)
            self.inverse_lipschitz = inverse_lipschitz
            self._configured = float(inverse_lipschitz)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew (:mod:`ilvae_fast.initialization`); L stays as it is.

        For code that initialises all modules its own way: this undoes ``model.apply(init)`` (see
        :class:`ilvae_fast.NonNegative` for what such an ``init`` does to the weights).
        """
        with torch.no_grad():
            effective = [torch.empty_like(raw, dtype=torch.float32) for raw in self.raw_weights]
            if self.initialization == "identity":
                constant = self.inverse_lipschitz
                initialize_identity_(self.skip_weight, self.bias, effective, self._activations.layers, constant)
            else:
                sparse = self.initialization == "sparse"
                initialize_(self.skip_weight, self.bias, effective, self._activations.layers, sparse=sparse)
            for raw, weight in zip(self.raw_weights, effective, strict=True):
                raw.copy_(self.nonneg.raw(weight))

    @property
    def inverse_lipschitz(self) -> Tensor:
        """L (1,), non-negative. Assigning a number or a tensor with one element fills it in place."""
        if self.trained is not None:
            return self.trained(self.raw_inverse_lipschitz)
        constant = self._buffers["inverse_lipschitz"]
        assert constant is not None
        return constant

    @inverse_lipschitz.setter
    def inverse_lipschitz(self, value: float | Tensor) -> None:
        raise AssertionError("unreachable: __setattr__ takes it")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "inverse_lipschitz":  # nn.Module would refuse a number for a buffer
            self._configured = None
            self._fill_inverse_lipschitz(value)
        else:
            super().__setattr__(name, value)

    @torch.no_grad()
    def _fill_inverse_lipschitz(self, value: float | Tensor) -> None:
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"inverse_lipschitz: got shape {tuple(value.shape)}, wanted one element")
            value = value.detach().reshape(1)
            if type(value) is Tensor and value.is_cpu:  # looking elsewhere would wait for the device
                functional.check_inverse_lipschitz(value.item())
        else:
            value = functional.check_inverse_lipschitz(value.item() if isinstance(value, np.generic) else value)
            value = torch.tensor([value], dtype=torch.float64, device="cpu")
        name, store = self._constant_slot()
        if name not in store:
            raise ValueError(f"inverse_lipschitz: {name} is parametrised; assign to the parameters it is made from")
        if store[name].is_meta and not value.is_meta:
            self._constant_to_come = value
        filling = value if self.trained is None else self.trained.raw(value)
        if type(filling) is Tensor and filling.is_cpu and not filling.isfinite():
            raise ValueError(f"inverse_lipschitz: got {value.item()}, wanted a number > 0 for a trained constant")
        store[name].copy_(filling)

    def _constant_slot(self) -> tuple[str, dict[str, Any]]:
        """Where L or its raw parameter is kept: its name, and the parameters or buffers."""
        if self.trained is None:
            return "inverse_lipschitz", self._buffers
        return "raw_inverse_lipschitz", self._parameters

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BrenierMap:
        name, store = self._constant_slot()
        if name not in store:  # parametrised: made from other parameters, which move by themselves
            super()._apply(fn, recurse)
            return self
        # detached: what moves replaces the data of the tensors themselves
        before, gradient = store[name].detach(), store[name].grad
        gradient = None if gradient is None else gradient.detach()
        super()._apply(fn, recurse)
        after = store[name]
        # A constant of the guarantee is not rounded to the layer's dtype: keep it at least in float32.
        if torch.promote_types(after.dtype, torch.float32) != after.dtype:
            kept = before.to(after.device)
            if self.trained is None:
                store[name] = kept
            else:
                after.grad = None
                after.data = kept
                after.grad = None if gradient is None else gradient.to(after.device)
        if store[name].is_meta and not before.is_meta:
            self._constant_to_come = before if self.trained is None else self.trained(before)
        elif before.is_meta and not store[name].is_meta:  # to_empty: L is no weight that reset_parameters draws
            self._fill_inverse_lipschitz(self._constant_to_come)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: Any, *rest: Any) -> None:
        warn_of_other_constants({f"{prefix}inverse_lipschitz": self}, state_dict)
        strict, missing, unexpected, errors = rest
        if (refusal := self._refusal(state_dict, prefix)) is not None:
            errors.append(refusal)
        absent: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, absent, unexpected, errors)
        missing.extend(key for key in absent if key != prefix + "_extra_state")
        name, store = self._constant_slot()
        given = state_dict.get(prefix + name)
        if not metadata.get("assign_to_params_buffers") or given is None or name not in store:
            return
        dtype = torch.promote_types(given.dtype, torch.float32)
        if self.trained is None:  # what torch assigned __setattr__ has filled in
            self._buffers[name] = given.to(dtype)
        else:
            store[name].data = store[name].data.to(dtype)

    def get_extra_state(self) -> Tensor:
        """What function the weights are of, as a tensor, for files that hold nothing else: float64 [version, code and
        parameter of nonneg, those of the K + 1 activations]."""
        codes, parameters, _ = self._activations
        described = [(self.nonneg.code, self.nonneg.parameter or 0.0), *zip(codes, parameters, strict=True)]
        return torch.tensor([VERSION, *(n for pair in described for n in pair)], dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Nothing: what :meth:`get_extra_state` describes is the constructor's choice, and loading compares them."""

    def _refusal(self, state: Mapping[str, Any], prefix: str) -> str | None:
        """Why the weights in ``state`` would be those of another function here."""
        theirs, ours = state.get(prefix + "_extra_state"), self.get_extra_state()
        name = prefix.rstrip(".") or type(self).__name__
        if theirs is not None:
            theirs = torch.as_tensor(theirs).detach().cpu().double()
            if theirs.shape == ours.shape and torch.allclose(theirs[1:], ours[1:], rtol=1e-2, atol=1e-6):
                return None
            return f"{name}: the state is that of {_described(theirs)}; this map has {_described(ours)}"
        # parameters alone, as of a moving average, say nothing about the version
        whole = all(prefix + key in state for key in ("skip_weight", self._constant_slot()[0]))
        if not whole or not self._unchosen:
            return None
        given = ", ".join(f"{argument}=.." for argument in self._unchosen)
        return (
            f"{name}: the state does not say what function it is of: it was written by an earlier version, whose "
            f"defaults were others. Pass {given} as it was then (by default activation='softplus', nonneg='softplus')"
        )

    def nonneg_weights(self) -> list[Tensor]:
        """The effective, non-negative weights [W_2, .., W_K, w] of the raw ones."""
        return self.nonneg.of_all(list(self.raw_weights))

    def operands(self, x: Tensor, embedding: Tensor | int | None = None) -> functional.Operands:
        """The arguments of :mod:`ilvae_fast.functional` at ``x``."""
        skip_weight = self.skip_weight
        argument, width = self._input
        check_input(argument, x, self.in_features if embedding is None else None, width, skip_weight)
        return functional.prepare(
            x,
            skip_weight,
            self.bias,
            self.nonneg_weights(),
            self._activations,
            self.inverse_lipschitz,
            embedding,
            self.route,
            self.recompute,
            self.validate,
        )

    def forward(self, x: Tensor, embedding: Tensor | int | None = None) -> Tensor:
        """``T(x)``: (..., d) -> (..., d); with an embedding B, as :mod:`ilvae_fast.functional` takes it, ``T(B x)``."""
        return functional.apply_potential_and_map(self.operands(x, embedding), False, True)[1]

    def potential(self, x: Tensor) -> Tensor:
        """``phi(x) = G(x) + L/2 |x|^2``: (..., d) -> (...)."""
        return functional.apply_potential_and_map(self.operands(x), True, False)[0]

    def potential_and_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(phi(x), T(x))``: (..., d) -> (...), (..., d)."""
        return functional.apply_potential_and_map(self.operands(x), True, True)

    def jvp(self, x: Tensor, v: Tensor, embedding: Tensor | int | None = None) -> tuple[Tensor, Tensor]:
        """``(T(B x), dT(B x)/dx v)``, for x and v (..., d), or (..., m) with an embedding B."""
        operands = self.operands(x, embedding)
        check_tangent(v, self._input[0], x)
        return functional.apply_map_jvp(operands, v)

    def _check(self, x: Any) -> None:
        check_input(self._input[0], x, self.in_features, self._input[1], self.skip_weight)

    def jacobian(self, x: Tensor) -> Tensor:
        """``dT/dx``: (..., d) -> (..., d, d), symmetric with eigenvalues >= L."""
        self._check(x)
        return stacked_tangents(self.jvp, x)

    def logabsdet(self, x: Tensor) -> Tensor:
        """``log |det dT/dx|``: (..., d) -> (...), at least float32; differentiable. Takes (..., d, d) and d^3 work.

        The density of ``T(x)`` at ``T(x)`` is that of x at x times ``exp(-logabsdet(x))``.

        Raises:
            ValueError: an activation has a kink, so that the map jumps and no such density exists.
        """
        inversion.check_smooth(self._activations)
        jacobian = self.jacobian(x)
        return torch.linalg.slogdet(jacobian.to(torch.promote_types(jacobian.dtype, torch.float32))).logabsdet

    def inverse(self, y: Tensor) -> Tensor:
        """x with ``T(x) = y``: (..., d) -> (..., d), by Newton's method in float64 (:mod:`ilvae_fast.inversion`).

        Differentiable once, with respect to y and the parameters; reads back to the host, so not in compiled regions or
        under ``torch.func``.

        Raises:
            ValueError: y is not finite, or an activation has a kink, so that the map jumps and leaves values out.
            RuntimeError: there is no such x, or it was not found, as may be with L = 0.
        """
        check_input("y", y, self.in_features, "in_features", self.skip_weight)
        return inversion.inverse(self.operands(y))

    def extra_repr(self) -> str:
        *hidden, output = self._activations.layers
        names = ", ".join(a.name for a in hidden)
        constant = "trained" if self.trained is not None else self._constant_repr()
        return (
            f"{self.in_features}, hidden_features={self.hidden_features}, activations=({names}; {output.name}), "
            f"nonneg={self.nonneg.name}, inverse_lipschitz={constant}"
        )

    def _constant_repr(self) -> str:
        constant = self.inverse_lipschitz
        return "meta" if constant.is_meta else f"{constant.item():g}"


def _described(state: Tensor) -> str:
    """In words, what :meth:`BrenierMap.get_extra_state` describes."""
    pairs = [(int(code), float(parameter)) for code, parameter in state[1:].reshape(-1, 2)]
    (code, parameter), *activations = pairs
    nonneg = of_code(code, parameter)
    layers = decode(*zip(*activations, strict=True)).layers
    return f"nonneg={nonneg}, activations=({', '.join(map(str, layers))})"


def stacked_tangents(jvp: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """The Jacobian (..., D, m) at x (..., m), one tangent per input coordinate in a single batched call."""
    m = x.shape[-1]
    tangents = torch.eye(m, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], m, m)
    return jvp(x.unsqueeze(-2).expand(*x.shape[:-1], m, m), tangents)[1].mT


def accept_constants(model: nn.Module) -> None:
    """Let the next state that ``model`` loads bring other constants than it was constructed with, and no warning: it is
    a state of the same configuration, whose constants a schedule may have moved."""
    for module in model.modules():
        if isinstance(module, BrenierMap):
            module._configured = None


def warn_of_other_constants(maps: Mapping[str, BrenierMap], state: Mapping[str, Any]) -> None:
    """Warn, once for all ``maps``, of constants in the ``state`` to be loaded that were constructed otherwise.

    Args:
        maps: by the names of their constants in ``state``. One that was assigned since it was constructed, as schedules
            do, differs for a reason.
    """
    others = []
    for name, brenier_map in maps.items():
        configured, loaded = brenier_map._configured, state.get(name)
        if configured is None or not isinstance(loaded, Tensor) or loaded.is_meta or loaded.numel() != 1:
            continue
        value = float(loaded)
        rounding = torch.finfo(loaded.dtype).eps if loaded.is_floating_point() else 0.0
        if not math.isclose(value, configured, rel_tol=max(rounding, 1e-6)):  # L itself may be kept in float32
            brenier_map._configured = None
            others.append(f"{name} = {value:g}, constructed as {configured:g}")
    if others:
        warnings.warn(
            f"the loaded state has {'; '.join(others)}. What was loaded is in force: assign inverse_lipschitz after "
            "loading for another",
            UserWarning,
            stacklevel=2,
        )
