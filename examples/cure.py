"""What the decoder of ``plain_vae.py`` changes, measured and drawn: the picture of docs/cure.md.

    python examples/cure.py [--output results/cure]

Both decoders are trained as that example does, with three seeds (three minutes on one core). Written to --output:
digits.json, and digits.png, drawn from it: each row moves one latent of a test datum, those with the largest KL first.
``--draw`` draws the picture anew from the recorded numbers.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import plain_vae
import torch
from matplotlib.figure import Figure

import ilvae_fast as il
from ilvae_fast._support.files import write_atomically

SEEDS = (0, 1, 2)
EPOCHS = 40
STEPS = 7  # positions of a moved latent, from -2 to 2
TITLES = {"mlp": "Before, an MLP", "brenier": "After, a Brenier decoder"}


def measured(kind: str, seed: int, digits: il.data.Dataset, epochs: int) -> tuple[plain_vae.VAE, dict[str, Any]]:
    """A trained VAE, and its measures on the test data."""
    torch.manual_seed(seed)
    images, test = (x.unflatten(-1, plain_vae.SHAPE) for x in (digits.train, digits.test))
    decoder = plain_vae.DECODERS[kind]()
    if isinstance(decoder, il.BrenierDecoder):
        decoder.initialize(images, "bernoulli")
    model = plain_vae.VAE(decoder)
    plain_vae.train(model, images, epochs)
    adapted = il.metrics.adapt(encoder=model.eval().encoder, decoder=decoder, likelihood="bernoulli")
    return model, {
        "decoder": kind,
        "seed": seed,
        "kl_per_dimension": il.metrics.kl_divergence(adapted, test).per_dimension.tolist(),
        "active_directions": il.metrics.active_directions(adapted, test).active,
        "mutual_information": il.metrics.mutual_information(adapted, test),
        "gain": il.metrics.gain(adapted, test, images),
        "nll": il.metrics.negative_log_likelihood(adapted, test, 200),
    }


@torch.no_grad()
def traversal(model: plain_vae.VAE, x: torch.Tensor) -> list[list[list[int]]]:
    """The decoded probabilities, 0 to 255, for each latent (m) and each position of it (STEPS), the others at x's."""
    mean, _ = model.encoder(x.unflatten(-1, plain_vae.SHAPE)).chunk(2, dim=-1)
    z = mean.repeat(plain_vae.LATENT_DIM, STEPS, 1)
    index = torch.arange(plain_vae.LATENT_DIM)
    z[index, :, index] = torch.linspace(-2, 2, STEPS)
    return (255 * model.decoder(z).sigmoid()).round().int().flatten(2).tolist()


def draw(record: dict[str, Any]) -> bytes:
    """A sheet of digits for each decoder: rows are latents by their KL, columns positions from -2 to 2."""
    figure = Figure(figsize=(9.6, 5.8), layout="constrained")
    panels: Any = figure.subfigures(1, 2, wspace=0.05)
    for panel, (kind, title) in zip(panels, TITLES.items(), strict=True):
        run = next(run for run in record["runs"] if run["decoder"] == kind and run["seed"] == SEEDS[0])
        kl = torch.tensor(run["kl_per_dimension"])
        axes = panel.subplots(len(kl), STEPS)
        for i, latent in enumerate(kl.argsort(descending=True)):
            for axis, image in zip(axes[i], torch.tensor(record["traversals"][kind][latent]), strict=True):
                axis.imshow(image.reshape(8, 8), cmap="gray_r", vmin=0, vmax=255)
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_color("0.8")
            axes[i, 0].set_ylabel(f"{kl[latent]:.2f}", rotation=0, ha="right", va="center")
        panel.suptitle(f"{title}: {run['active_directions']} of {len(kl)} directions in use", fontsize="large")
        panel.supylabel("KL of the latent that moves, in nats", fontsize="medium")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100, metadata={"Software": None})
    return content.getvalue()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("results/cure"))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--draw", action="store_true", help="the picture alone, from digits.json")
    args = parser.parse_args(arguments)
    file = args.output / "digits.json"
    if not args.draw:
        digits = il.data.load("digits")
        record: dict[str, Any] = {"command": "python examples/cure.py", "epochs": args.epochs, "runs": []}
        record |= {"torch": torch.__version__, "traversals": {}}
        for kind in TITLES:
            for seed in SEEDS:
                model, row = measured(kind, seed, digits, args.epochs)
                record["runs"].append(row)
                print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
                                if k != "kl_per_dimension"))  # fmt: skip
                if seed == SEEDS[0]:
                    record["traversals"][kind] = traversal(model, digits.test[0])
        write_atomically(file, json.dumps(record) + "\n")
    record = json.loads(file.read_text())
    write_atomically(args.output / "digits.png", draw(record))


if __name__ == "__main__":
    main()
