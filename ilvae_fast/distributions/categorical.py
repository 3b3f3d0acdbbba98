"""The likelihood of tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .._support.checks import check_positive
from .._support.devices import with_float64
from .base import Likelihood, checked_rows, marginal_dtype


class Categorical(Likelihood):
    """Independent coordinates in 0 .. V - 1 with logits f, V for each: f (..., D V), one coordinate after the other.

    A coordinate of -1 is absent: it has no probability and no score.

    Args:
        num_categories: V.
    """

    data = "int64 tokens, -1 for none"

    def __init__(self, num_categories: int) -> None:
        super().__init__()
        self.parameters_per_value = check_positive("num_categories", num_categories)
        self.support = (-1, num_categories - 1)

    def _logits(self, f: Tensor) -> Tensor:
        return f.unflatten(-1, (-1, self.parameters_per_value))

    def log_prob(self, x: Tensor, f: Tensor) -> Tensor:
        logits = self._logits(f)
        shape = torch.broadcast_shapes(x.shape, logits.shape[:-1])
        index = x.clamp(min=0).expand(shape).unsqueeze(-1)
        each = logits.expand(*shape, -1).gather(-1, index).squeeze(-1) - logits.logsumexp(-1)
        return torch.where(x >= 0, each, 0.0).sum(-1)

    def mean(self, f: Tensor) -> Tensor:
        return self._logits(f).argmax(-1)

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        probabilities = self._logits(f).softmax(-1)
        drawn = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
        return drawn.reshape(probabilities.shape[:-1])

    def score(self, x: Tensor, f: Tensor) -> Tensor:
        probabilities = self._logits(f).softmax(-1)
        one_hot = F.one_hot(x.clamp(min=0), self.parameters_per_value).to(f.dtype)
        return ((one_hot - probabilities) * (x >= 0).unsqueeze(-1)).flatten(-2)

    def marginal(self, x: Tensor) -> Tensor:
        """Log frequencies at each position; absent tokens are not counted."""
        positions, categories = checked_rows(x).shape[-1], self.parameters_per_value
        index = x.long() + categories * torch.arange(positions, device=x.device)
        counts = with_float64(index[x >= 0].bincount(minlength=positions * categories)).double()
        smoothed = counts.unflatten(0, (positions, categories)) + 1 / categories
        return (smoothed / smoothed.sum(-1, keepdim=True)).log().flatten().to(x.device, marginal_dtype(x))

    def fisher(self, f: Tensor) -> Tensor:
        probabilities = self._logits(f).softmax(-1)
        likeliest = probabilities.argmax(-1, keepdim=True)
        # 1 - p would cancel where p is near 1, which one category alone can be
        others = probabilities.scatter(-1, likeliest, 0.0).sum(-1, keepdim=True)
        return (probabilities * (1 - probabilities).scatter(-1, likeliest, others)).flatten(-2)

    def extra_repr(self) -> str:
        return f"num_categories={self.parameters_per_value}"
