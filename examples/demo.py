"""Train a VAE, LIDVAE and IL-LIDVAEs on handwritten digits, measure how far each collapses, and draw it.

    python examples/demo.py [--output runs/demo] [--quick] [--epochs N] [--L 0.5 1] [--seed 0] [--threads 1]

All models share one setting, in which ``il.advise`` says that the data can pay for every latent, and a plain VAE leaves
most of them unused all the same. The L of one IL-LIDVAE is the advised one. Another is far larger, to show that larger
is not better. Written to --output: metrics.json, checkpoints/<model>/, figures as PNG, and report.html, which shows
them.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import demo_report
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import ilvae_fast as il
from ilvae_fast import data
from ilvae_fast._support.files import write_atomically
from ilvae_fast.training import evaluate
from ilvae_fast.vae import VAE, Gaussian, VAEConfig


@dataclass(frozen=True)
class Settings:
    """One setting for all models, chosen on a part of the training data; only the decoder and its constant differ.

    The MLP has the hidden layers of both Brenier maps one after the other: as deep, as wide, and within a tenth as many
    parameters. After twice the epochs it fits about as well as the IL-LIDVAE, still with 4 directions (one seed).
    """

    dataset: str = "digits"
    latent_dim: int = 10
    scale: float = 0.25  # sigma of the Gaussian likelihood; the data lie in [0, 1]
    constants: tuple[float, ...] = ()  # further L of IL-LIDVAEs, beside the advised one; none: one of excess
    excess: float = 20.0  # times the upper end of the advised range
    decoder_hidden: tuple[tuple[int, ...], tuple[int, ...]] = ((64, 64), (256, 256))
    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 1e-3
    seed: int = 0
    importance_samples: int = 200
    fisher_samples: int = 32
    timed_steps: int = 40

    def quick(self) -> Settings:
        """The same with little work: numbers that mean nothing, for tests."""
        return replace(self, epochs=2, importance_samples=20, fisher_samples=4, timed_steps=3, batch_size=256)


@dataclass(frozen=True)
class Entry:
    """A model of the comparison: its key in files, its name in tables, its constant, and whether that is the advice."""

    key: str
    label: str
    constant: float | None
    config: VAEConfig
    advised: bool = False


def entries(settings: Settings, data_dim: int, advice: il.Advice) -> list[Entry]:
    """VAE, LIDVAE, the IL-LIDVAE of the advice and one for each further L, which is split evenly between the maps."""
    common: dict[str, Any] = {
        "data_dim": data_dim,
        "latent_dim": settings.latent_dim,
        "likelihood_options": {"scale": settings.scale},
    }
    brenier = {**common, "decoder_hidden": settings.decoder_hidden}
    mlp = {**common, "decoder_hidden": tuple(chain(*settings.decoder_hidden))}
    result = [
        Entry("vae", "VAE", None, VAEConfig.named("vae", **mlp)),
        Entry("lidvae", "LIDVAE", 0.0, VAEConfig.named("lidvae", **brenier)),
    ]
    further = settings.constants or (rounded(settings.excess * advice.high),)
    for constant in dict.fromkeys((rounded(advice.L), *further)):
        config = VAEConfig.named("il-lidvae", **brenier, inverse_lipschitz=math.sqrt(constant))
        key = f"il-lidvae-L{constant:g}"
        result.append(Entry(key, "IL-LIDVAE", constant, config, advised=constant == rounded(advice.L)))
    return result


def rounded(constant: float) -> float:
    """To three digits, which are enough to say and to type."""
    return float(f"{constant:.3g}")


def train_step(model: VAE, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    """One step of Adam on the negative ELBO of a batch."""
    optimizer.zero_grad(set_to_none=True)
    loss = model(x).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def train(entry: Entry, x: Tensor, settings: Settings, progress: Progress) -> tuple[VAE, list[float]]:
    """A trained model and its mean loss in each epoch."""
    torch.manual_seed(settings.seed)
    model = VAE(entry.config)
    model.initialize(x)  # the Brenier decoders, from the training data; an MLP stays as it is
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    task = progress.add_task(f"train {entry.key}", total=settings.epochs, note="")
    history = []
    for _ in range(settings.epochs):
        losses = [
            train_step(model, optimizer, x[index]) * len(index)
            for index in torch.randperm(len(x)).split(settings.batch_size)
        ]
        history.append(torch.stack(losses).sum().item() / len(x))
        progress.update(task, advance=1, note=f"loss {history[-1]:.2f}")
    return model, history


def measure(entry: Entry, model: VAE, dataset: data.Dataset, settings: Settings, progress: Progress) -> dict[str, Any]:
    """All measures on the test data."""
    task = progress.add_task(f"measure {entry.key}", total=1, note="")
    return evaluate(
        model,
        dataset,
        num_importance_samples=settings.importance_samples,
        fisher_samples=settings.fisher_samples,
        limit=None,
        seed=settings.seed,
        progress=lambda part: progress.update(task, completed=part),
    )


def time_steps(models: Sequence[VAE], x: Tensor, settings: Settings, progress: Progress) -> list[dict[str, float]]:
    """Median milliseconds of a training step by the fused operators and by autograd's double backward.

    Models and backends take turns step by step, so that whatever else the machine does meets all of them alike. An MLP
    has no fused operator; its step is counted as autograd's.
    """
    runs = []
    for model in models:
        model = copy.deepcopy(model)
        fused = [("fused", "native")] if model.config.decoder == "brenier" else []
        optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
        runs.append((model, optimizer, [*fused, ("autograd", "reference")]))
    seconds: list[dict[str, list[float]]] = [{name: [] for name, _ in backends} for _, _, backends in runs]
    warmup = 3
    task = progress.add_task("time training steps", total=warmup + settings.timed_steps, note="")
    for step in range(warmup + settings.timed_steps):
        for (model, optimizer, backends), measured in zip(runs, seconds, strict=True):
            for name, backend in backends:
                with il.use_backend(backend):
                    start = time.perf_counter()
                    train_step(model, optimizer, x)
                    elapsed = time.perf_counter() - start
                if step >= warmup:
                    measured[name].append(elapsed)
        progress.update(task, advance=1)
    return [{f"step_ms_{name}": 1e3 * statistics.median(v) for name, v in run.items()} for run in seconds]


def pictures(model: VAE, x: Tensor, settings: Settings) -> dict[str, Tensor]:
    """Reconstructions of x and as many samples, both the means of p(x|z); the same latents for all models."""
    generator = torch.Generator().manual_seed(settings.seed)
    return {"reconstructions": model.reconstruct(x), "samples": model.sample(len(x), generator)}


def parse(arguments: Sequence[str] | None) -> tuple[Settings, Path, int]:
    """Settings, output folder and number of threads from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    default = Settings()
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see it run")
    parser.add_argument("--epochs", type=int, help=f"of training, of every model; {default.epochs} if not given")
    parser.add_argument(
        "--threads", type=int, default=1,
        help="of torch; with networks this small a second one gains little, and stalls when its core is busy",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=default.seed, help="of weights, batches and samples")
    parser.add_argument(
        "--L", type=float, nargs="+", default=default.constants, dest="constants", metavar="L",
        help="certified constants of further IL-LIDVAEs, beside the advised one; none: "
        f"{default.excess:g} times the upper end of the advised range",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.epochs is not None and options.epochs < 1:
        parser.error(f"--epochs: got {options.epochs}, wanted at least 1")
    if options.threads < 1:
        parser.error(f"--threads: got {options.threads}, wanted at least 1")
    for constant in options.constants:
        if not (math.isfinite(constant) and constant > 0):
            parser.error(f"--L: got {constant}, wanted finite numbers > 0 (0 is LIDVAE, always there)")
    settings = replace(default, seed=options.seed, constants=tuple(sorted(set(options.constants))))
    if options.quick:
        settings = settings.quick()
    if options.epochs is not None:
        settings = replace(settings, epochs=options.epochs)
    return settings, options.output, options.threads


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    # torch's own forward mode, once for the Jacobians of the MLP
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    settings, output, threads = parse(arguments)
    torch.set_num_threads(threads)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    dataset = data.load(settings.dataset)
    advice = il.advise(dataset.train, settings.latent_dim, Gaussian(settings.scale))
    console.print(f"{advice}\n", highlight=False)
    compared = entries(settings, dataset.train.shape[1], advice)
    shown = dataset.test[: demo_report.COLUMNS_OF_IMAGES]

    models, results, images = [], [], []
    columns = [TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        for entry in compared:
            model, history = train(entry, dataset.train, settings, progress)
            folder = output / "checkpoints" / entry.key
            model.save_pretrained(folder)
            model = VAE.from_pretrained(folder)  # what is measured is what was saved
            measured = measure(entry, model, dataset, settings, progress)
            identity = {"key": entry.key, "label": entry.label, "L": entry.constant, "advised": entry.advised}
            results.append({**identity, **measured, "history": history})
            images.append(pictures(model, shown, settings))
            models.append(model)
        timings = time_steps(models, dataset.train[: settings.batch_size], settings, progress)
    for result, timing in zip(results, timings, strict=True):
        result.update({"step_ms_fused": None, **timing})

    record: dict[str, Any] = {
        "command": " ".join(["python", "examples/demo.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "settings": asdict(settings),
        "versions": {
            "ilvae_fast": il.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "build": il.build_info(),
            "threads": torch.get_num_threads(),
        },
        "advice": {
            "text": str(advice),
            **{name: getattr(advice, name) for name in ("L", "low", "high", "payable", "gain", "noise")},
        },
        "models": results,
    }
    figures = demo_report.draw(record, images, shown, dataset.shape)
    record["seconds"] = time.perf_counter() - start
    for name, png in figures.items():
        write_atomically(output / name, png)
    advice.plot(output / "advice.png")
    figures["advice.png"] = (output / "advice.png").read_bytes()
    write_atomically(output / "metrics.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    write_atomically(output / "report.html", demo_report.html(record, figures))

    # a table wider than the terminal goes beyond its edge rather than lose columns
    console.print(demo_report.table(record), width=1000, crop=False)
    for line in (*demo_report.warnings(record), "", *demo_report.verdict(record)):
        console.print(line, highlight=False, markup=False)
    console.print(f"{record['seconds']:.0f} s; open {output / 'report.html'}", highlight=False)


if __name__ == "__main__":
    main()
