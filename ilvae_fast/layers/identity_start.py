r"""Initial weights with which the map starts near the identity: ``T(x) ~ x`` for x ~ N(0, I_d).

Solvers of optimal transport start there, by pre-training (Korotin et al., ICLR 2021); here nothing is trained. The
notation is that of :mod:`.initialization`: ``T(x) = sum_i g_i s'(a_i) A_i + L x`` over the units of all layers, with
rows A_i = alpha u_i, |u_i| ~ 1, and a_i = alpha u_i x + b_i + (what comes from below). The sum has to be (1 - L) x.

*One direction.* s' increases, so with t = u x ~ N(0, 1) it is ``s'(alpha t + b) = const + lambda t + rest`` with
lambda = E[t s'] >= 0. A small alpha makes the rest small where s' is smooth; biases spread over the range of alpha t
make that of the mean over a few units small, also where s' is a step (leaky_relu). Units come in pairs (u, b), (-u, b)
if there are 2 d of them; what is even in t then cancels. :func:`_placement` looks up by quadrature alpha, as large as
it can be with a rest of at most _REST (a small one makes units slow to train), and the biases that go with it.

*All directions.* The linear parts are ``sum_i g_i alpha lambda_i u_i u_i^T x``. :func:`_tight_frame` makes that a
multiple of x, for the rows of all layers together. T - L x lies in the span of the rows: of fewer than d units, S, it
holds the share S / d.

*All layers.* The weights in a W_k are equal, and so are, up to s'_k, the adjoints g of the units below. What comes from
below is c_k (the mean of h_{k-1} - its expectation), the same for all units of a layer and nearly a function of |x|: to
first order pairs cancel what it does to T. c_k keeps its deviation below _SHIFT alpha, and the share in T of the layers
below at _GAIN of the layer's own: c_k <= _GAIN / E[s'_k]. A larger one would let g change with x.

*The scale.* A bias keeps the output activation where its slope is near 1. The mean of w and the output's skip row are
the least squares fit of (1 - L) x at points of N(0, I). A network that vanished could not be trained: it supplies at
least _LEAST x, also for L >= 1, where T(x) ~ (L + _LEAST) x.

E |T(x) - x|^2 / E |x|^2 at L = 0 is at most 0.02 with smooth activations, or a squared first layer, and 128 units in
each layer, for d up to 64 and depths 1 to 4 (tests). With kinks in all layers T is a staircase: 0.36 with one unit for
each coordinate, 0.14 with four, 0.02 with 32.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ..operators.activations import Activation

_GAIN = 0.5
_SHIFT = 0.25
_LEAST = 0.05
_SLOPE = 0.99  # of the output activation, at least
_POINTS = 512  # of the least squares fit; half of them are the negatives of the others
_PROJECTIONS = 8
_REST = 1e-2  # of the variance along a direction: small enough
# alpha, and biases in units of it, the preferred first
_SCALES = [2.0 ** (-i / 2) for i in range(11)]
_SHIFTS = [0.0, 1.0, 2.0, 3.0, -1.0, -2.0]
_SPREADS = [3.0, 2.25, 1.5, 0.75, 0.0]


def _value_and_slope(activation: Activation, a: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.enable_grad():
        a = a.detach().clone().requires_grad_()
        value = activation(a)
        (slope,) = torch.autograd.grad(value.sum(), a)
    return value.detach(), slope


@functools.cache
def _quadrature() -> tuple[Tensor, Tensor]:
    """Nodes and weights of E over t ~ N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(96)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


class _Expected(NamedTuple):
    """Expectations over t ~ N(0, 1) for units with a = alpha t + bias."""

    linear: Tensor  # E[t s'] of each
    slope: float  # E[s'], their mean
    deviation: float  # of the mean of their h

    @classmethod
    def of(cls, activation: Activation, alpha: float, bias: Tensor) -> _Expected:
        nodes, weights = _quadrature()
        value, slope = _value_and_slope(activation, alpha * nodes + bias[:, None])
        mean = value.mean(0)
        variance = (mean - mean @ weights).square() @ weights
        return cls(slope @ (nodes * weights), float(slope.mean(0) @ weights), math.sqrt(float(variance)))


