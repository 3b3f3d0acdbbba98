"""One training step, the map and then all its gradients, by every alternative a user has.

A peer takes a :class:`Problem` and returns a step: a callable without arguments that gives the map and the gradients of
``sum <v, T>`` with respect to x, skip_weight, bias and the effective weights, in this order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import ilvae_fast as il
from ilvae_fast import functional

Step = Callable[[], list[Tensor]]
_vjp: Any = torch.func.vjp  # typed upstream as either of its two forms


TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float64: 1e-10}
MODULE: dict[str, Any] = {"activation": "softplus", "nonneg": "softplus"}  # what peers have too


@dataclass
class Problem:
    """A softplus potential of width d on N rows; with ``latent`` the rows are z, injected by zero padding.

    ``raw``: parameters are raw weights, as a module has them; a step forms the effective ones, softplus(raw), and gives
    the gradients of the raw ones. Else they are the effective weights.
    """

    width: int
    hidden: tuple[int, ...]
    batch: int
    latent: int | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    raw: bool = False

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        layer = il.BrenierMap(self.width, self.hidden, dtype=torch.float64, **MODULE)
        x = torch.randn(self.batch, self.latent or self.width, dtype=torch.float64)
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        self.v = torch.randn(self.batch, self.width, dtype=torch.float64).to(**options)
        self.constant = torch.ones(1, device=self.device)
        weights = list(layer.raw_weights) if self.raw else layer.nonneg_weights()
        tensors = [x, layer.skip_weight, layer.bias, *weights]
        self.tensors = [t.detach().to(**options).requires_grad_() for t in tensors]
        self.x, self.skip_weight, self.bias, *self.weights = self.tensors

    def double(self) -> Problem:
        return replace(self, dtype=torch.float64)

    @property
    def activations(self) -> list[str]:
        return ["softplus"] * len(self.hidden) + ["identity"]

    @property
    def embedding(self) -> int | None:
        return self.width if self.latent else None

    def effective(self, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        return [F.softplus(w) for w in weights] if self.raw else weights

    def flops(self) -> float:
        """Of map and training terms with nothing recomputed, the injection used: the least there is to do."""
        plan = il.plan(
            self.batch, self.width, self.hidden, embedding_features=self.latent, dtype=self.dtype, recompute=False
        )
        return plan.map_flops + plan.training_flops

    def bytes(self) -> float:
        """Inputs and parameters read, results written, once each for map and training terms."""
        size = sum(t.numel() for t in self.tensors)
        return float(self.dtype.itemsize * (size + self.v.numel() + 2 * size + self.v.numel()))

    def __str__(self) -> str:
        hidden = "x".join(map(str, (self.hidden[0], len(self.hidden))))
        return f"{f'{self.latent} -> ' if self.latent else ''}{self.width}, {hidden}, {self.batch}"


def check(name: str, problem: Problem, step: Step, exact: Sequence[Tensor], tolerance: float | None = None) -> None:
    """Refuse to time what is not right: by ``tolerance``, that of the dtype if not given."""
    for ours, truth in zip(step(), exact, strict=True):
        error = float((ours.double() - truth).abs().max() / truth.abs().max())
        if not error < (tolerance or TOLERANCE[problem.dtype]):
            raise SystemExit(f"{name} is wrong on {problem}: relative error {error:.1e}")


def _with_autograd(problem: Problem, brenier_map: Callable[..., Tensor]) -> Step:
    def step() -> list[Tensor]:
        t = brenier_map(problem.x, problem.skip_weight, problem.bias, problem.weights)
        return [t.detach(), *torch.autograd.grad(t, problem.tensors, problem.v)]

    return step


def _options(problem: Problem, **more: Any) -> dict[str, Any]:
    return {
        "activations": problem.activations,
        "inverse_lipschitz": problem.constant,
        "embedding": problem.embedding,
        **more,
    }


def ours(problem: Problem, **options: Any) -> Step:
    """The public functional API, autograd included; with raw weights the module."""
    if not problem.raw:
        return _with_autograd(problem, partial(functional.brenier_map, **_options(problem, **options)))
    options = {"dtype": problem.dtype, "device": problem.device, **MODULE, **options}
    layer = il.BrenierMap(problem.width, problem.hidden, **options)
    parameters = [layer.skip_weight, layer.bias, *layer.raw_weights]
    with torch.no_grad():
        for ours, theirs in zip(parameters, problem.tensors[1:], strict=True):
            ours.copy_(theirs)

    def step() -> list[Tensor]:
        t = layer(problem.x, problem.embedding)
        return [t.detach(), *torch.autograd.grad(t, [problem.x, *parameters], problem.v)]

    return step


def ours_stateless(problem: Problem) -> Step:
    """The stateless pair ``brenier_map`` and ``brenier_map_vjp``, of tensors without autograd as ``torch.func`` has."""
    options = _options(problem)
    operands = (
        problem.x.detach(),
        problem.skip_weight.detach(),
        problem.bias.detach(),
        [w.detach() for w in problem.weights],
    )

    def step() -> list[Tensor]:
        t = functional.brenier_map(*operands, **options)
        g: Any = functional.brenier_map_vjp(
            *operands, **options, map_cotangent=problem.v, wrt=("x", "skip_weight", "bias", "weights")
        )
        return [t, g.x, g.skip_weight, g.bias, *g.weights]

    return step


def _padded(problem: Problem, x: Tensor) -> Tensor:
    return F.pad(x, (0, problem.width - x.shape[-1])) if problem.latent else x


def potential(y: Tensor, skip_weight: Tensor, bias: Tensor, weights: Sequence[Tensor], constant: Tensor) -> Tensor:
    """``G(y) + L/2 |y|^2`` as everybody writes it, by PyTorch's own softplus."""
    widths = [w.shape[1] for w in weights]
    first, *others, out = F.linear(y, skip_weight, bias).split([*widths, 1], dim=-1)
    h = F.softplus(first)
    for weight, a in zip(weights[:-1], others, strict=True):
        h = F.softplus(a + F.linear(h, weight))
    return (out + F.linear(h, weights[-1])).squeeze(-1) + constant / 2 * y.square().sum(-1)


