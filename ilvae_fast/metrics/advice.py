"""Which inverse-Lipschitz constant suits the data: what latents can gain there, and what a constant makes them pay.

The derivation, how to read the picture, and an experiment: ``docs/choosing-L.md``.
"""

from __future__ import annotations

import copy
import io
import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._support.checks import check_number, check_positive
from .._support.extras import require
from .._support.files import write_atomically
from ..distributions import Categorical, Gaussian, Likelihood, as_likelihood
from .linear_decoder import LinearDecoder, constant_that_forces

_ROWS, _WIDTH, _VALUES = 10000, 1024, 2**24  # data looked at; fewer of them if they are wide; values of them in all
# Where the information depends on f, f has a scale of its own (logits, log rates: a step of 1 changes odds or rates by
# e), and the quadratic approximation holds for a few such steps. Less information than this in a coordinate would let
# one unit of z move f by more than 4.
_LEAST_INFORMATION = 1 / 16
_NOTICEABLE = 0.1  # nats forced in all latents, below which a guarantee says nothing that one can measure
# nats forced, as a part of the gain, and L, as a part of the data's spread: round numbers, see benchmarks/advice.py
_RECOMMENDED, _HARMFUL = (1 / 40, 1 / 4), (1 / 10, 1 / 2)


@dataclass(frozen=True)
class Advice:
    """What :func:`advise` found; ``str(advice)`` says it in words, :meth:`plot` draws it.

    Constants are certified products ``L1 L2 sigma_min(B)`` of a decoder, in units of its output f for a unit of z:
    units of the data for a Gaussian, logits for Bernoulli and categorical, log rates for counts.

    L: recommended. low: below it the guarantee is too weak to notice (0.1 nats in all latents). high: above it the fit
    is likely to suffer, for L forces the latents to carry a tenth of the gain, or the outputs to spread half as far as
    those of the best linear decoder. ``low > high``: the data pay too little for so many latents, and no L is both
    felt and harmless. idle: the largest constant that the best linear decoder keeps anyway; 0 if it has fewer
    latents than ``latent_dim``.

    payable: latents that pay, the leading principal deviations above the noise. deviations: of the data along its
    principal directions, in units of the data for a Gaussian, else of the noise. noise: in the same units; sigma, or 1.

    gain: nats by which the best linear decoder with ``latent_dim`` latents beats one that ignores z. used, available:
    how many data were looked at, and how many there were.
    """

    L: float
    low: float
    high: float
    idle: float
    latent_dim: int
    likelihood: str
    payable: int
    deviations: tuple[float, ...]
    noise: float
    gain: float
    used: int
    available: int
    decoder: LinearDecoder = field(repr=False, compare=False)

    def cost(self, L: float) -> float:
        """Nats of likelihood for a datum that the best linear decoder loses if no singular value may be below L.

        Exact where all coordinates have the same information, as for a Gaussian; else of a decoder that keeps its
        directions. At most :meth:`forced`.
        """
        return self.decoder.loss(_number(L)) - self.decoder.loss(0.0)

    def forced(self, L: float) -> float:
        """Nats that a linear decoder forces z to carry about x, in all latents; for a Gaussian ``m/2 log(1 + L^2 /
        sigma^2)``.

        What they cost a decoder, linear or not, that has no use for them at all.
        """
        return self.decoder.forced(_number(L))

    def __str__(self) -> str:
        """One paragraph."""
        m, k = self.latent_dim, self.payable
        unit, noise = ("", f"sigma = {self.noise:.3g}") if self.likelihood == "Gaussian" else (" times it", "the noise")
        first, rest = self.deviations[: min(k, 3)], self.deviations[k : k + 1]
        listed = ", ".join(f"{d:.3g}" for d in first) + (f", .. {self.deviations[k - 1]:.3g}" if k > 3 else "")
        after = f"; the next is {rest[0]:.3g}" if rest else ""
        data = f"{self.used} of {self.available}" if self.used < self.available else f"{self.used}"
        if k == 0:
            text = [
                f"No principal deviation of the data exceeds {noise} (the largest is {self.deviations[0]:.3g}{unit}): "
                f"even the best linear model uses no latent, and whatever L forces z to carry is likely to cost.",
                "Lower the noise if the data allow it (likelihood_options.scale for a Gaussian), or take another "
                "likelihood."
                if self.likelihood == "Gaussian"
                else "Look at the data: coordinates hardly vary together beyond chance.",
                f"For {_latents(m)}, L = {self.L:.3g} forces {self.forced(self.L):.2g} nats in all, the least that one "
                "would notice.",
            ]
        else:
            deviations = "principal deviation" + (" exceeds" if k == 1 else "s exceed")
            text = [
                f"{k} {deviations} {noise} ({listed}{unit}{after}): the data can pay for {_latents(k)}.",
                f"With {_latents(m)} the best linear decoder gains {self.gain:.3g} nats for each datum over one that "
                "ignores z.",
                f"Recommended: L = {self.L:.3g}. It forces z to carry {self.forced(self.L):.2g} nats, and costs the "
                f"best linear decoder {max(0.0, self.cost(self.L)):.2g} nats.",
            ]
            if self.low <= self.high:
                text.append(
                    f"Below L = {self.low:.3g} the guarantee is too weak to notice; above {self.high:.3g} the fit is "
                    "likely to suffer."
                )
            else:
                text.append(
                    f"A guarantee that one would notice, L = {self.low:.3g}, is already likely to spoil the fit: the "
                    "gain is too small for it."
                )
            if m > k:
                cure = " or a smaller sigma" if self.likelihood == "Gaussian" else ""
                text.append(f"{m - k} of the {m} latents can only cost: use at most {k}{cure}.")
        text.append(
            f"L is the decoder's certified product L1 L2 sigma_min(B), as --L; VAEConfig.inverse_lipschitz is that of "
            f"each map, {math.sqrt(self.L):.3g}. (From {data} data.)"
        )
        return " ".join(text)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a picture: the principal deviations against the noise, and what L forces and costs.

        Raises:
            ImportError: matplotlib is not installed; says how to install it.
        """
        require("matplotlib", "train").use("Agg")
        plt = require("matplotlib.pyplot", "train")
        suffix = os.path.splitext(os.fspath(path))[1].lstrip(".").lower() or "png"
        with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
            figure, (left, right) = plt.subplots(1, 2, figsize=(10.2, 3.4), layout="constrained")
            self._draw_deviations(left)
            self._draw_constants(right)
            content = io.BytesIO()
            figure.savefig(content, format=suffix, dpi=150)
            plt.close(figure)
        write_atomically(path, content.getvalue())

    def _draw_deviations(self, axis: Any) -> None:
        shown = self.deviations[: max(2 * self.latent_dim, min(2 * self.payable, self.latent_dim + 60), 10)]
        gaussian = self.likelihood == "Gaussian"
        for label, colour, part in (
            ("pays for a latent", _BLUE, range(min(self.payable, len(shown)))),
            ("below the noise", _GREY, range(self.payable, len(shown))),
        ):
            if part:
                axis.bar([i + 1 for i in part], [shown[i] for i in part], 0.8, color=colour, label=label)
        axis.axhline(self.noise, color=_RED, linewidth=1.2)
        axis.annotate(
            f"noise, $\\sigma$ = {self.noise:.3g}" if gaussian else "noise", (1, self.noise), (-2, 3),
            xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", color=_RED,
        )  # fmt: skip
        axis.axvline(self.latent_dim + 0.5, color=_INK, linestyle=":", linewidth=1.2, label="latents asked for")
        axis.set_ylim(0, 1.35 * max(self.noise, *shown))
        axis.set(xlabel="principal direction", ylabel="deviation" + (" of the data" if gaussian else " / noise"))
        axis.set_title("What the data can pay for", fontsize=10)
        axis.legend(frameon=False, loc="upper right")

    def _draw_constants(self, axis: Any) -> None:
        marks = [value for value in (self.L, self.low, self.high) if value > 0]
        least, most = min(marks) / 8, max(marks) * 8
        grid = [least * (most / least) ** (i / 200) for i in range(201)]
        for label, colour, nats in (
            ("forced into z, which L may cost", _BLUE, self.forced),
            ("cost to the best linear decoder", _AMBER, self.cost),
        ):
            axis.plot(grid, [nats(L) for L in grid], color=colour, label=label)
        if self.gain > 0:
            axis.axhline(self.gain, color=_GREY, linewidth=1.5, label="gain of the best linear decoder")
        if self.low < self.high:
            axis.axvspan(self.low, self.high, color=_GREEN, alpha=0.15, linewidth=0, label="range advised")
        else:
            axis.axvline(self.low, color=_GREEN, linestyle=":", linewidth=1.5, label="least L that one would notice")
        axis.axvline(self.L, color=_GREEN, linewidth=1.5, label=f"recommended: L = {self.L:.3g}")
        limits = (_NOTICEABLE / 20, 3 * max(self.gain, self.forced(most) / 3))
        axis.set(xscale="log", yscale="log", xlim=(least, most), ylim=limits, xlabel="certified constant L")
        axis.set_ylabel("nats for each datum")
        axis.set_title(f"What L costs with {_latents(self.latent_dim)}", fontsize=10)
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


_INK, _BLUE, _RED, _AMBER, _GREEN, _GREY = "#333333", "#4a7fb5", "#c1432e", "#d97706", "#2f8f5b", "#b8bcc4"


@torch.no_grad()
def advise(x: Tensor, latent_dim: int, likelihood: str | Likelihood) -> Advice:
    r"""Which L suits the data x, for ``latent_dim`` latents and this likelihood.

    L is always the certified product ``L1 L2 sigma_min(B)`` of the decoder, as ``--L`` of the command line;
    ``VAEConfig.inverse_lipschitz`` is per map, ``sqrt(L)`` in each.

    The data are whitened on the scale of the decoder's output: ``y = score(x, f0) / sqrt(F)``, f0 the best constant
    output, F its diagonal Fisher information, has unit noise (for a Gaussian ``(x - mean) / sigma``). A latent pays
    where a principal variance ``lambda_i`` of y exceeds 1: the best linear decoder is ``W = F^(-1/2) U
    diag(sqrt(lambda_i - 1))`` (Tipping & Bishop, J. R. Stat. Soc. B 61, 1999; Lucas et al., NeurIPS 2019), and gains
    ``sum_i (lambda_i - 1 - log lambda_i) / 2`` nats. Directions U are those of every second datum, variances those of
    the others, so that chance does not pay for a latent.

    A floor L makes a linear decoder carry ``1/2 log det(I + L^2 Q^T F Q)`` nats in z, Q the directions of W: the most
    that it can cost such a decoder, and about what it costs a nonlinear one. That decides: 0.1 nats are ``low``, a
    tenth of the gain is ``high``, and recommended is a fortieth, or ``low`` if that is more and ``high`` allows it.
    With no gain at all ``low`` is recommended. Where the noise is so small that this says little, the spread decides:
    the outputs of any decoder with this constant have a total variance of at least ``m L^2``, those of W have
    ``|W|^2``; ``high`` is at most half of ``|W| / sqrt(m)``, L a quarter.

    Where the likelihood saturates (a pixel that is never on), F is nearly 0 and f could move at no cost: the bound
    would guarantee a distance and no information. Hence F is taken as at least 1/16 where it depends on f, so that one
    unit of noise is at most 4 logits or 4 steps of a log rate, about as far as the quadratic approximation goes.

    Args:
        x: training data (N, D) in units of the decoder's data, or tokens of a categorical likelihood, -1 for none.
            Of many data some are looked at, evenly spread: at most 10000, fewer if they are wide.
        latent_dim: m; at most the decoder's outputs, and at most N / 2.
        likelihood: a name in ``ilvae_fast.vae.LIKELIHOODS``, with its default options, or an object with its own. A
            Gaussian whose variance moves (``"trained"``, ``"optimal"``) is taken at the variance that m latents leave
            (Tipping & Bishop, equation 8). Categorical: L is that of one token, as the head of an autoregressive
            decoder certifies it; all tokens of a datum share z, and their order is left out of account.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    likelihood = copy.deepcopy(as_likelihood(likelihood)).cpu()
    check_positive("latent_dim", latent_dim)
    _check(x, latent_dim, likelihood)
    available, width = len(x), x.shape[1] * likelihood.parameters_per_value
    if isinstance(likelihood, Categorical):
        width = likelihood.parameters_per_value
    most = min(_ROWS, _VALUES // width, 2 * _WIDTH if width > _WIDTH else _ROWS)
    x = x[:: -(-available // max(most, 2 * latent_dim + 2))].detach().cpu()
    y, information = _whitened(x, likelihood)
    variances, directions = _principal(y)
    if isinstance(likelihood, Gaussian) and likelihood.variance != "fixed" and latent_dim < width:
        rest = y[1::2].var(0, correction=0).sum() - variances[:latent_dim].sum()
        left = max(rest.item() / (width - latent_dim), Gaussian._LEAST**2)
        variances, information = variances / left, information / left
    payable = int((variances > 1).cumprod(0).sum())
    leading = directions[:, :latent_dim]
    decoder = LinearDecoder.of(
        variances[:latent_dim], leading.mT @ (leading / information.unsqueeze(-1)), min(payable, latent_dim)
    )
    gain = max(0.0, -decoder.loss(0.0))
    noise = information[0].rsqrt().item() if isinstance(likelihood, Gaussian) else 1.0
    spread = decoder.singular_values.square().mean().sqrt().item()
    low = constant_that_forces(decoder, _NOTICEABLE)
    wanted, high = (min(constant_that_forces(decoder, a * gain), b * spread) for a, b in (_RECOMMENDED, _HARMFUL))
    return Advice(
        L=min(high, max(low, wanted)) if gain > 0 else low, low=low, high=high, idle=decoder.singular_values[-1].item(),
        latent_dim=latent_dim, likelihood=type(likelihood).__name__, payable=payable,
        deviations=tuple((noise * variances.clamp(min=0).sqrt()).tolist()), noise=noise, gain=gain, used=len(x),
        available=available, decoder=decoder,
    )  # fmt: skip


def _check(x: Any, latent_dim: int, likelihood: Likelihood) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, wanted a tensor (N, D); torch.as_tensor makes one")
    if x.dim() != 2 or x.is_complex():
        raise ValueError(f"x: got {x.dtype} of shape {tuple(x.shape)}, wanted real numbers (N, D); x.flatten(1) may do")
    width = likelihood.parameters_per_value if isinstance(likelihood, Categorical) else x.shape[1]
    if latent_dim > width:
        raise ValueError(f"latent_dim: got {latent_dim}, wanted at most the decoder's {width} outputs: it is injective")
    if len(x) < 2 * latent_dim + 2:
        raise ValueError(
            f"x: got {len(x)} data, wanted at least {2 * latent_dim + 2} for {_latents(latent_dim)}: give more data, "
            "or a smaller latent_dim"
        )
    if not bool(x.isfinite().all()):
        raise ValueError(f"x: got {int((~x.isfinite()).sum())} values that are infinite or NaN, wanted finite numbers")
    likelihood.check(x)


def _whitened(x: Tensor, likelihood: Likelihood) -> tuple[Tensor, Tensor]:
    """y (N, P) with unit noise, and the information (P,) that it was divided by, both float64."""
    if isinstance(likelihood, Categorical):
        present = x >= 0
        probabilities = likelihood.marginal(x[present].unsqueeze(-1)).double().softmax(0)
        counts = torch.zeros(len(x), len(probabilities), dtype=torch.float64)
        counts.scatter_add_(1, x.clamp(min=0).long(), present.double())
        lengths = present.sum(1, keepdim=True).double()
        # the multinomial's noise has the covariance diag(p) - p p^T, which is the unit matrix over sqrt(p), but for
        # the direction that no logits move
        scores, information = counts - lengths * probabilities, lengths.mean() * probabilities
        depends = True
    else:
        x = x.double()
        # what training fits, the noise that z leaves, is known for a Gaussian alone
        fitted, f = (likelihood, likelihood.marginal(x)) if isinstance(likelihood, Gaussian) else likelihood.ignoring(x)
        scores, information = fitted.score(x, f).double(), fitted.fisher(f).double()
        depends = not torch.equal(fitted.fisher(f + 1).double(), information)
    if depends:
        information = information.clamp(min=_LEAST_INFORMATION)
    return scores / information.sqrt(), information


def _principal(y: Tensor) -> tuple[Tensor, Tensor]:
    """Principal directions (P, r) of every second row, and the variances (r,) of the other rows along them."""
    some, others = (half - half.mean(0) for half in (y[::2], y[1::2]))
    if len(some) > y.shape[1]:
        directions = torch.linalg.eigh(some.mT @ some)[1].flip(-1)
    else:
        directions = torch.linalg.svd(some, full_matrices=False)[2].mT
    return (others @ directions).square().mean(0), directions


def _number(L: float) -> float:
    check_number("L", L)
    return float(L)


def _latents(count: int) -> str:
    return f"{count} latent" + ("" if count == 1 else "s")
