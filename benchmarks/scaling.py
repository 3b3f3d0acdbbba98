"""Time against rows, width, depth and d; and a whole training step of an IL-LIDVAE: python -m benchmarks.scaling

Writes benchmarks/results/scaling.json and scaling.png.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from rich.progress import track

import ilvae_fast as il
from benchmarks import peers
from benchmarks.peers import Problem
from benchmarks.record import RESULTS, provenance, write
from benchmarks.timing import interleaved

BASE = Problem(16, (128, 128), 512)
CURVES: dict[str, list[tuple[int, Problem]]] = {
    "rows N": [(n, replace(BASE, batch=n)) for n in (1, 16, 128, 1024, 8192)],
    "hidden width": [(n, replace(BASE, hidden=(n, n))) for n in (16, 32, 64, 128, 256, 512)],
    "depth K": [(k, replace(BASE, hidden=(128,) * k)) for k in (1, 2, 3, 4, 6, 8)],
    "width d": [(d, replace(BASE, width=d)) for d in (2, 8, 32, 128, 512, 1024)],
}
STEPS = {"ours": peers.ours, "closed form": peers.closed_form, "eager double backward": peers.eager}
SECONDS = 0.3


def curves() -> dict[str, dict[str, Any]]:
    result = {}
    for name, points in CURVES.items():
        times = [
            interleaved({n: make(p) for n, make in STEPS.items()}, SECONDS) for _, p in track(points, description=name)
        ]
        result[name] = {
            "at": [x for x, _ in points],
            **{n: [t[n].median * 1e3 for t in times] for n in STEPS},
        }
    return result


def training_step() -> dict[str, float]:
    """Milliseconds of a step (ELBO, backward, Adam) of an IL-LIDVAE on 784-d data, batch 128, on either backend."""
    config = il.vae.VAEConfig(data_dim=784, latent_dim=32)
    x = torch.rand(128, 784)
    steps: dict[str, Any] = {}
    for backend in ("native", "reference"):
        torch.manual_seed(0)
        model = il.vae.VAE(config)
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)

        def step(backend: str = backend, model: Any = model, optimiser: Any = optimiser) -> None:
            with il.use_backend(backend):
                optimiser.zero_grad()
                model(x).loss.backward()
                optimiser.step()

        steps[backend] = step
    return {name: t.median * 1e3 for name, t in interleaved(steps, 4.0).items()}


def draw(result: dict[str, Any]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(1, len(result["curves"]), figsize=(14, 4), layout="constrained", sharey=True)
    for axes, (name, curve) in zip(grid, result["curves"].items(), strict=True):
        for label in STEPS:
            axes.plot(curve["at"], curve[label], marker="o", label=label)
        axes.set(xscale="log", yscale="log", xlabel=name)
        axes.set_xticks(curve["at"], [str(x) for x in curve["at"]])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("milliseconds, map and all gradients")
    grid[0].legend(fontsize=8)
    figure.suptitle(f"else d 16, hidden 128x2, 512 rows, float32; {result['processor']}", fontsize=9)
    figure.savefig(RESULTS / "scaling.png", dpi=110)


def main() -> None:
    result = {**provenance(), "curves": curves(), "training_step_milliseconds": training_step()}
    print("training step, milliseconds:", result["training_step_milliseconds"])
    print("written:", write("scaling", result))
    draw(result)


if __name__ == "__main__":
    main()
