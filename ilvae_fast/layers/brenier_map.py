"""BrenierMap: the gradient of an input-convex network plus ``L x``, as a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._support.checks import check_positive, check_sizes
from .._support.errors import unknown_name
from ..operators import dispatch
from ..operators.activations import Activation, as_activation, decode, encode
from ..operators.hessian import hessian
from ..operators.operands import MAX_LAYERS, Operands, prepare
from ..operators.plan import Plan, route_code
from . import inversion
from .constant import Trained, WithConstant
from .identity_start import initialize_identity_
from .initialization import initialize_
from .inputs import check_input, check_like
from .nonneg import NonNegative, as_nonnegative, of_code

INITIALIZATIONS = ("random", "sparse", "identity")
# The defaults are those that measure best (benchmarks/defaults.py). An argument that is this very object was left out.
ACTIVATION = Activation("softplus", 10.0)
NONNEG = NonNegative("abs")
# The version of a state. States of version 1 do not say it; softplus, with beta 1, was then the default of activation
# and of nonneg.
VERSION = 2


def check_widths(argument: str, value: Any) -> tuple[int, ...]:
    """Return the widths of a map's hidden layers as a tuple.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    return check_sizes(argument, value, f"a sequence of 1 to {MAX_LAYERS} widths", MAX_LAYERS)


