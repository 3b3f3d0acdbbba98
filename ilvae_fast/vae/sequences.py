"""The autoregressive decoder of sequences of tokens, whose output head is any decoder over [hidden state, z]."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.brenier_map import stacked_tangents
from .encoders import run_lstm


class AutoregressiveDecoder(nn.Module):
    r"""``p(x|z) = prod_t p(x_t | x_<t, z)`` by a one-layer LSTM: logits_t = head([h_t, z]).

    ``c_0 = W z``, ``h_0 = tanh(c_0)``; the LSTM reads [embedding of x_{t-1}, z], and a start token before x_1. After
    He et al. (ICLR 2019), with the head of Wang, Blei & Cunningham (NeurIPS 2021).

    Given x it is a function of z, of T V logits: token after token in one axis. With an L-inverse Lipschitz head
    ``|f(z) - f(z')|^2 = sum_t |head(h_t, z) - head(h'_t, z')|^2 >= T L^2 |z - z'|^2``: the certified constant L of the
    head holds for any number of tokens, and sqrt(T) L for T of them.

    Args:
        head: module (..., hidden + latent_dim) -> (..., num_categories).
        latent_dim: m.
        num_categories: V.
        embedding: width of the tokens' embedding.
        hidden: width of the LSTM.

    Tokens are int64 in 0 .. V - 1; -1 is no token, at the end of a sequence that is shorter than others.
    """

    def __init__(self, head: nn.Module, latent_dim: int, num_categories: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.num_categories = num_categories
        self.embedding = nn.Embedding(num_categories + 1, embedding)  # the last one is the start token
        self.initial = nn.Linear(latent_dim, hidden)
        self.lstm = nn.LSTM(embedding + latent_dim, hidden, batch_first=True)
        self.head = head

    def _inputs(self, x: Tensor) -> Tensor:
        """Embeddings (..., T, e) of what the LSTM reads: the start token, then all tokens but the last."""
        start = torch.full_like(x[..., :1], self.num_categories)
        return self.embedding(torch.cat([start, x[..., :-1].clamp(min=0)], -1))

    def _initial_state(self, z: Tensor) -> tuple[Tensor, Tensor]:
        c = self.initial(z)
        return c.tanh(), c

    def _states(self, z: Tensor, inputs: Tensor) -> Tensor:
        """[h_t, z] (*S, ..., T, hidden + m), T after the leading axes of z (*S, ..., m)."""
        length = inputs.shape[-2]
        shape = torch.broadcast_shapes(z.shape[:-1], inputs.shape[:-2])
        z = z.expand(*shape, z.shape[-1]).unsqueeze(-2).expand(*shape, length, z.shape[-1])
        read = torch.cat([inputs.expand(*shape, *inputs.shape[-2:]), z], -1)
        read = read.reshape(-1, length, read.shape[-1])
        h, c = self._initial_state(z[..., 0, :].reshape(-1, z.shape[-1]))
        states, _ = run_lstm(self.lstm, read, (h.unsqueeze(0), c.unsqueeze(0)))
        return torch.cat([states.reshape(*shape, length, states.shape[-1]), z], -1)

    def _plain_states(self, z: Tensor, inputs: Tensor) -> Tensor:
        """The same by plain operations, which have a forward mode; torch's LSTM has none."""
        lstm: Any = self.lstm
        shape = torch.broadcast_shapes(z.shape[:-1], inputs.shape[:-2])
        z, inputs = z.expand(*shape, z.shape[-1]), inputs.expand(*shape, *inputs.shape[-2:])
        h, c = self._initial_state(z)
        states = []
        for read in inputs.unbind(-2):
            from_input = F.linear(torch.cat([read, z], -1), lstm.weight_ih_l0, lstm.bias_ih_l0)
            i, f, g, o = (from_input + F.linear(h, lstm.weight_hh_l0, lstm.bias_hh_l0)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            states.append(torch.cat([h, z], -1))
        return torch.stack(states, -2)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Logits (*S, ..., T V) of each token of x (..., T) given those before it and z (*S, ..., m)."""
        return self.head(self._states(z, self._inputs(x))).flatten(-2)

    def jvp(self, z: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logits and their derivative along v, in the shape of z; both (*S, ..., T V)."""
        jvp: Any = torch.func.jvp
        inputs, head = self._inputs(x), cast(Any, self.head)
        z, v = z.contiguous(), v.contiguous()  # torch's forward mode refuses expanded tensors
        states, tangents = jvp(lambda latent: self._plain_states(latent, inputs), (z,), (v,))
        if hasattr(head, "jvp"):
            f, f_tangent = head.jvp(states, tangents)
        else:
            f, f_tangent = jvp(head, (states,), (tangents,))
        return f.flatten(-2), f_tangent.flatten(-2)

    def given(self, x: Tensor) -> GivenSequences:
        """The decoder as a function of z alone, as the metrics want it."""
        return GivenSequences(self, x)

    @torch.no_grad()
    def generate(self, z: Tensor, length: int, generator: torch.Generator | None = None, noise: bool = False) -> Tensor:
        """Sequences (..., length) token by token: at each step the likeliest one, or with ``noise`` a random one."""
        flat = z.reshape(-1, z.shape[-1])
        h, c = self._initial_state(flat)
        state = (h.unsqueeze(0), c.unsqueeze(0))
        token = torch.full((len(flat),), self.num_categories, device=z.device)
        tokens = []
        for _ in range(length):
            read = torch.cat([self.embedding(token), flat], -1).unsqueeze(1)
            output, state = run_lstm(self.lstm, read, state)
            logits = self.head(torch.cat([output.squeeze(1), flat], -1))
            if noise:
                token = torch.multinomial(logits.float().softmax(-1), 1, generator=generator).squeeze(-1)
            else:
                token = logits.argmax(-1)
            tokens.append(token)
        return torch.stack(tokens, -1).reshape(*z.shape[:-1], length)


class GivenSequences:
    """An :class:`AutoregressiveDecoder` given x (..., T): z (*S, ..., m) -> (*S, ..., T V)."""

    def __init__(self, decoder: AutoregressiveDecoder, x: Tensor) -> None:
        self.decoder, self.x = decoder, x
        if hasattr(decoder.head, "inverse_lipschitz_bound"):
            self.inverse_lipschitz_bound = decoder.head.inverse_lipschitz_bound

    def __call__(self, z: Tensor) -> Tensor:
        return self.decoder(z, self.x)

    def jacobian(self, z: Tensor) -> Tensor:
        """The Jacobians of all tokens, stacked: (*S, ..., T V, m); rows of absent tokens are 0."""
        rows = stacked_tangents(lambda point, tangent: self.decoder.jvp(point, tangent, self.x.unsqueeze(-2)), z)
        present = (self.x >= 0).repeat_interleave(self.decoder.num_categories, -1)
        return rows * present.unsqueeze(-1)
