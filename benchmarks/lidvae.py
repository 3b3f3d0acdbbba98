"""The decoder people run today, written from scratch in the layout of the public PyTorch LIDVAE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _PositiveLinear(nn.Module):
    """``h exp(param)^T``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.param = nn.Parameter(torch.randn(outputs, inputs) * 0.1 - torch.tensor(float(inputs)).log())

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.param.exp().T


class ICNN(nn.Module):
    """A scalar input-convex network and its gradient by autograd."""

    def __init__(self, width: int, hidden: Sequence[int]) -> None:
        super().__init__()
        outputs = [*hidden[1:], 1]
        self.A0 = nn.Linear(width, hidden[0])
        self.A = nn.ModuleList([nn.Linear(width, n) for n in outputs])
        self.W = nn.ModuleList([_PositiveLinear(m, n) for m, n in zip(hidden, outputs, strict=True)])

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.A0(x), 0.2) ** 2
        for skip, weight in zip(self.A, self.W, strict=True):
            h = F.leaky_relu(skip(x) + weight(h), 0.2)
        return h

    def gradient(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.requires_grad_()
            return torch.autograd.grad(self(x).sum(), x, create_graph=True)[0]


class LIDVAEDecoder(nn.Module):
    """``T2(B T1(z))`` with ``T(x) = grad G(x) + L x`` and B the padded identity."""

    def __init__(self, latent: int, data: int, hidden: Sequence[Sequence[int]], inverse_lipschitz: float = 0.5) -> None:
        super().__init__()
        self.decoder = nn.ModuleList([ICNN(latent, hidden[0]), ICNN(data, hidden[1])])
        self.data, self.inverse_lipschitz = data, inverse_lipschitz

    def forward(self, z: Tensor) -> Tensor:
        first, second = self.decoder
        assert isinstance(first, ICNN)
        assert isinstance(second, ICNN)
        y = first.gradient(z) + self.inverse_lipschitz * z
        y = F.pad(y, (0, self.data - y.shape[-1]))
        return second.gradient(y) + self.inverse_lipschitz * y