def eager(problem: Problem) -> Step:
    """Double backward, as everybody writes it."""

    def brenier_map(x: Tensor, skip_weight: Tensor, bias: Tensor, weights: Sequence[Tensor]) -> Tensor:
        y = _padded(problem, x)
        phi = potential(y, skip_weight, bias, problem.effective(weights), problem.constant)
        return torch.autograd.grad(phi.sum(), y, create_graph=True)[0]

    return _with_autograd(problem, brenier_map)


def closed_form_map(
    x: Tensor, skip_weight: Tensor, bias: Tensor, weights: Sequence[Tensor], skip_in: Tensor | None = None
) -> Tensor:
    """``grad G`` in plain tensor operations; differentiate it once. ``skip_in``: the columns of A that x meets."""
    a = F.linear(x, skip_weight if skip_in is None else skip_in, bias)
    widths = [w.shape[1] for w in weights]
    *parts, _ = a.split([*widths, 1], dim=1)
    slopes, h = [], None
    for k, part in enumerate(parts):
        pre = part if h is None else part + h @ weights[k - 1].T
        slopes.append(torch.sigmoid(pre))
        if k + 1 < len(parts):
            h = F.softplus(pre)
    d = [weights[-1] * slopes[-1]]
    for k in range(len(parts) - 2, -1, -1):
        d.insert(0, (d[0] @ weights[k]) * slopes[k])
    return torch.cat(d, dim=1) @ skip_weight[:-1] + skip_weight[-1]


def _closed_form(problem: Problem) -> Callable[..., Tensor]:
    def brenier_map(x: Tensor, skip_weight: Tensor, bias: Tensor, weights: Sequence[Tensor]) -> Tensor:
        y = _padded(problem, x)
        return closed_form_map(y, skip_weight, bias, problem.effective(weights)) + problem.constant * y

    return brenier_map


def closed_form(problem: Problem) -> Step:
    """The closed-form map, eager."""
    return _with_autograd(problem, _closed_form(problem))


def closed_form_compiled(problem: Problem) -> Step:
    """The closed-form map under torch.compile."""
    return _with_autograd(problem, torch.compile(_closed_form(problem), fullgraph=True, dynamic=False))


def expert(problem: Problem) -> Step:
    """The closed form of somebody who uses the injection: A's first columns meet z."""

    def brenier_map(x: Tensor, skip_weight: Tensor, bias: Tensor, weights: Sequence[Tensor]) -> Tensor:
        t = closed_form_map(x, skip_weight, bias, problem.effective(weights), skip_weight[:, : x.shape[1]])
        return t + problem.constant * _padded(problem, x)

    return _with_autograd(problem, brenier_map)


def func_compiled(problem: Problem) -> Step:
    """``torch.func.vjp`` of ``torch.func.grad`` of the potential, in one compiled step."""

    def total(y: Tensor, skip_weight: Tensor, bias: Tensor, weights: Sequence[Tensor]) -> Tensor:
        return potential(y, skip_weight, bias, problem.effective(weights), problem.constant).sum()

    def brenier_map(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.grad(total)(_padded(problem, x), parameters[0], parameters[1], parameters[2:])

    @torch.compile(fullgraph=True, dynamic=False)
    def step(v: Tensor, *tensors: Tensor) -> list[Tensor]:
        t, pull = _vjp(brenier_map, *tensors)
        return [t, *pull(v)]

    detached = [t.detach() for t in problem.tensors]
    return lambda: step(problem.v, *detached)


def jax_jit(problem: Problem) -> Step:
    """The closed form in JAX, map and vjp in one jitted function (extra ``jax``)."""
    import jax
    import jax.numpy as jnp

    def brenier_map(x: Any, skip_weight: Any, bias: Any, *weights: Any) -> Any:
        if problem.raw:
            weights = tuple(map(jax.nn.softplus, weights))
        y = jnp.pad(x, ((0, 0), (0, problem.width - x.shape[1]))) if problem.latent else x
        splits = [sum(problem.hidden[: k + 1]) for k in range(len(problem.hidden))]
        *parts, _ = jnp.split(y @ skip_weight.T + bias, splits, axis=1)
        slopes, h = [], None
        for k, part in enumerate(parts):
            pre = part if h is None else part + h @ weights[k - 1].T
            slopes.append(jax.nn.sigmoid(pre))
            h = jax.nn.softplus(pre)
        d = [weights[-1] * slopes[-1]]
        for k in range(len(parts) - 2, -1, -1):
            d.insert(0, (d[0] @ weights[k]) * slopes[k])
        return jnp.concatenate(d, axis=1) @ skip_weight[:-1] + skip_weight[-1] + y

    @jax.jit
    def values(v: Any, *tensors: Any) -> list[Any]:
        t, pull = jax.vjp(brenier_map, *tensors)
        return [t, *pull(v)]

    arrays = [jnp.asarray(t.detach().numpy()) for t in (problem.v, *problem.tensors)]

    def step() -> list[Tensor]:
        results = jax.block_until_ready(values(*arrays))
        return [torch.from_dlpack(r) for r in results]

    return step


PEERS: dict[str, Callable[[Problem], Step]] = {
    "eager double backward": eager,
    "closed form": closed_form,
    "closed form, compiled": closed_form_compiled,
    "torch.func, compiled": func_compiled,
    "JAX, jit": jax_jit,
}
