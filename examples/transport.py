"""Optimal transport by two convex potentials, with a picture, or scored where the map is known.

    python examples/transport.py [--steps 3000] [--seed 0] [--picture docs/images/transport.png]
    python examples/transport.py --pair pair_2.npz [--pair pair_16.npz] [--record benchmarks/results/transport.json]

Without --pair: a Gaussian to eight Gaussians. A pair is one of the continuous Wasserstein-2 benchmark (Korotin et al.,
NeurIPS 2021), as arrays: a mixture P (``centers``, ``factors``, ``std``), the true map ``T* = grad psi`` (``scale``,
``shift``, ``potential1.*``, ``potential2.*``), variances, and a test part (``x``, ``y = T*(x)``). The solver is given
independent samples of P and of its image under T*, never a pair. Its score is
``L2-UVP = 100 E|T(x) - T*(x)|^2 / Var T*(P)`` in percent, and the same of the inverse.

The solver (Korotin et al., ICLR 2021, W2GN): phi minimises the dual ``E phi(x) + E [<S(y), y> - phi(S(y))]`` of the
squared Wasserstein-2 distance; the cycle terms ``E|S(T(x)) - x|^2 + E|T(S(y)) - y|^2`` make the second map S = T^-1.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ilvae_fast as il
from ilvae_fast._support.extras import require
from ilvae_fast._support.files import write_atomically

Sampler = Callable[[int], Tensor]
POOL = 1 << 17  # samples of each side that batches are drawn from


def eight_gaussians(n: int) -> Tensor:
    """(n, 2): eight Gaussians of deviation 0.2 on a circle of radius 2."""
    angle = torch.randint(8, (n,)) * (math.pi / 4)
    return 2 * torch.stack([angle.cos(), angle.sin()], dim=1) + 0.2 * torch.randn(n, 2)


class Pair:
    """A benchmark pair: samplers of both sides, the true map and the test part."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as arrays:
            self.arrays = {name: torch.from_numpy(arrays[name].astype(np.float32)) for name in arrays.files}
        self.dim = self.arrays["centers"].shape[1]

    def source(self, n: int) -> Tensor:
        """P: (n, D)."""
        component = torch.randint(len(self.arrays["centers"]), (n,))
        noise = torch.einsum("nij,nj->ni", self.arrays["factors"][component], torch.randn(n, self.dim))
        return self.arrays["centers"][component] + self.arrays["std"] * noise

    def target(self, n: int) -> Tensor:
        """T*(P): (n, D), of samples of their own."""
        return torch.cat([self.true_map(self.source(min(8192, n - i))) for i in range(0, n, 8192)])

    def true_map(self, x: Tensor) -> Tensor:
        """T* = grad psi: (n, D) -> (n, D)."""
        x = x.detach().requires_grad_()
        psi = self.arrays["scale"] * (
            self._part("potential1", x) + self._part("potential2", x) + x @ self.arrays["shift"]
        )
        return torch.autograd.grad(psi.sum(), x)[0]

    def _part(self, name: str, x: Tensor) -> Tensor:
        def of(layer: str) -> Tensor:
            return self.arrays[f"{name}.{layer}"]

        h = torch.zeros(len(x), 0)
        for k in range(3):
            quadratic = (x @ of(f"quadratic_layers.{k}.quadratic_decomposed")[:, 0]).square()
            a = quadratic + x @ of(f"quadratic_layers.{k}.weight").T + of(f"quadratic_layers.{k}.bias")
            h = torch.nn.functional.celu(a + h @ of(f"convex_layers.{k - 1}.weight").T) if k else a
        return (h @ of("final_layer.weight").T).squeeze(1) + 0.005 * x.square().sum(1)


