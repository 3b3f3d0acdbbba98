"""How steps are timed, and what the machine can do at most."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

TURN_SECONDS = 5e-3


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved_medians(
    steps: dict[str, Callable[[], Any]], seconds: float, device: str = "cpu"
) -> dict[str, tuple[float, float]]:
    """Median seconds of each step and the spread (half the distance of the quartiles).

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
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds * len(steps)
    while time.perf_counter() < end or len(times[next(iter(times))]) < 10:
        for name, step in steps.items():
            untimed = time.perf_counter() + TURN_SECONDS
            while time.perf_counter() < untimed:
                step()
                synchronise(device)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                step()
            synchronise(device)
            times[name].append((time.perf_counter() - start) / repeats[name])
    quartiles = {name: statistics.quantiles(t, n=4) for name, t in times.items()}
    return {name: (q[1], (q[2] - q[0]) / 2) for name, q in quartiles.items()}


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
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        best = max(best, 2 * n**3 / _best(partial(torch.mm, a, b, out=out), device))
    return best


def copy_ceiling(device: str) -> float:
    """The best measured rate of a copy beyond all caches, in bytes read and written each second."""
    a = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / _best(lambda: b.copy_(a), device, 5)
