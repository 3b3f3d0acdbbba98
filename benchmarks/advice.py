"""Does the advice on L hold? L swept over its range and beyond, on real data.

    python -m benchmarks.advice --data-root DATA      # about 15 minutes on one core; goes on where it was
    python -m benchmarks.advice --draw                # the picture from the recorded runs alone

Each task keeps a part of its training data for validation: the place to judge another rule on. The picture shows test
data. Writes ``results/advice.json`` after each run, and ``results/advice.png``.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import ilvae_fast as il
from benchmarks import fits
from benchmarks.fits import Parts, Task
from benchmarks.record import RESULTS, provenance, write
from ilvae_fast._support.files import write_atomically
from ilvae_fast.vae import LIKELIHOODS, VAE

NAME = "advice"
EVALUATED = 500


def _digits(latent_dim: int) -> Task:
    return Task("digits", 1200, 238, "gaussian", latent_dim, 200, (128, 128), (), {"scale": 0.5}, cosine=True)


# settings, and the constants to train with
TASKS: dict[str, tuple[Task, tuple[float, ...]]] = {
    "digits, Gaussian 0.5, 20 latents": (_digits(20), (0, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5)),
    "digits, Gaussian 0.5, 5 latents": (_digits(5), (0, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0)),
    "MNIST 3000, Gaussian 0.3, 10 latents": (
        Task("mnist", 2500, 500, "gaussian", 10, 30, (256, 256), (), {"scale": 0.3}, cosine=True),
        (0, 0.03, 0.1, 0.25, 0.5, 1.0, 2.0),
    ),
    "MNIST 6000, Bernoulli, 20 latents": (
        Task("mnist", 5000, 500, "bernoulli", 20, 20, (256, 256), (), cosine=True),
        (0, 0.1, 0.3, 1.0, 2.0, 4.0, 8.0),
    ),
}


def run(task: Task, parts: Parts, constant: float, seed: int) -> dict[str, Any]:
    """Train the default decoder with one constant and measure on validation and test part."""
    torch.manual_seed(seed)
    model = VAE(fits.configuration(task, parts, constant))
    model.initialize(parts.fit)
    milliseconds = fits.fit(model, parts.fit, task)
    measured = {
        part: fits.measure(model, x[:EVALUATED], parts.fit, task.importance_samples)
        for part, x in (("validation", parts.validation), ("test", parts.test))
    }
    for values in measured.values():
        values["gain"] = values["ignoring"] - values["negative_elbo"]
    return {"L": constant, "seed": seed, "step_ms": round(milliseconds, 2), **measured}


def sweep(data_root: str | None, seeds: Sequence[int]) -> dict[str, Any]:
    """All runs that are not recorded yet; the record is written after each."""
    path = RESULTS / f"{NAME}.json"
    result = json.loads(path.read_text()) if path.is_file() else {"tasks": {}}
    for name, (task, constants) in TASKS.items():
        described = json.loads(json.dumps({**vars(task), "constants": constants}, default=dict))
        record = result["tasks"].setdefault(name, {"task": described, "runs": []})
        if record["task"] != described:
            raise SystemExit(f"{path}: {name!r} was run with other settings; remove it from there to run it anew")
        done = {(run["L"], run["seed"]) for run in record["runs"]}
        parts = fits.load(task, data_root)
        record["advice"] = advised(task, parts, constants)
        for seed in seeds:
            for constant in constants:
                if (constant, seed) in done:
                    continue
                record["runs"].append(run(task, parts, constant, seed))
                write(NAME, {**result, **provenance()})
                test = record["runs"][-1]["test"]
                print(f"{name}: L = {constant:g}, NLL {test['nll']:.2f}, gain {test['gain']:.2f}", flush=True)
    write(NAME, {**result, **provenance()})
    return result


def advised(task: Task, parts: Parts, constants: Sequence[float]) -> dict[str, Any]:
    """The advice on the data that a task trains on, and what it expects each constant to force and to cost."""
    likelihood = LIKELIHOODS[task.likelihood](**task.likelihood_options)
    advice = il.advise(parts.fit, task.latent_dim, likelihood)
    return {
        "text": str(advice),
        **{name: getattr(advice, name) for name in ("L", "low", "high", "idle", "payable", "gain")},
        "forced": [advice.forced(constant) for constant in constants],
        "cost": [advice.cost(constant) for constant in constants],
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
