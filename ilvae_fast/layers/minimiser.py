"""The minimiser of ``phi(x) - <x, y>``, each row for itself: where a Brenier map takes the value y.

Its slope is ``T(x) - y`` and its Hessian ``dT/dx >= L``. Limited-memory BFGS (Nocedal & Wright, algorithm 7.4) descends
in float32 as far as that dtype allows, and then in float64. It needs one map for a step. Badly conditioned rows are
left to Newton's method in float64, which needs the Hessian, or products with it where rows are wide. Rows that have
arrived are not computed any more.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..operators import dispatch
from ..operators.hessian import hessian
from ..operators.operands import Operands

_SINGLE = 1e-5  # float32 goes down to this |T(x) - y|, over 1 + |y|
_PAIRS = 8  # of steps and changes of the slope that BFGS remembers at most
_SINGLE_STEPS, _DOUBLE_STEPS, _NEWTON_STEPS = 200, 100, 100
_PATIENCE = 10  # steps of BFGS without a smaller slope, until the next method takes over
_FLAT = 1e-7  # less curvature, over |step| |change|, is rounding
_SHORTENINGS = 40
_DECREASE = 1e-4  # of what the slope promises, for a step to be taken (Armijo)
_WIDEST = 128  # of rows whose Hessian is factorised; products with it are cheaper for wider ones
_BLOCK = 1 << 19  # values of x that are worked on together, which bounds the memory of their pairs
_TANGENTS = 1 << 19  # values of a layer's tangents that are worked on together


def minimiser(exact: Operands, tolerance: float, initial: Tensor | None) -> Tensor:
    """x (..., d) with ``|T(x) - y| <= tolerance (1 + |y|)``.

    Args:
        exact: operands in float64, with y (..., d) in the place of x.
        initial: x to start from, (..., d); y if None.

    Raises:
        RuntimeError: not found.
    """
    shape, d = exact.x.shape, exact.x.shape[-1]
    y = exact.x.reshape(-1, d)
    x = (y if initial is None else initial.reshape(-1, d)).clone()
    wanted = tolerance * (1 + _norm(y))
    single = _cast(exact, torch.float32)
    if not len(y):
        return x.reshape(shape)
    missed, error = 0, 0.0
    for rows in torch.arange(len(y), device=y.device).split(max(1, _BLOCK // max(d, 1))):
        state = _descend(exact, single, y[rows], wanted[rows], x[rows])
        x[rows] = state.x
        missed += int(state.open().sum())
        error = max(error, float(state.error.nan_to_num(math.inf).max()))
    if missed:
        raise RuntimeError(
            f"y: found no x with T(x) = y for {missed} of {len(y)} rows; |T(x) - y| is up to {error:.3g}, wanted "
            f"{float(wanted.max()):.3g}. There is one for every finite y if inverse_lipschitz > 0, which is "
            f"{float(exact.inverse_lipschitz):g}"
        )
    return x.reshape(shape)


def solve(operands: Operands, target: Tensor) -> Tensor:
    """z (..., d) with ``dT/dx z = target`` at the rows x (..., d) of the operands."""
    shape, d = target.shape, target.shape[-1]
    flat = operands._replace(x=operands.x.reshape(-1, d))
    return _solve(flat, target.reshape(-1, d), 1e-12).reshape(shape)


def _cast(operands: Operands, dtype: torch.dtype) -> Operands:
    """The same operands, without an embedding, in another dtype."""
    x, skip_weight, bias, weights, constant, *_ = operands
    x, skip_weight, bias, constant, *weights = (t.to(dtype) for t in (x, skip_weight, bias, constant, *weights))
    return operands._replace(x=x, skip_weight=skip_weight, bias=bias, weights=weights, inverse_lipschitz=constant)


class _Descent(NamedTuple):
    """Where the descent of each row is, and what BFGS knows of it. Rows lie in the last dimension but one.

    BFGS remembers in float32, whatever x is in: a direction need not be exact.
    """

    x: Tensor
    y: Tensor
    wanted: Tensor  # |slope| to arrive at
    value: Tensor  # of phi(x) - <x, y>
    slope: Tensor
    error: Tensor  # |slope|
    least: Tensor  # error so far
    idle: Tensor  # steps since then
    scale: Tensor  # of the first guess of the inverse Hessian
    steps: Tensor  # (pairs, N, d), of x
    changes: Tensor  # (pairs, N, d), of the slope
    inverses: Tensor  # (pairs, N, 1), 1 / <step, change>; 0 for no pair

    @classmethod
    def begin(cls, operands: Operands, x: Tensor, y: Tensor, wanted: Tensor) -> _Descent:
        """At x, with the curvature along the slope as all that is known."""
        value, slope = _look(operands, x, y)
        n, d = x.shape
        curvature = _dot(slope, dispatch.map_jvp(operands._replace(x=x), slope)[1])
        scale = torch.where(curvature > 0, _dot(slope, slope) / curvature, 1.0).float()
        steps, changes = scale.new_zeros(2, min(_PAIRS, d + 1), n, d)
        error, inverses = _norm(slope), steps.new_zeros(len(steps), n, 1)
        least, idle = error.float(), torch.zeros_like(scale)
        return cls(x, y, wanted, value, slope, error, least, idle, scale, steps, changes, inverses)

    def open(self) -> Tensor:
        """Which rows (N) have not arrived. NaN has not."""
        return ~(self.error <= self.wanted).squeeze(-1)

    def take(self, rows: Tensor) -> _Descent:
        """A copy of some rows."""
        return _Descent(*(t[..., rows, :] for t in self))

    def put(self, rows: Tensor, others: _Descent) -> None:
        """Write what others have into some rows."""
        for mine, theirs in zip(self, others, strict=True):
            mine[..., rows, :] = theirs

    def in_order(self, latest: int) -> _Descent:
        """With the pairs in the order of time, where ``latest`` is the place of the last one."""
        ordered = (t.roll(-latest - 1, 0) for t in (self.steps, self.changes, self.inverses))
        return _Descent(*self[:-3], *ordered)


def _descend(exact: Operands, single: Operands, y: Tensor, wanted: Tensor, x: Tensor) -> _Descent:
    """All methods, one after the other, from x (N, d)."""
    near = wanted.clamp(min=_SINGLE * (1 + _norm(y)))
    state = _Descent.begin(single, x.float(), y.float(), near.float())
    _quasi_newton(single, state, _SINGLE_STEPS)
    overflown = ~state.x.isfinite().all(-1, keepdim=True)
    x = torch.where(overflown, x, state.x.double())
    value, slope = _look(exact, x, y)
    state = state._replace(
        x=x, y=y, wanted=wanted, value=value, slope=slope, error=_norm(slope), idle=torch.zeros_like(state.idle)
    )
    _quasi_newton(exact, state, _DOUBLE_STEPS)
    _newton(exact, state)
    return state


def _quasi_newton(operands: Operands, every: _Descent, limit: int) -> None:
    """Go down by BFGS, until all rows have arrived or have not come nearer for a while."""
    rows = torch.arange(len(every.x), device=every.x.device)
    state, pairs = every.take(rows), len(every.steps)
    latest = pairs - 1
    for _ in range(limit):
        going = state.open() & (state.idle < _PATIENCE).squeeze(-1)
        if 2 * int(going.sum()) <= len(rows):  # to leave fewer out would cost more than it spares
            every.put(rows, state.in_order(latest))
            rows = rows[going]
            if not len(rows):
                return
            state, latest = every.take(rows), pairs - 1
        x, value, slope = _step(operands, state, _direction(state, latest))
        latest = (latest + 1) % pairs
        step, change = (x - state.x).float(), (slope - state.slope).float()
        product, squared = _dot(step, change), _dot(change, change)
        bent = product > _FLAT * squared.sqrt() * _norm(step)
        state.steps[latest], state.changes[latest] = step, change
        state.inverses[latest] = torch.where(bent, 1 / product, 0.0)
        error = _norm(slope)
        nearer = error < 0.9 * state.least
        state = state._replace(
            x=x,
            value=value,
            slope=slope,
            error=error,
            least=torch.where(nearer, error.float(), state.least),
            idle=torch.where(nearer, 0.0, state.idle + 1),
            scale=torch.where(bent, product / squared, state.scale),
        )
    every.put(rows, state.in_order(latest))


def _direction(state: _Descent, latest: int) -> Tensor:
    """Minus the slope times what BFGS takes for the inverse Hessian, or minus the slope where that is of no use."""
    places = [(latest - age) % len(state.steps) for age in range(len(state.steps))]
    q = state.slope.float()
    along = []
    for i in places:
        along.append(state.inverses[i] * _dot(state.steps[i], q))
        q = torch.addcmul(q, along[-1], state.changes[i], value=-1)
    q = q * state.scale
    for i, a in zip(reversed(places), reversed(along), strict=True):
        q = torch.addcmul(q, a - state.inverses[i] * _dot(state.changes[i], q), state.steps[i])
    along_slope = _dot(q, state.slope)
    return -torch.where((along_slope > 0) & along_slope.isfinite(), q, state.slope).to(state.slope.dtype)


def _newton(operands: Operands, every: _Descent) -> None:
    """Go down by Newton's method, until all rows have arrived."""
    for _ in range(_NEWTON_STEPS):
        rows = every.open().nonzero().squeeze(-1)
        if not len(rows):
            return
        named = ("x", "y", "wanted", "value", "slope", "error")
        state = every._replace(**{name: getattr(every, name)[rows] for name in named})
        # where the error is large a rough direction will do; the better it gets, the more exactly is it worth solving
        accuracy = (state.error / (1 + _norm(state.y))).clamp(1e-12, 0.1)
        direction = -_solve(operands._replace(x=state.x), state.slope, accuracy)
        x, value, slope = _step(operands, state, direction)
        every.x[rows], every.value[rows], every.slope[rows], every.error[rows] = x, value, slope, _norm(slope)