def solve(
    source: Sampler,
    target: Sampler,
    width: int,
    *,
    hidden: tuple[int, ...],
    inverse_lipschitz: float,
    learning_rate: float,
    cycle: float,
    batch: int,
    steps: int,
    look: Callable[[int, il.BrenierMap, il.BrenierMap], None] = lambda step, transport, back: None,
) -> tuple[il.BrenierMap, il.BrenierMap]:
    """The map from ``source`` to ``target`` and its inverse; ``look(step, both)`` is called ten times."""
    transport, back = (
        il.BrenierMap(
            width,
            hidden,
            activation=il.Activation("softplus", 5.0),
            first_activation="squared_leaky_relu",
            inverse_lipschitz=inverse_lipschitz,
            initialization="identity",
        )
        for _ in range(2)
    )
    optimiser = torch.optim.Adam([*transport.parameters(), *back.parameters()], lr=learning_rate, betas=(0.8, 0.99))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    xs, ys = source(POOL), target(POOL)
    for step in range(1, steps + 1):
        x, y = xs[torch.randint(POOL, (batch,))], ys[torch.randint(POOL, (batch,))]
        phi, there = transport.potential_and_map(x)
        preimage = back(y)
        dual = phi.mean() - transport.potential(preimage.detach()).mean()
        around = (back(there) - x).square().sum(-1).mean() + (transport(preimage) - y).square().sum(-1).mean()
        optimiser.zero_grad()
        (dual + cycle * around).backward()
        optimiser.step()
        decay.step()
        if step % max(steps // 10, 1) == 0:
            look(step, transport, back)
    return transport, back


@torch.no_grad()
def unexplained(pair: Pair, transport: il.BrenierMap, back: il.BrenierMap) -> dict[str, float]:
    """L2-UVP of the map and of its inverse on the test part, in percent."""
    x, y = pair.arrays["x"], pair.arrays["y"]
    forward = (transport(x) - y).square().sum(1).mean() / pair.arrays["output_variance"]
    inverse = (back(y) - x).square().sum(1).mean() / pair.arrays["input_variance"]
    return {"forward": 100 * float(forward), "inverse": 100 * float(inverse)}


@torch.no_grad()
def draw(transport: il.BrenierMap, source: Sampler, target: Sampler, shown: int = 1200, lines: int = 300) -> bytes:
    """A PNG: the source with the level sets of the potential, the way of its points, and where they come to lie."""
    require("matplotlib", "train").use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.collections import LineCollection
    from matplotlib.colors import hsv_to_rgb
    from PIL import Image

    x, y = source(shown), target(shown)
    moved = transport(x)
    hue = torch.atan2(moved[:, 1], moved[:, 0]) / (2 * math.pi) % 1
    colours = hsv_to_rgb(torch.stack([hue, 0 * hue + 0.75, 0 * hue + 0.8], dim=1).numpy())
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.5), sharex=True, sharey=True, layout="constrained")
    grid = torch.linspace(-3.2, 3.2, 241)
    points = torch.cartesian_prod(grid, grid)
    phi = transport.potential(points).reshape(len(grid), -1).T
    phi = (phi - phi.min()).sqrt()  # rings of a parabola at equal distances
    look: dict[str, Any] = {"s": 5, "linewidths": 0}
    axes[0].contour(grid, grid, phi, levels=14, colors="0.72", linewidths=0.7)
    axes[0].scatter(*x.T, c=colours, **look)
    axes[0].set_title("source, level sets of the potential", fontsize=9)
    ways = torch.stack([x, moved], dim=1)[:lines]
    axes[1].add_collection(LineCollection(list(ways.numpy()), colors=colours[:lines], linewidths=0.5, alpha=0.6))
    axes[1].scatter(*moved[:lines].T, c=colours[:lines], **look)
    axes[1].set_title("the way of some of its points", fontsize=9)
    axes[2].scatter(*y.T, s=14, c="0.85", linewidths=0)
    axes[2].scatter(*moved.T, c=colours, **look)
    axes[2].set_title("target (grey), mapped source", fontsize=9)
    for axis in axes:
        axis.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal", xticks=[], yticks=[])
        axis.spines[:].set_color("0.8")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    small = io.BytesIO()
    Image.open(buffer).convert("RGB").quantize(96).save(small, format="png", optimize=True)
    return small.getvalue()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pair", type=Path, action="append", default=[], help="a benchmark pair; may be repeated")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--width", type=int, nargs="+", default=[64, 64], help="of the hidden layers")
    parser.add_argument("--L", type=float, default=0.02, help="inverse-Lipschitz constant of both maps")
    parser.add_argument("--cycle", type=float, default=2.0, help="weight of the cycle terms")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="draw the map, of a 2-D problem")
    parser.add_argument("--record", type=Path, help="add the scores to this JSON file")
    given = parser.parse_args(arguments)
    if given.steps < 1:
        parser.error(f"--steps: got {given.steps}, wanted at least 1")
    pairs: list[Path | None] = [*given.pair] or [None]
    for path in pairs:
        run(given, path, sys.argv[1:] if arguments is None else arguments)


def run(given: argparse.Namespace, path: Path | None, arguments: list[str]) -> None:
    """One problem: solved, scored, drawn and recorded."""
    torch.manual_seed(given.seed)
    pair = Pair(path) if path else None
    source: Sampler = pair.source if pair else lambda n: torch.randn(n, 2)
    target = pair.target if pair else eight_gaussians
    width = pair.dim if pair else 2

    def look(step: int, transport: il.BrenierMap, back: il.BrenierMap) -> None:
        score = unexplained(pair, transport, back) if pair else {}
        words = ", ".join(f"{name} {value:.3f} %" for name, value in score.items())
        print(
            f"step {step} of {given.steps}, {time.process_time() - start:.0f} s{': L2-UVP ' if words else ''}{words}",
            flush=True,
        )

    start = time.process_time()
    transport, back = solve(
        source,
        target,
        width,
        hidden=tuple(given.width),
        inverse_lipschitz=given.L,
        learning_rate=given.learning_rate,
        cycle=given.cycle,
        batch=given.batch,
        steps=given.steps,
        look=look,
    )
    seconds = time.process_time() - start
    if given.picture and width == 2:
        write_atomically(given.picture, draw(transport, source, target))
    if given.record and pair and path:
        record = json.loads(given.record.read_text()) if given.record.exists() else {}
        record[path.stem] = {
            "l2_uvp_percent": unexplained(pair, transport, back),
            "processor_seconds": round(seconds),
            "command": " ".join(["python examples/transport.py", *_without_folders(arguments)]),
            "commit": _commit(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        write_atomically(given.record, json.dumps(record, indent=1) + "\n")


def _without_folders(arguments: list[str]) -> list[str]:
    """A command for others: where the pairs lie is of no interest."""
    return [Path(a).name if a.endswith(".npz") else a for a in arguments]


if __name__ == "__main__":
    main()