class BrenierMap(WithConstant):
    r"""``T(x) = grad G(x) + L x`` with an input-convex network ``G``: monotone and L-inverse Lipschitz.

    ``|T(x) - T(y)| >= L |x - y|`` for all x, y (Kinoshita et al., ICML 2023). With L > 0 and activations without kinks
    the map is a bijection of R^d. It is the Brenier map of optimal transport from the distribution of its input to that
    of its output.

    Args:
        in_features: d.
        hidden_features: widths n_1 .. n_K of the hidden layers, at most 55.
        activation: of the hidden layers, a name or :class:`ilvae_fast.Activation`. The default is nearly a ``relu``
            with a bend of width 1/10. A plain ``"softplus"`` is nearly a parabola there and gives a nearly affine map.
        first_activation: of the first hidden layer, if it differs. It is convex and need not be monotone.
        output_activation: of the scalar output.
        nonneg: parametrisation of the non-negative weights, a name or :class:`ilvae_fast.NonNegative`.
        inverse_lipschitz: L. A float or a tensor with one element is a constant, kept in a buffer. Assigning to the
            attribute fills it in place, which never recompiles. :class:`ilvae_fast.Trained` makes L a parameter.
        initialization: ``"random"`` is a map of sensible scale (:mod:`ilvae_fast.layers.initialization`). ``"sparse"``
            is the same with its upper layers nearly switched off, for inputs on a subspace as in a decoder.
            ``"identity"`` is a map with ``T(x) ~ x`` for x of about unit variance, for transport
            (:mod:`ilvae_fast.layers.identity_start`). It needs at least d hidden units if L < 1, and starts near
            ``L x`` if L >= 1.
        route: ``"auto"``, ``"matmul"`` or ``"fused"``; see :func:`ilvae_fast.plan`.
        recompute: whether the backward pass recomputes what the forward pass could keep; see :func:`ilvae_fast.plan`.
        validate: check parameters and inputs for NaN, infinity and sign at every call, which synchronises with a GPU.
        device: of the parameters.
        dtype: of the parameters. L is kept at least in float32 whatever the dtype of the layer.

    State: skip_weight (S+1, d), bias (S+1,), raw_weights.{0..K-1} [(n_2, n_1), .., (1, n_K)], inverse_lipschitz (1,)
    (raw_inverse_lipschitz (1,) if trained), and _extra_state, which says what function they are the weights of. A state
    of another function is refused. A state that does not say its function comes from an earlier version, and is refused
    unless activation and nonneg are given.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    raw_weights: nn.ParameterList
    _input = ("x", "in_features")  # the caller's names of the argument and its width; a decoder has its own
    _unchosen: Sequence[str] = ()  # arguments that were left at their defaults

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

        self._construct_constant(inverse_lipschitz, device, factory["dtype"])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew (:mod:`ilvae_fast.layers.initialization`). L stays as it is.

        This undoes the ``model.apply(init)`` of code that initialises all modules its own way.
        :class:`ilvae_fast.NonNegative` says what such an ``init`` does to the weights.
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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: Any, *rest: Any) -> None:
        strict, missing, unexpected, errors = rest
        if (refusal := self._refusal(state_dict, prefix)) is not None:
            errors.append(refusal)
        absent: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, absent, unexpected, errors)
        missing.extend(key for key in absent if key != prefix + "_extra_state")

    def get_extra_state(self) -> Tensor:
        """Say what function the weights are of, as a tensor, for files that hold nothing else.

        It is float64: the version, code and parameter of nonneg, then those of the K + 1 activations.
        """
        codes, parameters, _ = self._activations
        described = [(self.nonneg.code, self.nonneg.parameter or 0.0), *zip(codes, parameters, strict=True)]
        return torch.tensor([VERSION, *(n for pair in described for n in pair)], dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Do nothing: the function is the constructor's choice, and loading compares it with that of the state."""

    def _refusal(self, state: Mapping[str, Any], prefix: str) -> str | None:
        """Say why the weights in ``state`` would be those of another function here; None if they are not."""
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

    @torch.no_grad()
    def project_(self) -> None:
        """Raise negative weights to 0 in place: after an optimiser step, with ``nonneg="none"``.

        The potential is convex again, and the guarantee holds. Other parametrisations are never negative.
        """
        if self.nonneg.name == "none":
            for raw in self.raw_weights:
                raw.clamp_(min=0)

    def nonneg_weights(self) -> list[Tensor]:
        """Return the effective, non-negative weights [W_2, .., W_K, w]."""
        return self.nonneg.of_all(list(self.raw_weights))

    def operands(self, x: Tensor, embedding: Tensor | int | None = None) -> Operands:
        """Return the arguments of :mod:`ilvae_fast.functional` at ``x``, checked."""
        skip_weight = self.skip_weight
        argument, width = self._input
        check_input(argument, x, self.in_features if embedding is None else None, width, skip_weight)
        return prepare(
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
        """Return ``T(x)``: (..., d) -> (..., d); with an embedding B (:mod:`ilvae_fast.functional`) ``T(B x)``."""
        return dispatch.potential_and_map(self.operands(x, embedding), False, True)[1]

    def plan(self, x: Tensor, embedding: Tensor | int | None = None) -> Plan:
        """Say what ``self(x, embedding)`` would do here and now: its route and the reason, flops, bytes, saved memory.

        It depends on shape, dtype and device, on autocast and autograd as they are set at the call, and on the layer's
        ``route`` and ``recompute``. The map is not computed.

        Returns:
            The costs; see :class:`ilvae_fast.operators.plan.Plan`. Training terms are counted with all gradients.

        Raises:
            ValueError, TypeError: naming the argument, as the call itself.
        """
        return self.operands(x, embedding).plan()

    def potential(self, x: Tensor) -> Tensor:
        """Return ``phi(x) = G(x) + L/2 |x|^2``: (..., d) -> (...)."""
        return dispatch.potential_and_map(self.operands(x), True, False)[0]

    def potential_and_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(phi(x), T(x))``: (..., d) -> (...), (..., d)."""
        return dispatch.potential_and_map(self.operands(x), True, True)

    def jvp(self, x: Tensor, v: Tensor, embedding: Tensor | int | None = None) -> tuple[Tensor, Tensor]:
        """Return ``(T(B x), dT(B x)/dx v)``, for x and v (..., d), or (..., m) with an embedding B."""
        operands = self.operands(x, embedding)
        check_like("v", v, self._input[0], x)
        return dispatch.map_jvp(operands, v)

    def _check(self, x: Any) -> None:
        check_input(self._input[0], x, self.in_features, self._input[1], self.skip_weight)

    def jacobian(self, x: Tensor) -> Tensor:
        """Return ``dT/dx``: (..., d) -> (..., d, d), symmetric with eigenvalues >= L.

        Where autograd records, it is the Hessian of the potential in closed form, whose own derivatives are fast.
        """
        operands = self.operands(x)
        if operands.recorded():
            return hessian(operands)
        return stacked_tangents(lambda at, v: dispatch.map_jvp(operands._replace(x=at), v), x)

    def logabsdet(self, x: Tensor) -> Tensor:
        """Return ``log |det dT/dx|``: (..., d) -> (...), at least float32, differentiable.

        It takes memory (..., d, d) and d^3 work for each row.

        The density of ``T(x)`` at ``T(x)`` is that of x at x times ``exp(-logabsdet(x))``.

        Raises:
            ValueError: an activation has a kink, so that the map jumps and no such density exists.
        """
        inversion.check_smooth(self._activations)
        jacobian = self.jacobian(x)
        return torch.linalg.slogdet(jacobian.to(torch.promote_types(jacobian.dtype, torch.float32))).logabsdet

    def inverse(self, y: Tensor, *, initial: Tensor | None = None, tolerance: float | None = None) -> Tensor:
        """Return x with ``T(x) = y``: (..., d) -> (..., d), where ``phi(x) - <x, y>`` is least.

        It is differentiable any number of times with respect to y and the parameters
        (:mod:`ilvae_fast.layers.inversion`). It reads back to the host, and so works neither in compiled regions nor
        under ``torch.func``.

        Args:
            y: values of the map.
            initial: x to start from, of y's shape and dtype, such as the solution for a y near by; y itself if None.
            tolerance: of ``|T(x) - y|``, over ``1 + |y|``, both in float64; x is then off by at most ``1 / L`` times as
                much, and by its rounding. 1e-10 if None and y is float64, else float32's epsilon, 1.2e-7.

        Raises:
            ValueError, TypeError: y is not finite, or an activation has a kink, so that the map jumps and leaves values
                out, or weights are negative, so that the potential is not convex (``nonneg="none"`` without
                :meth:`project_`), or a bad argument.
            RuntimeError: there is no such x, or it was not found, as may be with L = 0.
        """
        check_input("y", y, self.in_features, "in_features", self.skip_weight)
        operands = self.operands(y)
        if self.nonneg.name == "none":
            for k, weight in enumerate(operands.weights):
                if bool((weight < 0).any()):
                    raise ValueError(
                        f"nonneg_weights[{k}]: got a smallest value of {float(weight.detach().min()):g}, wanted values "
                        ">= 0, or the potential is not convex and the map has no inverse: layer.project_()"
                    )
        return inversion.inverse(operands, initial, tolerance)

    def extra_repr(self) -> str:
        *hidden, output = self._activations.layers
        names = ", ".join(a.name for a in hidden)
        return (
            f"{self.in_features}, hidden_features={self.hidden_features}, activations=({names}; {output.name}), "
            f"nonneg={self.nonneg.name}, inverse_lipschitz={self._constant_repr()}"
        )


def _described(state: Tensor) -> str:
    """Say in words what :meth:`BrenierMap.get_extra_state` describes."""
    try:
        pairs = [(int(code), float(parameter)) for code, parameter in state[1:].reshape(-1, 2)]
        (code, parameter), *activations = pairs
        nonneg = of_code(code, parameter)
        layers = decode(*zip(*activations, strict=True)).layers
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
        return "a function that this version does not know"
    return f"nonneg={nonneg}, activations=({', '.join(map(str, layers))})"


def stacked_tangents(jvp: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """Return the Jacobian (..., D, m) at x (..., m), by one batched call with a tangent for each input coordinate."""
    m = x.shape[-1]
    tangents = torch.eye(m, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], m, m)
    return jvp(x.unsqueeze(-2).expand(*x.shape[:-1], m, m), tangents)[1].mT
