"""Posterior collapse on two Gaussians: VAE, LIDVAE and IL-LIDVAE, and the same with a mixture prior, against sigma.

    python examples/toy_collapse.py [--quick] [--output results/toy] [--seconds 200]

The data are two Gaussians at (0, 0) and (10, 10) with standard deviation sigma. Two settings of the likelihood N(f(z),
s^2 I): "true", s = sigma, in which the latent need tell no more than the component; and "unit", s = 1, in which it is
asked to tell the noise too. Each run is one row of runs.csv, written at once: a study that was stopped goes on where it
was, and ``--seconds`` stops it by itself. Figures are drawn from the files alone (``ilvae-fast report toy``).

Written to --output: runs.csv, posteriors.json, study.json (settings, command, versions), and the figures as PNG.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import math
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sklearn.cluster import KMeans
from torch import Tensor

import ilvae_fast as il
from ilvae_fast import data, metrics
from ilvae_fast._support.files import write_atomically
from ilvae_fast.training import evaluate
from ilvae_fast.training.toy_report import draw
from ilvae_fast.vae import VAE, GaussianMixture, GaussianMixturePosterior, VAEConfig
from ilvae_fast.vae.config import FIRST_OPTIONS


@dataclass(frozen=True)
class Settings:
    """Of the whole study."""

    sigmas: tuple[float, ...] = (0.5, 2.5, 5.0, 7.5, 10.0)
    constants: tuple[float | None, ...] = (None, 0.0, 1.0, 3.0, 10.0)  # certified L; None: plain, 0: LID
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of data, weights, batches and noise
    more_seeds: tuple[int, ...] = tuple(range(5, 20))  # of "unit" at sigma = 7.5, where accuracies spread
    shown_sigmas: tuple[float, ...] = (0.5, 7.5)  # whose posteriors are kept for a figure, of the first seed
    steps: int = 1200
    batch_size: int = 256
    learning_rate: float = 2e-3
    num_data: int = 2000  # for training, and as many for tests
    encoder_hidden: tuple[int, ...] = (32, 32)
    mlp_hidden: tuple[int, ...] = (32, 32)
    brenier_hidden: tuple[tuple[int, ...], tuple[int, ...]] = ((32, 32), (32, 32))
    importance_samples: int = 100
    fisher_samples: int = 128
    measured_data: int = 1000
    shown_points: int = 300

    def quick(self) -> Settings:
        """The same with little work: numbers that mean nothing, for tests."""
        return replace(
            self, sigmas=(0.5, 7.5), constants=(None, 0.0, 10.0), seeds=(0,), more_seeds=(1,), steps=30, num_data=300,
            batch_size=64, importance_samples=5, fisher_samples=4, measured_data=60, shown_points=20,
        )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One model of the study; the fields are the first columns of its row."""

    setting: str  # of the likelihood, "true" or "unit"
    prior: str  # "normal" or "mixture"
    L: float | None
    sigma: float
    seed: int

    @property
    def key(self) -> tuple[str, ...]:
        return tuple("" if value is None else str(value) for value in asdict(self).values())


def runs(settings: Settings) -> Iterator[Run]:
    """All runs, seed after seed, so that a study cut short has all models."""
    for seed, sigma in itertools.product(settings.seeds, settings.sigmas):
        for setting, prior in (("true", "mixture"), ("true", "normal"), ("unit", "mixture")):
            for constant in settings.constants:
                yield Run(setting, prior, constant, sigma, seed)
    for seed, constant in itertools.product(settings.more_seeds, settings.constants):
        yield Run("unit", "mixture", constant, 7.5, seed)


def config(run: Run, settings: Settings) -> VAEConfig:
    """Two latents for two coordinates, so that the projection in the lower bound is the identity."""
    fields: dict[str, Any] = {
        "data_dim": 2,
        "latent_dim": 2,
        "encoder_hidden": settings.encoder_hidden,
        "likelihood_options": {"scale": run.sigma if run.setting == "true" else 1.0},
    }
    mixture = run.prior == "mixture"
    if mixture:
        fields["prior_options"] = {"num_components": 2}
    if run.L is None:
        return VAEConfig.named("gmvae" if mixture else "vae", **fields, decoder_hidden=settings.mlp_hidden)
    fields |= {"decoder_hidden": settings.brenier_hidden, "inverse_lipschitz": math.sqrt(run.L)}
    fields |= {"embedding": "identity", "decoder_options": FIRST_OPTIONS}  # as the recorded runs have them
    return VAEConfig.named("il-lidmvae" if mixture else "il-lidvae", **fields)


def train(model: VAE, x: Tensor, settings: Settings) -> None:
    """Adam on the negative ELBO of random batches."""
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    for _ in range(settings.steps):
        optimizer.zero_grad()
        model(x[torch.randint(len(x), (settings.batch_size,))]).loss.backward()
        optimizer.step()


