"""Encoders: from a datum to its approximate posterior."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .distributions import DiagonalGaussian


def mlp(in_features: int, hidden_features: Sequence[int], out_features: int) -> nn.Sequential:
    """Linear layers with SiLU between them: smooth, so that Jacobians of a decoder mean something everywhere."""
    layers: list[nn.Module] = []
    for width in hidden_features:
        layers += [nn.Linear(in_features, width), nn.SiLU()]
        in_features = width
    return nn.Sequential(*layers, nn.Linear(in_features, out_features))


class MLPEncoder(nn.Module):
    """``q(z|x)``, a diagonal Gaussian whose mean and log-variance come from one MLP: (..., D) -> (..., m) each."""

    def __init__(self, data_dim: int, hidden_features: Sequence[int], latent_dim: int) -> None:
        super().__init__()
        self.network = mlp(data_dim, hidden_features, 2 * latent_dim)

    def forward(self, x: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(*self.network(x).chunk(2, -1))
