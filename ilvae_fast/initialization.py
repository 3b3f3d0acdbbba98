r"""Initial weights that give potential and map a sensible scale, for every activation and parametrisation.

Hoedt & Klambauer (NeurIPS 2023) choose means and variances of the non-negative weights, and biases that undo the mean,
so that *pre-activations* of an input-convex network keep zero mean and unit variance. What a Brenier map hands on is
the *gradient*; its scale follows from the same mean-field argument.

Setting. Let x ~ N(0, I_d) and r = |x| / sqrt(d); draw skip rows A_k ~ N(0, 1/d) and hidden weights W_k log-normal (as
there) of mean mu_k = c_k / n_{k-1} and a standard deviation equal to the mean; let biases be -e_{k-1} times the row
sums of W_k. Given x, the pre-activations of layer k are, across its units, Gaussian with mean m_k and variance v_k:

    m_k = c_k (E[h_{k-1}] + sqrt(Var[h_{k-1}] / n_{k-1}) xi_k - e_{k-1}),   h_k = s_k(m_k + sqrt(v_k) z), z ~ N(0, 1)
    v_k = r^2 + c_k^2 / n_{k-1} E[(h_{k-1} - e_{k-1})^2],   e_k = E[h_k] at r = 1, xi = 0

where xi_k ~ N(0, 1) is the fluctuation of a mean over n_{k-1} units: it moves all units of the layers above together,
and in narrow deep networks it, not the spread among units, decides. c_k = 1 / E[s'_{k-1}] keeps the total sum_i g_i of
the adjoints the same in all layers, so that each contributes alike. (Hoedt & Klambauer use the far wider spread
n sigma^2 = 1, for diversity among units; here the skip terms provide it.)

The map. Of the adjoints follow the second moments q = E[g_i^2] and p = E[g_i g_j] of two units of a layer, from
w (p = mu^2, q = 2 mu^2) downwards through D_k = g_k s'_k:

    p_{k-1} = mu_k^2 (n_k (n_k - 1) p_k E[s'_k]^2 + n_k q_k E[s'_k^2]),   q_{k-1} = p_{k-1} + mu_k^2 n_k q_k E[s'_k^2]

T = sum_k D_k A_k has two parts. The rows A_k are independent: a random part of variance sum_k n_k q_k E[s'_k^2] / d per
coordinate. And the potential depends on r through all units at once: with Phi(r) = c (E[h_K] - e_K) the gradient of
Phi(|x| / sqrt(d)) has the variance Phi'(r)^2 / d^2 per coordinate. Both are proportional to the mean of w (given
D_out), which is set so that their sum, averaged over r and xi, is 1. The output's skip row starts at 0 and adds nothing
to T.

For x ~ N(0, I) and L = 0 the variance of a coordinate of T, over x and weights, is then about 1: tests hold it in
[0.25, 4] for depths 1 to 6, widths 32 to 512, d from 2 to 784, all activations and parametrisations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .activations import Activation

_NODES = 32  # of the Gauss-Hermite quadrature over units
_SCENARIOS = 128  # of (r, xi_2, .., xi_K, xi_out)
_STEP = 1e-3  # of the central difference in r


@functools.cache
def _quadrature() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of E over z ~ N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    return nodes, weights / weights.sum()


@functools.cache
def _fluctuations(layers: int) -> np.ndarray:
    """xi (layers + 1, scenarios): fixed normal numbers, centred and scaled; the last row is for the quantile of r."""
    xi = np.random.default_rng(0).standard_normal((layers + 1, _SCENARIOS))
    xi -= xi.mean(axis=1, keepdims=True)
    return xi / xi.std(axis=1, keepdims=True)


class _Moments:
    """Expectations over z ~ N(0, 1) of h = s(m + sd z) and of its slope, for vectors m and sd."""

    def __init__(self, activation: Activation, mean: np.ndarray, deviation: np.ndarray) -> None:
        nodes, weights = _quadrature()
        # without the caller's modes: numbers are wanted under a FakeTensorMode too
        with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
            a = torch.from_numpy(mean[:, None] + deviation[:, None] * nodes).requires_grad_()
            value = activation(a)
            (slope,) = torch.autograd.grad(value.sum(), a)
            values, slopes = value.detach().numpy(), slope.numpy()
        self.value, self.square = values @ weights, values**2 @ weights
        self.slope, self.slope_square = slopes @ weights, slopes**2 @ weights

    def about(self, centre: float) -> np.ndarray:
        """E (h - centre)^2."""
        return np.maximum(self.square - 2 * centre * self.value + centre**2, 0)

    def variance(self) -> np.ndarray:
        return np.maximum(self.square - self.value**2, 0)


class _MeanField:
    """The recursion of the module docstring."""

    def __init__(self, widths: Sequence[int], activations: Sequence[Activation]) -> None:
        self.widths, self.activations = widths, activations
        self.gains: list[float] = []  # c_2 .. c_K, c_out
        self.centres: list[float] = []  # e_1 .. e_K
        one = np.ones(1)
        moments = _Moments(activations[0], 0 * one, one)
        for n, activation in zip(widths, activations[1:], strict=True):
            gain, centre = 1 / max(float(moments.slope[0]), 1e-3), float(moments.value[0])
            self.gains.append(gain)
            self.centres.append(centre)
            moments = _Moments(activation, 0 * one, np.sqrt(one + gain**2 / n * moments.about(centre)))

    def climb(self, r: np.ndarray, xi: np.ndarray) -> tuple[list[_Moments], np.ndarray]:
        """Moments of the hidden layers, and o / scale, in scenarios r (.) and xi (K, .)."""
        layers: list[_Moments] = []
        mean, variance = 0 * r, r**2
        for k, n in enumerate(self.widths):
            layers.append(_Moments(self.activations[k], mean, np.sqrt(variance)))
            h, gain, centre = layers[-1], self.gains[k], self.centres[k]
            mean = gain * (h.value + np.sqrt(h.variance() / n) * xi[k] - centre)
            variance = r**2 + gain**2 / n * h.about(centre)
        return layers, mean

    def variance_of_map(self, width: int, scale: float) -> float:
        """Variance per coordinate of T where the mean of w is scale * c_out / n_K."""
        depth = len(self.widths)
        *xi, radial = _fluctuations(depth)
        spread = 2 / (9 * width)  # Wilson & Hilferty's normal approximation of chi-squared
        r = np.sqrt(np.maximum(1 - spread + radial * math.sqrt(spread), 1e-3) ** 3)
        fluctuations = np.stack(xi)
        layers, o = self.climb(r, fluctuations)
        slope = (self.climb(r + _STEP, fluctuations)[1] - self.climb(r - _STEP, fluctuations)[1]) / (2 * _STEP)

        mean = scale * self.gains[-1] / self.widths[-1]
        d_out = _Moments(self.activations[-1], scale * o, mean * np.sqrt(self.widths[-1] * layers[-1].variance()))
        p, q = np.full_like(r, mean**2), np.full_like(r, 2 * mean**2)
        random = np.zeros_like(r)
        for k in range(depth - 1, -1, -1):
            same = self.widths[k] * q * layers[k].slope_square
            random += same / width
            if k:
                mu, n = self.gains[k - 1] / self.widths[k - 1], self.widths[k]
                p = mu**2 * (n * (n - 1) * p * layers[k].slope ** 2 + same)
                q = p + mu**2 * same
        return float(np.mean(d_out.slope_square * ((scale * slope) ** 2 / width**2 + random)))


def _log_normal_(weight: Tensor, mean: float) -> Tensor:
    """Fill with a log-normal distribution whose standard deviation is its mean."""
    variance_of_log = math.log(2.0)
    return weight.log_normal_(math.log(mean) - variance_of_log / 2, math.sqrt(variance_of_log))


@functools.lru_cache(maxsize=256)
def _plan(widths: tuple[int, ...], activations: tuple[Activation, ...], width: int) -> tuple[list[float], list[float]]:
    """Means of the entries of [W_2, .., w], and the centres e_1 .. e_K."""
    field = _MeanField(widths, activations)
    scale = 1.0
    for _ in range(4):  # at once where s_out is homogeneous; else D_out depends on the scale
        scale /= math.sqrt(max(field.variance_of_map(width, scale), 1e-30))
    means = [gain / n for gain, n in zip(field.gains, widths, strict=True)]
    means[-1] *= scale
    return means, field.centres


@torch.no_grad()
def initialize_(
    skip_weight: Tensor, bias: Tensor, weights: Sequence[Tensor], activations: Sequence[Activation]
) -> None:
    """Fill skip_weight (S+1, d), bias (S+1,) and the effective weights [W_2, .., w] in place (module docstring)."""
    widths = tuple(w.shape[1] for w in weights)
    width = skip_weight.shape[1]
    means, centres = _plan(widths, tuple(activations), width)
    skip_weight.normal_(0, 1 / math.sqrt(width))
    skip_weight[-1].zero_()
    bias.zero_()
    row = widths[0]
    for weight, mean, centre in zip(weights, means, centres, strict=True):
        _log_normal_(weight, mean)
        rows = weight.shape[0]
        bias[row : row + rows] = -centre * weight.sum(dim=1)
        row += rows
