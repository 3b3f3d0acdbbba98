"""How steps are timed, and what the machine can do at most."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

TURN_SECONDS = 5e-3


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass
class Times:
    """Seconds of a step in each of its turns."""

    turns: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.turns)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a part of the median."""
        low, median, high = statistics.quantiles(self.turns, n=4)
        return (high - low) / 2 / median

    def over(self, other: Times) -> float:
        """How many times as long this step takes as the other: the median over the rounds.

        Both sides of a ratio are milliseconds apart. The speed of a shared machine changes by half within seconds, and
        the medians of two steps may come from a fast and a slow time.
        """
        return statistics.median(a / b for a, b in zip(self.turns, other.turns, strict=True))


def interleaved(steps: dict[str, Callable[[], Any]], seconds: float, device: str = "cpu") -> dict[str, Times]:
    """Times of each step, `seconds` for each.

    Steps take turns. A turn repeats its step for some milliseconds and counts as one time, their mean. As long again
    before that the step runs untimed: it is to find caches and threads as its own predecessor left them, as in
    training, not as another peer did, whose threads go on spinning for a while.
    """
    repeats = {}
    for name, step in steps.items():
        for _ in range(3):
            step()
        synchronise(device)
        start = time.perf_counter()
        step()
        synchronise(device)
        repeats[name] = max(1, round(TURN_SECONDS / (time.perf_counter() - start)))
    times = {name: Times([]) for name in steps}
    end = time.perf_counter() + seconds * len(steps)
    while time.perf_counter() < end or len(next(iter(times.values())).turns) < 10:
        for name, step in steps.items():
            untimed = time.perf_counter() + TURN_SECONDS
            while time.perf_counter() < untimed:
                step()
                synchronise(device)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                step()
            synchronise(device)
            times[name].turns.append((time.perf_counter() - start) / repeats[name])
    return times


def product(dtype: torch.dtype, device: str, n: int = 512) -> Callable[[], Any]:
    """A matrix product of n x n as a step."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return partial(torch.mm, a, b, out=torch.empty_like(a))


def _best(run: Callable[[], Any], device: str, repeats: int = 10) -> float:
    best = float("inf")
    for _ in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return best


def matmul_ceiling(dtype: torch.dtype, device: str) -> float:
    """The best measured rate of a matrix product, in flop/s."""
    best = 0.0
    for n in (512, 1024, 2048) if device == "cpu" else (2048, 4096, 8192):
        best = max(best, 2 * n**3 / _best(product(dtype, device, n), device))
    return best


def copy_ceiling(device: str) -> float:
    """The best measured rate of a copy beyond all caches, in bytes read and written each second."""
    a = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / _best(lambda: b.copy_(a), device, 5)
