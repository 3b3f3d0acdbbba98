"""The rows of the suite and what is wanted of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

import ilvae_fast as il
from benchmarks.lidvae import LIDVAEDecoder
from benchmarks.peers import Problem

GEOMETRIC_MEAN = 1.6  # wanted of best peer / ours over all rows of training steps


@dataclass(frozen=True)
class Row:
    """A problem, and the ratios that ``--check`` insists on (CPU, float32)."""

    problem: Callable[..., Problem]
    best_peer: float  # best peer / ours
    expert: float | None = None  # expert's closed form / ours
    stateless: float | None = None  # best peer / ours, stateless


def _row(
    width: int, hidden: tuple[int, ...], batch: int, best_peer: float, latent: int | None = None, **wanted: float
) -> Row:
    return Row(partial(Problem, width, hidden, batch, latent), best_peer, **wanted)


ROWS = [
    _row(2, (32, 32), 128, best_peer=2.2, stateless=4.0),
    _row(2, (64, 64), 512, best_peer=2.5),
    _row(8, (128, 128), 512, best_peer=1.6),
    _row(32, (512, 512), 128, best_peer=1.2),
    _row(64, (256, 256, 256), 512, best_peer=1.15),
    _row(784, (512, 512), 128, best_peer=1.05),
    _row(784, (512, 512), 128, latent=10, best_peer=1.5, expert=1.2),
    _row(3072, (1024, 1024), 256, latent=64, best_peer=1.5, expert=1.2),
]

# Forward alone under no_grad: latency and throughput
FORWARD = [(2, (64, 64)), (64, (256, 256, 256)), (784, (512, 512))]
FORWARD_ROWS = (1, 65536)


@dataclass
class Lidvae:
    """The decoder people run today and the equal one of ours: latent 32, hidden 512 and 512, data 784, 128 rows."""

    wanted: float = 1.8
    steps: dict[str, Callable[[], list[torch.Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        theirs = LIDVAEDecoder(32, 784, ((512, 512), (512, 512)), 0.5)
        mine = il.convert.from_lidvae(theirs.state_dict(), inverse_lipschitz=0.5)
        z, v = torch.randn(128, 32, requires_grad=True), torch.randn(128, 784)

        def step_of(decoder: torch.nn.Module) -> Callable[[], list[torch.Tensor]]:
            variables = [z, *decoder.parameters()]

            def step() -> list[torch.Tensor]:
                t = decoder(z)
                return [t.detach(), *torch.autograd.grad(t, variables, v)]

            return step

        self.steps = {"ours": step_of(mine), "LIDVAE module": step_of(theirs)}

    def check(self) -> None:
        """Refuse to time what is not equal: outputs and gradients of z; parameters are arranged differently."""
        ours, theirs = (step()[:2] for step in self.steps.values())
        for a, b in zip(ours, theirs, strict=True):
            error = float((a - b).abs().max() / b.abs().max())
            if not error < 1e-4:
                raise SystemExit(f"the converted LIDVAE decoder differs by {error:.1e}")

    def __str__(self) -> str:
        return "LIDVAE, 32 -> 784, 512x2 twice, 128"
