"""Does the advice on L hold? L swept over its range and beyond, on real data.

    python -m benchmarks.advice --data-root DATA      # about 20 minutes on one core; goes on where it was
    python -m benchmarks.advice --draw                # the picture from the recorded runs alone

Each task keeps a part of its training data for validation: the place to judge another rule on. The picture shows test
data. Writes ``results/advice.json`` after each run, and ``results/advice.png``.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ilvae_fast as il
from benchmarks.record import RESULTS, provenance, write
from ilvae_fast import metrics
from ilvae_fast._files import write_atomically
from ilvae_fast.vae import VAE, VAEConfig
from ilvae_fast.vae.likelihoods import LIKELIHOODS

NAME = "advice"
DECODER: dict[str, Any] = {
    "embedding": "orthogonal",
    "decoder_options": {"activation": il.Activation("softplus", 5.0), "nonneg": "square"},
}
BATCH, RATE = 128, 1e-3
EVALUATED, IMPORTANCE_SAMPLES = 500, 100


@dataclass(frozen=True)
class Task:
    """One setting: data, likelihood, sizes, and the constants to train with."""

    data: str
    count: int  # of the training data, those kept for validation included
    likelihood: str
    latent_dim: int
    epochs: int
    constants: Sequence[float]
    likelihood_options: dict[str, Any] = field(default_factory=dict)
    encoder_hidden: tuple[int, ...] = (256, 256)
    decoder_hidden: tuple[tuple[int, ...], tuple[int, ...]] = ((128, 128), (512, 512))


_DIGITS: dict[str, Any] = {
    "data": "digits", "count": 1438, "likelihood": "gaussian", "likelihood_options": {"scale": 0.5}, "epochs": 200,
    "encoder_hidden": (128, 128), "decoder_hidden": ((64, 64), (256, 256)),
}  # fmt: skip
TASKS: dict[str, Task] = {
    "digits, Gaussian 0.5, 20 latents": Task(
        latent_dim=20, constants=(0, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5), **_DIGITS
    ),
    "digits, Gaussian 0.5, 5 latents": Task(
        latent_dim=5, constants=(0, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0), **_DIGITS
    ),
    "MNIST 3000, Gaussian 0.3, 10 latents": Task(
        "mnist", 3000, "gaussian", 10, 30, (0, 0.03, 0.1, 0.25, 0.5, 1.0, 2.0), {"scale": 0.3}
    ),
    "MNIST 6000, Bernoulli, 20 latents": Task(
        "mnist", 6000, "bernoulli", 20, 20, (0, 0.1, 0.3, 1.0, 2.0, 4.0, 8.0)
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """Data of a task; ``binary``: pixels are drawn anew in each epoch, as those of the other parts once."""

    fit: Tensor
    validation: Tensor
    test: Tensor
    binary: bool


def load(task: Task, data_root: str | None) -> Parts:
    """A sixth of the training data is for validation."""
    dataset = il.data.load(task.data, data_root)
    fit, validation = dataset.train[: task.count].split([task.count - task.count // 6, task.count // 6])
    binary = task.likelihood == "bernoulli"
    generator = torch.Generator().manual_seed(0)
    held = [x[:EVALUATED] for x in (validation, dataset.test)]
    held = [torch.bernoulli(x, generator=generator) if binary else x for x in held]
    return Parts(fit, held[0], held[1], binary)


def run(task: Task, parts: Parts, constant: float, seed: int) -> dict[str, Any]:
    """Train with one constant and measure on validation and test part."""
    torch.manual_seed(seed)
    config = VAEConfig.named(
        "il-lidvae", data_dim=parts.fit.shape[1], latent_dim=task.latent_dim, inverse_lipschitz=math.sqrt(constant),
        likelihood=task.likelihood, likelihood_options=task.likelihood_options, encoder_hidden=task.encoder_hidden,
        decoder_hidden=task.decoder_hidden, **DECODER,
    )  # fmt: skip
    model, start = VAE(config), time.perf_counter()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    steps = task.epochs * (len(parts.fit) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(task.epochs):
        for rows in torch.randperm(len(parts.fit))[: len(parts.fit) // BATCH * BATCH].split(BATCH):
            x = parts.fit[rows]
            model(torch.bernoulli(x) if parts.binary else x).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    seconds = time.perf_counter() - start
    measured = {"validation": measure(model, parts, parts.validation), "test": measure(model, parts, parts.test)}
    return {"L": constant, "seed": seed, "seconds": round(seconds, 1), **measured}


def measure(model: VAE, parts: Parts, x: Tensor) -> dict[str, float]:
    """NLL, KL, MI, the NLL of the best model that ignores z, and the gain of the ELBO over it."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    return {
        "nll": metrics.negative_log_likelihood(model, x, IMPORTANCE_SAMPLES, generator=generator),
        "kl": metrics.kl_divergence(model, x).total,
        "mutual_information": metrics.mutual_information(model, x, generator=generator),
        "ignoring": metrics.nll_without_latent(model, x, parts.fit),
        "gain": metrics.gain(model, x, parts.fit, generator=generator),
    }