@functools.lru_cache(maxsize=256)
def _placement(activation: Activation, sharing: int, paired: bool) -> tuple[float, Tensor] | None:
    """alpha, and the biases of the ``sharing`` units (or pairs) of a direction; None for a linear activation."""
    nodes, weights = _quadrature()
    candidates = torch.cartesian_prod(*(torch.tensor(c, dtype=torch.float64) for c in (_SHIFTS, _SCALES, _SPREADS)))
    shift, alpha, spread = candidates.T[..., None]
    centred = (torch.arange(sharing, dtype=torch.float64) + 0.5) / sharing * 2 - 1
    bias = alpha * (shift + spread * centred)
    response = _value_and_slope(activation, alpha[..., None] * nodes + bias[..., None])[1].mean(1)
    response = response - (response @ weights)[:, None]
    if paired:
        response = (response - response.flip(-1)) / 2  # the nodes are symmetric
    variance = response.square() @ weights
    if float(variance.max()) < 1e-12:
        return None
    rest = 1 - (response @ (nodes * weights)).square() / variance.clamp(min=1e-300)
    rest[variance < 1e-6 * variance.max()] = 1.0  # nearly linear there
    chosen = int((rest <= max(_REST, 1.1 * float(rest.min()))).nonzero()[0])
    return float(alpha[chosen]), bias[chosen]


def _tight_frame(importance: Tensor, width: int) -> Tensor:
    """Random rows u (count, width), |u| ~ 1, with ``sum_i importance_i u_i u_i^T`` a multiple of I, or of a projection
    where there are fewer than ``width``: by making them tight and of unit norm in turn."""
    root = importance.clamp(min=1e-3 * float(importance.max())).sqrt()[:, None]
    u = torch.randn(len(importance), width, dtype=torch.float64, device="cpu")
    if len(u) <= width:
        u = torch.linalg.qr(u.mT).Q.mT / root
        return u / u.square().sum(1).mean().sqrt()
    for _ in range(_PROJECTIONS if width <= 64 else 1):  # norms of long random rows are nearly equal
        u = u / torch.linalg.vector_norm(u, dim=1, keepdim=True)
        u = torch.linalg.solve_triangular(torch.linalg.qr(root * u).R, u, upper=True, left=False)
        u = u / u.square().sum(1).mean().sqrt()
    return u