def _step(operands: Operands, at: _Descent, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Go along the direction, as far as the value falls: x, value and slope there.

    What the value falls by may drown in its rounding. There a slope that does not rise too steeply stands for it (Hager
    & Zhang, 2005).
    """
    x = at.x + direction
    value, slope = _look(operands, x, at.y)
    promised, length = _dot(at.slope, direction), torch.ones_like(value)
    rounding = 100 * torch.finfo(x.dtype).eps * (1 + at.value.abs())
    for _ in range(_SHORTENINGS):
        rise = _dot(slope, direction)
        lower = value <= at.value + _DECREASE * length * promised
        level = (value <= at.value + rounding) & (rise <= (1 - 2 * _DECREASE) * promised.abs())
        far = (~(lower | level)).squeeze(-1).nonzero().squeeze(-1)
        if not len(far):
            break
        # to where the slope vanishes if it is linear; with NaN to a tenth
        part = (promised[far] / (promised[far] - rise[far])).nan_to_num(0.0).clamp(0.1, 0.5)
        length[far] = length[far] * part
        x[far] = at.x[far] + length[far] * direction[far]
        value[far], slope[far] = _look(operands, x[far], at.y[far])
    return x, value, slope


def _look(operands: Operands, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``phi(x) - <x, y>`` (N, 1), and its slope ``T(x) - y`` (N, d)."""
    phi, t = dispatch.potential_and_map(operands._replace(x=x), True, True)
    return phi.unsqueeze(-1) - _dot(x, y), t - y


def _solve(operands: Operands, target: Tensor, accuracy: Tensor | float) -> Tensor:
    """z (N, d) with ``dT/dx z = target``: exactly by Cholesky factors, or to a relative accuracy."""
    d = target.shape[-1]
    if d > _WIDEST:
        return _conjugate_gradients(operands, target, accuracy)
    z = torch.empty_like(target)
    widest = max(d, *(w.shape[-1] for w in operands.weights))
    for rows in torch.arange(len(target), device=target.device).split(max(1, _TANGENTS // (d * widest))):
        factor, failed = torch.linalg.cholesky_ex(hessian(operands._replace(x=operands.x[rows])))
        z[rows] = torch.cholesky_solve(target[rows].unsqueeze(-1), factor).squeeze(-1)
        if failed.any():  # singular but for rounding
            rows = rows[failed > 0]
            at = operands._replace(x=operands.x[rows])
            z[rows] = _conjugate_gradients(at, target[rows], 1e-12)
    return z


def _conjugate_gradients(operands: Operands, target: Tensor, accuracy: Tensor | float) -> Tensor:
    """z (N, d) with ``dT/dx z = target`` to a relative accuracy, row by row."""
    z, residual = torch.zeros_like(target), target
    direction, squared = residual, _dot(residual, residual)
    wanted = squared * accuracy**2
    for _ in range(10 * target.shape[-1] + 10):
        open_rows = squared > wanted
        if not open_rows.any():
            break
        image = dispatch.map_jvp(operands, direction)[1]
        curvature = _dot(direction, image)
        length = torch.where(open_rows & (curvature > 0), squared / curvature, 0.0)
        z = z + length * direction
        residual = residual - length * image
        before, squared = squared, _dot(residual, residual)
        direction = residual + torch.where(before > 0, squared / before, 0.0) * direction
    return z


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _norm(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a, dim=-1, keepdim=True)