def sweep(data_root: str | None, seeds: Sequence[int]) -> dict[str, Any]:
    """All runs that are not recorded yet; the record is written after each."""
    path = RESULTS / f"{NAME}.json"
    result = json.loads(path.read_text()) if path.is_file() else {"tasks": {}}
    for name, task in TASKS.items():
        described = json.loads(json.dumps(dataclasses.asdict(task)))
        record = result["tasks"].setdefault(name, {"task": described, "runs": []})
        if record["task"] != described:
            raise SystemExit(f"{path}: {name!r} was run with other settings; remove it from there to run it anew")
        done = {(run["L"], run["seed"]) for run in record["runs"]}
        parts = load(task, data_root)
        record["advice"] = advised(task, parts.fit)
        for seed in seeds:
            for constant in task.constants:
                if (constant, seed) in done:
                    continue
                record["runs"].append(run(task, parts, constant, seed))
                _record(result, data_root)
                test = record["runs"][-1]["test"]
                print(f"{name}: L = {constant:g}, NLL {test['nll']:.2f}, gain {test['gain']:.2f}", flush=True)
    _record(result, data_root)
    return result


def _record(result: dict[str, Any], data_root: str | None) -> None:
    """Write it with where it is from, but for the path of the data."""
    origin = provenance()
    if data_root is not None:
        origin["command"] = origin["command"].replace(data_root, "DATA")
    write(NAME, {**origin, "decoder": str(DECODER), "tasks": result["tasks"]})


def advised(task: Task, x: Tensor) -> dict[str, Any]:
    """The advice on the data that a task trains on, and what it expects each constant to force and to cost."""
    likelihood = LIKELIHOODS[task.likelihood](**task.likelihood_options)
    advice = il.advise(x, task.latent_dim, likelihood)
    return {
        "text": str(advice),
        **{name: getattr(advice, name) for name in ("L", "low", "high", "idle", "payable", "gain")},
        "forced": [advice.forced(constant) for constant in task.constants],
        "cost": [advice.cost(constant) for constant in task.constants],
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """NLL, gain, KL and MI on test data against L, the advice shaded; L = 0 is a dotted line."""
    import matplotlib as mpl
    import matplotlib.ticker

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    tasks = {name: record for name, record in result["tasks"].items() if record["runs"]}
    with plt.rc_context(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    ):
        figure, axes = plt.subplots(
            2, len(tasks), figsize=(3.3 * len(tasks), 5.4), squeeze=False, sharex="col", layout="constrained"
        )
        for (upper, lower), (name, record) in zip(axes.T, tasks.items(), strict=True):
            advice = record["advice"]
            means = _means(record["runs"])
            constants = [constant for constant in means if constant > 0]
            for axis, column, colour, label in (
                (upper, "nll", "#4a7fb5", "NLL"),
                (lower, "gain", "#2f8f5b", "gain of the ELBO over ignoring z"),
                (lower, "kl", "#b8bcc4", "KL"),
                (lower, "mutual_information", "#d97706", "MI of x and z"),
            ):
                axis.plot(constants, [means[c][column] for c in constants], "o-", ms=3.5, color=colour, label=label)
                if 0 in means and column != "kl":
                    axis.axhline(means[0][column], color=colour, linestyle=":", linewidth=1.2)
            if 0 in means:
                lower.plot([], [], "k:", label="the same at L = 0")
                expected = [
                    means[0]["nll"] + f
                    for c, f in zip(record["task"]["constants"], advice["forced"], strict=True)
                    if c in constants
                ]
                upper.plot(constants, expected, "x", color="#c1432e", ms=5, label="L = 0, and what L forces")
            upper.axhline(means[constants[0]]["ignoring"], color="#333333", linestyle="--", label="a model ignoring z")
            lower.axhline(0, color="#333333", linestyle="--", linewidth=1)
            for axis in (upper, lower):
                if advice["low"] < advice["high"]:
                    axis.axvspan(
                        advice["low"], advice["high"], color="#2f8f5b", alpha=0.15, lw=0, label="range advised"
                    )
                axis.axvline(advice["L"], color="#2f8f5b", label="recommended L")
                axis.set_xscale("log")
                axis.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
            best = min(means[c]["nll"] for c in means)
            span = max(means[c]["nll"] for c in means) - best
            upper.set_ylim(best - 0.1 * span, best + 1.15 * span)
            upper.set_title(name.replace(", ", "\n", 1), fontsize=9)
            lower.set_xlabel("certified constant L")
        axes[0, 0].set_ylabel("test data, nats")
        axes[1, 0].set_ylabel("test data, nats")
        handles = {label: h for axis in axes[:, -1] for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        handles |= {label: h for axis in axes[:, 0] for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=5)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=130)
        plt.close(figure)
    write_atomically(path, content.getvalue())


def _means(runs: Sequence[dict[str, Any]]) -> dict[float, dict[str, float]]:
    """Test measures for each constant, ascending, the means of the seeds."""
    grouped: dict[float, list[dict[str, float]]] = {}
    for one in sorted(runs, key=lambda r: r["L"]):
        grouped.setdefault(one["L"], []).append(one["test"])
    return {c: {k: sum(t[k] for t in tests) / len(tests) for k in tests[0]} for c, tests in grouped.items()}


def main() -> None:
    """Run what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", help="folder of the data sets in files; else ILVAE_FAST_DATA_ROOT, or data/")
    parser.add_argument("--seed", type=int, action="append", help="once for each; else 0")
    parser.add_argument("--draw", action="store_true", help="only draw what is recorded")
    arguments = parser.parse_args()
    if not arguments.draw:
        sweep(arguments.data_root, arguments.seed or [0])
    picture = RESULTS / f"{NAME}.png"
    draw(json.loads((RESULTS / f"{NAME}.json").read_text()), picture)
    print(picture)


if __name__ == "__main__":
    main()
