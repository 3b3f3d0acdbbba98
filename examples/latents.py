"""A latent plane as L grows: the data of the page with the slider, docs/latents.md.

    python examples/latents.py [--output results/latents]

An IL-LIDVAE with two latents for each L, on handwritten digits with a Gaussian likelihood (two minutes on one core).
Written to --output: digits.json, and planes.png, drawn from it. Images are stored as bytes, latents as thousandths, in
base64. ``--draw`` draws the picture anew from the recorded numbers.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import ilvae_fast as il
from ilvae_fast._support.files import write_atomically
from ilvae_fast.training import evaluate
from ilvae_fast.vae import VAE, Gaussian, VAEConfig

CONSTANTS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
SCALE = 0.7  # sigma: so much of the data is noise that without a floor the latent collapses
EPOCHS = 60
EXTENT = 2.4  # the plane is shown from -EXTENT to EXTENT
GRID = 13  # decoded positions along each side
UNIT = 1 / 1000  # of stored means and deviations
MEASURES = ("nll", "gain", "elbo_kl", "mutual_information", "active_directions", "certified", "measured")


def trained(constant: float, x: Tensor, epochs: int) -> VAE:
    """A model of two latents with a certified constant."""
    torch.manual_seed(0)
    config = VAEConfig.named(
        "il-lidvae", data_dim=64, latent_dim=2, inverse_lipschitz=math.sqrt(constant),
        likelihood_options={"scale": SCALE}, decoder_hidden=((64, 64), (256, 256)),
    )  # fmt: skip
    model = VAE(config)
    model.initialize(x)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            model(x[index]).loss.backward()
            optimiser.step()
    return model.eval()


def encoded(values: Tensor, unit: float, dtype: torch.dtype) -> str:
    """Multiples of ``unit`` in base64."""
    bounds = torch.iinfo(dtype)
    array = (values / unit).round().clamp(bounds.min, bounds.max).to(dtype).numpy()
    return base64.b64encode(array.tobytes()).decode()


def images(probabilities: Tensor) -> str:
    return encoded(probabilities, 1 / 255, torch.uint8)


@torch.no_grad()
def row(constant: float, model: VAE, digits: il.data.Dataset, chosen: Tensor) -> dict[str, Any]:
    """What the page shows of one L."""
    posterior = model.inference(digits.test)
    axis = torch.linspace(-EXTENT, EXTENT, GRID)
    grid = torch.cartesian_prod(axis.flip(0), axis).flip(-1)  # rows from the top, as a picture
    measures = evaluate(model, digits, num_importance_samples=200, fisher_samples=4)
    return {
        "L": constant,
        **{name: measures[name] for name in MEASURES},
        "means": encoded(posterior.mean, UNIT, torch.int16),
        "deviations": encoded((posterior.log_variance / 2).exp(), UNIT, torch.int16),
        "grid": images(model.decode(grid)),
        "samples": images(model.sample(20, torch.Generator().manual_seed(0))),
        "reconstructions": images(model.reconstruct(digits.test[chosen])),
    }


def _rounded(value: float) -> str:
    return f"{round(value, 2) + 0:.2f}"  # + 0: not -0.00


def draw(record: dict[str, Any]) -> bytes:
    """The posterior means of the test data for each L, coloured by digit, and the measures below."""
    labels = np.array(record["labels"])
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    for axis, one in zip(figure.subplots(2, 4).flat, record["rows"], strict=True):
        means = np.frombuffer(base64.b64decode(one["means"]), np.int16).reshape(-1, 2) * UNIT
        axis.scatter(*means.T, c=labels, cmap="tab10", s=6)
        axis.set(xlim=(-EXTENT, EXTENT), ylim=(-EXTENT, EXTENT), aspect="equal", xticks=[], yticks=[])
        axis.set_title(f"L = {one['L']:g}", fontsize="medium")
        axis.set_xlabel(
            f"gain {_rounded(one['gain'])}, MI {_rounded(one['mutual_information'])} nats", fontsize="small"
        )
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=80, metadata={"Software": None})
    return content.getvalue()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("results/latents"))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--draw", action="store_true", help="the picture alone, from digits.json")
    args = parser.parse_args(arguments)
    file = args.output / "digits.json"
    if not args.draw:
        digits = il.data.load("digits")
        labels = digits.test_labels
        assert labels is not None
        chosen = torch.stack([(labels == digit).nonzero()[0, 0] for digit in range(10)])
        advice = il.advise(digits.train, latent_dim=2, likelihood=Gaussian(SCALE))
        record: dict[str, Any] = {
            "command": "python examples/latents.py",
            "torch": torch.__version__,
            "epochs": args.epochs,
            "scale": SCALE,
            "advice": {"L": advice.L, "low": advice.low, "high": advice.high, "text": str(advice)},
            "extent": EXTENT,
            "grid": GRID,
            "unit": UNIT,
            "labels": labels.tolist(),
            "originals": images(digits.test[chosen]),
            "rows": [],
        }
        for constant in CONSTANTS:
            record["rows"].append(row(constant, trained(constant, digits.train, args.epochs), digits, chosen))
            print(", ".join(f"{name} {record['rows'][-1][name]:.3g}" for name in ("L", *MEASURES)))
        write_atomically(file, json.dumps(record) + "\n")
    write_atomically(args.output / "planes.png", draw(json.loads(file.read_text())))


if __name__ == "__main__":
    main()