def _hidden_rows(
    widths: Sequence[int], activations: Sequence[Activation], width: int
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Rows and biases of the hidden layers, and c_2 .. c_K."""
    bent = sum(n for n, a in zip(widths, activations, strict=True) if _placement(a, 1, True))
    paired = bent >= 2 * width
    sharing = max(min(bent // (2 * width if paired else width), 4 if width > 1 else 16), 1)
    counts = [(n + 1) // 2 if paired else n for n in widths]  # of pairs, or of units
    places = torch.arange(sum(counts)).split(counts)

    scales, biases, expected = [], [], []
    for activation, place in zip(activations, places, strict=True):
        alpha, bias = _placement(activation, sharing, paired) or (1.0, torch.zeros(sharing, dtype=torch.float64))
        scales.append(alpha)
        biases.append(bias[place % sharing])
        expected.append(_Expected.of(activation, alpha, biases[-1]))
    gains = [
        min(_GAIN / above.slope, _SHIFT * alpha * math.sqrt(width) / max(below.deviation, 1e-6))
        for alpha, (below, above) in zip(scales[1:], itertools.pairwise(expected), strict=True)
    ]
    importance = torch.zeros(int(places[-1][-1]) // sharing + 1, dtype=torch.float64)  # of directions
    total = 1.0  # n_k g_k, from the top down
    for k in reversed(range(len(widths))):
        importance.index_add_(0, places[k] // sharing, total / widths[k] * scales[k] * expected[k].linear)
        if k:
            total *= gains[k - 1] * expected[k].slope
    directions = _tight_frame(importance, width)
    rows = [alpha * directions[place // sharing] for alpha, place in zip(scales, places, strict=True)]
    return (
        [torch.cat([r, -r])[:n] for r, n in zip(rows, widths, strict=True)],
        [torch.cat([b, b])[:n] for b, n in zip(biases, widths, strict=True)],
        gains,
    )


@functools.lru_cache(maxsize=256)
def _end_of_bend(activation: Activation) -> float:
    """Where the slope of an output activation is _SLOPE at least, from there on."""
    points = torch.cat([torch.zeros(1, dtype=torch.float64), 2.0 ** torch.arange(-10, 31, dtype=torch.float64)])
    good = _value_and_slope(activation, points)[1] >= _SLOPE
    return float(points[int(good.nonzero()[0])]) if good.any() else 0.0


@torch.no_grad()
def initialize_identity_(
    skip_weight: Tensor,
    bias: Tensor,
    weights: Sequence[Tensor],
    activations: Sequence[Activation],
    inverse_lipschitz: Tensor,
) -> None:
    """Fill skip_weight (S+1, d), bias (S+1,) and the effective weights [W_2, .., w] in place (module docstring).

    Args:
        inverse_lipschitz: L (1,).

    Raises:
        ValueError: all hidden activations are linear, so that the network has no part but constants in the map.
    """
    *hidden, output = activations
    if all(_placement(a, 1, True) is None for a in hidden):
        raise ValueError(
            f"initialization: got 'identity' with activation {hidden[-1].name!r} in all hidden layers, wanted one that "
            "is not linear, or the map is L x + a constant whatever the weights; or initialization='random'"
        )
    if skip_weight.is_meta or is_fake(skip_weight):
        return
    widths, width = [w.shape[1] for w in weights], skip_weight.shape[1]
    rows, biases, gains = _hidden_rows(widths, hidden, width)

    half = torch.randn(_POINTS // 2, width, dtype=torch.float64, device="cpu")
    x = torch.cat([half, -half, torch.zeros_like(half[:1])])
    slopes: list[Tensor] = []
    mean = x.new_zeros(len(x), 1)  # of the layer below, over units
    for k, activation in enumerate(hidden):
        if k:
            biases[k] = biases[k] - gains[k - 1] * mean.mean()
        h, slope = _value_and_slope(activation, x @ rows[k].T + biases[k] + (gains[k - 1] * mean if k else 0))
        slopes.append(slope)
        mean = h.mean(1, keepdim=True)

    # the network's gradient where the entries of w are 1 / n_K
    gradient, adjoint = torch.zeros_like(x), torch.ones_like(mean)
    for k in reversed(range(len(hidden))):
        part = adjoint * slopes[k] / widths[k]
        gradient += part @ rows[k]
        adjoint = part.sum(1, keepdim=True) * (gains[k - 1] if k else 1)
    constant = gradient.mean(0)
    gradient -= constant
    scale = float((gradient * x).sum() / gradient.square().sum())
    potential = scale * (mean.squeeze(1) - x @ constant)
    level = _end_of_bend(output)
    start = potential.mean() if output.name == "identity" else potential.min()

    share = (1 - inverse_lipschitz).clamp(min=_LEAST).to(weights[-1].dtype)
    skip_weight[:-1] = torch.cat(rows)
    skip_weight[-1] = -scale * share.to(skip_weight.dtype) * constant.to(skip_weight)
    bias[:-1] = torch.cat(biases)
    bias[-1:] = level - share * float(start)
    for weight, gain, n in zip(weights[:-1], gains, widths, strict=False):
        weight.fill_(gain / n)
    weights[-1].copy_((share * scale / widths[-1]).expand_as(weights[-1]))