def clusters(model: VAE, x: Tensor) -> Tensor:
    """The component of each datum: the likeliest of q(y|x); without a mixture, 2-means on the posterior's means."""
    posterior = model.inference(x)
    if isinstance(posterior, GaussianMixturePosterior):
        return posterior.logits.argmax(-1)
    fitted = KMeans(2, n_init=4, random_state=0).fit_predict(posterior.mean.numpy())
    return torch.from_numpy(fitted).long()


@torch.no_grad()
def measure(model: VAE, dataset: data.Dataset, run: Run, settings: Settings) -> dict[str, float | None]:
    """The columns of a row."""
    measured = evaluate(
        model, dataset, num_importance_samples=settings.importance_samples, fisher_samples=settings.fisher_samples,
        limit=settings.measured_data, seed=run.seed,
    )  # fmt: skip
    assert dataset.test_labels is not None
    smallest, largest = sorted(measured["kl_per_dimension"])
    return {
        "accuracy": metrics.clustering_accuracy(clusters(model, dataset.test), dataset.test_labels),
        "kl": measured["elbo_kl"],
        "kl_smaller": smallest,
        "kl_larger": largest,
        "variance_smaller": min(measured["latent_variances"]),
        **{k: measured[k] for k in ("nll", "active_units", "mutual_information", "fisher", "fisher_lower_bound")},
        "effective_sample_size": measured["fisher_effective_sample_size"],
        "certified": measured["certified"],
        "measured": measured["measured"],
    }


@torch.no_grad()
def posteriors(model: VAE, dataset: data.Dataset, settings: Settings) -> dict[str, Any]:
    """Means of q(z|x) and the components of the prior, for a figure."""
    assert dataset.test_labels is not None
    shown = slice(settings.shown_points)
    prior = model.prior
    assert isinstance(prior, GaussianMixture)
    return {
        "means": [[round(v, 3) for v in z] for z in model.encode(dataset.test[shown]).tolist()],
        "labels": dataset.test_labels[shown].tolist(),
        "components": prior.means.tolist(),
        "deviations": (0.5 * prior.log_variances).exp().tolist(),
    }


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def read(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """The finished runs by key."""
    if not path.is_file():
        return {}
    names = Run.__dataclass_fields__
    return {tuple(row[name] for name in names): row for row in csv.DictReader(io.StringIO(path.read_text()))}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """All finished runs."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def study(settings: Settings, output: Path, seconds: float, command: str) -> bool:
    """Do what is not done yet, for ``seconds`` at most; whether all is done."""
    record = {
        "command": command,
        "settings": asdict(settings),
        "versions": {"ilvae_fast": il.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    path = output / "study.json"
    plain = json.loads(json.dumps(record["settings"]))
    if path.is_file() and (old := json.loads(path.read_text())["settings"]) != plain:
        raise SystemExit(f"--output: {output} holds a study with other settings: {old}")
    write_atomically(path, json.dumps(record, indent=2) + "\n")
    done, commit, start = read(output / "runs.csv"), _commit(), time.perf_counter()
    kept = output / "posteriors.json"
    shown: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    todo = list(runs(settings))
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns) as progress:
        task = progress.add_task("toy study", total=len(todo))
        for run in todo:
            if run.key not in done:
                if time.perf_counter() - start > seconds:
                    return False
                began = time.perf_counter()
                dataset = data.toy(
                    sigma=run.sigma, num_train=settings.num_data, num_test=settings.num_data, seed=run.seed
                )
                torch.manual_seed(run.seed)
                model = VAE(config(run, settings))
                train(model, dataset.train, settings)
                model.eval()
                row = {**asdict(run), **measure(model, dataset, run, settings)}
                row |= {"seconds": round(time.perf_counter() - began, 2), "commit": commit}
                if run.prior == "mixture" and run.seed == settings.seeds[0] and run.sigma in settings.shown_sigmas:
                    shown["/".join(run.key)] = posteriors(model, dataset, settings)
                    write_atomically(kept, json.dumps(shown) + "\n")
                done[run.key] = row
                write(output / "runs.csv", list(done.values()))
            progress.update(task, advance=1)
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    # torch's own forward mode, once for the Jacobians of the MLP
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("results/toy"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few steps of a few models, to see it run")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long; a next call goes on")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # with networks this small a second one gains nothing
    settings = Settings().quick() if options.quick else Settings()
    command = " ".join(["python", "examples/toy_collapse.py", *(sys.argv[1:] if arguments is None else arguments)])
    if not study(settings, options.output, options.seconds, command):
        print("not done yet: the same command goes on")
        return
    for path in draw(options.output):
        print(path)


if __name__ == "__main__":
    main()
