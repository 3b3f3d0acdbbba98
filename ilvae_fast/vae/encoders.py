"""Networks: those of the encoders, and the plain one of a decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mlp(in_features: int, hidden_features: Sequence[int], out_features: int) -> nn.Sequential:
    """Linear layers with SiLU between them: smooth, so that Jacobians of a decoder mean something everywhere."""
    layers: list[nn.Module] = []
    for width in hidden_features:
        layers += [nn.Linear(in_features, width), nn.SiLU()]
        in_features = width
    return nn.Sequential(*layers, nn.Linear(in_features, out_features))


class _Residual(nn.Module):
    """``x + conv(act(conv(act(x))))`` at one resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)]
        self.branch = nn.Sequential(nn.SiLU(), convolutions[0], nn.SiLU(), convolutions[1])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class ConvolutionalEncoder(nn.Module):
    """Residual convolutions: each stage halves height and width, then adds one residual block (He et al., CVPR 2016).

    Args:
        data_shape: (height, width) or (channels, height, width) of a datum, which comes flattened.
        channels: of each stage.
        out_features: P.
    """

    def __init__(self, data_shape: Sequence[int], channels: Sequence[int], out_features: int) -> None:
        super().__init__()
        self.data_shape = (1, *data_shape) if len(data_shape) == 2 else tuple(data_shape)
        if len(self.data_shape) != 3:
            raise ValueError(
                f"data_shape: got {tuple(data_shape)}, wanted (height, width) or (channels, height, width)"
            )
        previous, height, width = self.data_shape
        if width in (1, 3, 4) and min(previous, height) > 4:
            raise ValueError(
                f"data_shape: got {tuple(data_shape)}, which looks like (height, width, channels), wanted (channels, "
                "height, width): numpy.moveaxis(images, -1, 1)"
            )
        stages: list[nn.Module] = []
        for count in channels:
            stages += [nn.Conv2d(previous, count, 3, stride=2, padding=1), _Residual(count)]
            previous, height, width = count, math.ceil(height / 2), math.ceil(width / 2)
        self.stages = nn.Sequential(*stages, nn.SiLU(), nn.Flatten())
        self.head = nn.Linear(previous * height * width, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return _unflat(self.head(self.stages(x.reshape(-1, *self.data_shape))), x)


def _unflat(rows: Tensor, x: Tensor) -> Tensor:
    """Rows (N, P) in the leading shape of x, which may be empty."""
    return rows.reshape(*x.shape[:-1], rows.shape[-1])


def run_lstm(
    lstm: nn.LSTM, x: Tensor, state: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """``lstm(x, state)``; on a CPU outside autocast, for there not every processor has one in bfloat16."""
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return lstm(x, state)
    dtype: torch.dtype = next(lstm.parameters()).dtype
    with torch.autocast("cpu", enabled=False):
        return lstm(x.to(dtype), None if state is None else (state[0].to(dtype), state[1].to(dtype)))


class LSTMEncoder(nn.Module):
    """The last hidden state of a one-layer LSTM over tokens (..., T) in 0 .. num_categories - 1; -1: no token.

    Args:
        num_categories: V.
        embedding: width of a token's embedding.
        hidden: width of the LSTM.
        out_features: P.
    """

    def __init__(self, num_categories: int, embedding: int, hidden: int, out_features: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_categories, embedding)
        self.lstm = nn.LSTM(embedding, hidden, batch_first=True)
        self.head = nn.Linear(hidden, out_features)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        states, _ = run_lstm(self.lstm, self.embedding(flat.clamp(min=0)))
        last = (flat >= 0).sum(-1).sub(1).clamp(min=0)
        return _unflat(self.head(states[torch.arange(len(flat), device=x.device), last]), x)
