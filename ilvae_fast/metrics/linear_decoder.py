"""The best linear decoder of the data, against which advice about L is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LinearDecoder:
    """The best linear decoder of the data, ``f(z) = f0 + W z``, and its kin with a floor under the singular values.

    ``W = Q diag(s) R^T`` in units of f, Q (P, m) orthonormal. singular_values (m,): s, descending, 0 for latents that
    the data do not pay for. information (m, m): ``Q^T F Q``, F the diagonal Fisher information, the noise taken into
    account. scatter (m, m): the covariance of the scores in the same directions, ``Q^T Cov(score) Q``. All float64.
    """

    singular_values: Tensor
    information: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, variances: Tensor, gram: Tensor, payable: int) -> LinearDecoder:
        """From whitened principal variances (m,), of which the first ``payable`` carry a latent.

        gram (m, m): ``U^T F^-1 U`` of the principal directions U (P, m).
        """
        scales = (variances - 1).clamp(min=0).sqrt()
        scales[payable:] = 0
        # F^-1/2 U = Q0 C with C^T C = gram, so W = Q0 (C diag(scales)), and F^1/2 Q = U C^-1 (left singular vectors)
        upper = torch.linalg.cholesky(gram).mT
        left, singular_values, _ = torch.linalg.svd(upper * scales)
        turn = torch.linalg.solve_triangular(upper, left, upper=True)
        return cls(singular_values, turn.mT @ turn, turn.mT @ (variances.unsqueeze(-1) * turn))

    def loss(self, L: float) -> float:
        """Nats by which the negative log-likelihood of singular values ``max(s, L)`` exceeds that of W = 0."""
        s = self.singular_values.clamp(min=L)
        precision = torch.eye(len(s), dtype=s.dtype) + s.unsqueeze(-1) * self.information * s
        explained = torch.linalg.solve(precision, s.unsqueeze(-1) * self.scatter * s).trace()
        return 0.5 * (precision.logdet() - explained).item()

    def forced(self, L: float) -> float:
        """``1/2 log det(I + L^2 Q^T F Q)``: the information in nats that x has about z if all singular values are L."""
        return _forced(_spectrum(self.information), 2 * math.log(L)) if L > 0 else 0.0


def _spectrum(information: Tensor) -> list[float]:
    return torch.linalg.eigvalsh(information).clamp(min=torch.finfo(torch.float64).tiny).log().tolist()


def _forced(spectrum: Sequence[float], log_square: float) -> float:
    """``1/2 sum log(1 + L^2 g)``, of log g and log L^2."""
    return 0.5 * sum(max(t, 0.0) + math.log1p(math.exp(-abs(t))) for t in (g + log_square for g in spectrum))


def constant_that_forces(decoder: LinearDecoder, nats: float) -> float:
    """Return the L that forces so many nats."""
    if nats <= 0:
        return 0.0
    spectrum = _spectrum(decoder.information)
    # log(1 + v) <= v, and >= log v
    low, high = math.log(2 * nats / len(spectrum)) - max(spectrum), 2 * nats - max(spectrum)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if _forced(spectrum, middle) > nats else (middle, high)
    return math.exp(min(low / 2, 700.0))
