"""Figures of the toy study, drawn from its files alone."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .._support.extras import require
from .._support.files import write_atomically

_TITLES = {
    ("true", "mixture"): r"mixture prior, likelihood of the data's $\sigma$",
    ("true", "normal"): r"normal prior, likelihood of the data's $\sigma$",
    ("unit", "mixture"): r"mixture prior, likelihood of $\sigma = 1$",
}


class Point(NamedTuple):
    """Mean and standard error over seeds."""

    mean: float
    error: float


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows of runs.csv, numbers as numbers and None for an empty field.

    Raises:
        FileNotFoundError, ValueError: no such file, or another one; says how to make it.
    """
    path = folder / "runs.csv"
    if not path.is_file():
        raise FileNotFoundError(f"results: no runs.csv in {folder}; python examples/toy_collapse.py makes it")
    texts = ("setting", "prior", "commit")
    try:
        rows = [
            {k: v if k in texts else (None if v == "" else float(v)) for k, v in row.items()}
            for row in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
        ]
        [rows[0][name] for name in ("setting", "prior", "sigma", "L", "accuracy", "fisher", "fisher_lower_bound")]
    except (ValueError, TypeError, KeyError, IndexError, csv.Error) as error:
        raise ValueError(
            f"{path}: is not the table of the toy study; python examples/toy_collapse.py makes it"
        ) from error
    return rows


def curve(rows: Sequence[dict[str, Any]], column: str, **fixed: Any) -> dict[float, Point]:
    """Mean and standard error over seeds of a column for each sigma, of the rows with these values."""
    values: dict[float, list[float]] = {}
    for row in rows:
        if all(row[k] == v for k, v in fixed.items()) and row[column] is not None:
            values.setdefault(row["sigma"], []).append(row[column])
    return {
        sigma: Point(statistics.mean(v), statistics.stdev(v) / math.sqrt(len(v)) if len(v) > 1 else 0.0)
        for sigma, v in sorted(values.items())
    }


def bayes_accuracy(sigma: float) -> float:
    """``Phi(|mu1 - mu2| / (2 sigma))``, the accuracy of the best classifier of the toy data."""
    return 0.5 * (1 + math.erf(10 * math.sqrt(2) / (2 * sigma) / math.sqrt(2)))


def draw(folder: Path) -> list[Path]:
    """Write accuracy.png, divergence.png and posteriors.png into ``folder``, from what the study left there."""
    require("matplotlib", "train").use("Agg")
    plt = require("matplotlib.pyplot", "train")
    rows = read(folder)
    constants = sorted({row["L"] for row in rows}, key=lambda c: -1.0 if c is None else c)
    greens = plt.get_cmap("viridis")([0.15 + 0.65 * k / max(1, len(constants) - 3) for k in range(len(constants) - 2)])
    colours = dict(zip(constants, ["#6b7280", "#d97706", *greens], strict=True))
    panels = [key for key in _TITLES if any((row["setting"], row["prior"]) == key for row in rows)]
    low, high = min(row["sigma"] for row in rows), max(row["sigma"] for row in rows)

    def lines(axis: Any, column: str, key: tuple[str, str], style: str = "o-", label: bool = True) -> None:
        for k, constant in enumerate(constants):
            points = curve(rows, column, setting=key[0], prior=key[1], L=constant)
            if points and any(p.mean > 0 for p in points.values()):
                aside = (k - (len(constants) - 1) / 2) * 0.006 * (high - low)  # so that no error bar hides another
                axis.errorbar(
                    [sigma + aside for sigma in points], [p.mean for p in points.values()],
                    [p.error for p in points.values()], fmt=style, markersize=3, capsize=2, linewidth=1.2,
                    color=colours[constant], label=_name(constant) if label else None,
                )  # fmt: skip

    def figure_of(column: str, title: str, **options: Any) -> tuple[Any, Any]:
        figure, axes = plt.subplots(
            1, len(panels), figsize=(3.4 * len(panels), 3.6), squeeze=False, layout="constrained", **options
        )
        for axis, key in zip(axes[0], panels, strict=True):
            lines(axis, column, key)
            axis.set_title(_TITLES[key], fontsize=9)
            axis.set_xlabel(r"$\sigma$ of the data")
        axes[0, 0].set_ylabel(title)
        return figure, axes[0]

    def save(figure: Any, file: str, axis: Any = None) -> Path:
        if axis is not None:
            (first, *others), (name, *names) = axis.get_legend_handles_labels()  # the plain line comes first there
            figure.legend([*others, first], [*names, name], loc="outside lower center", ncols=len(constants) + 1)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=150)
        plt.close(figure)
        write_atomically(folder / file, content.getvalue())
        return folder / file

    with plt.rc_context(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    ):
        accuracy, axes = figure_of("accuracy", "accuracy of the posterior", sharey=True)
        grid = [low + (high - low) * k / 100 for k in range(101)]
        for axis in axes:
            axis.plot(grid, [bayes_accuracy(s) for s in grid], color="#dc2626", linestyle="--", label="Bayes limit")
        divergence, others = figure_of("fisher", "relative Fisher divergence")
        for axis, key in zip(others, panels, strict=True):
            lines(axis, "fisher_lower_bound", key, ":", label=False)
            axis.set_yscale("log")
        others[0].plot([], [], "k:", label="lower bound (0 for L = 0)")
        posteriors = _posteriors(plt, folder, constants)
        return [
            save(accuracy, "accuracy.png", axes[0]),
            save(divergence, "divergence.png", others[0]),
            save(posteriors, "posteriors.png"),
        ]


def _name(constant: float | None) -> str:
    return {None: "plain", 0.0: "LID (L = 0)"}.get(constant, f"IL-LID, L = {constant:g}" if constant else "")


def _posteriors(plt: Any, folder: Path, constants: Sequence[float | None]) -> Any:
    """Means of q(z|x) under the mixture prior, the prior's means with circles of two standard deviations."""
    kept = json.loads((folder / "posteriors.json").read_text())
    shown = {}
    for key, content in kept.items():
        setting, _, constant, sigma, _ = key.split("/")
        if setting == "true":
            shown[float(sigma), float(constant) if constant else None] = content
    sigmas = sorted({sigma for sigma, _ in shown})
    figure, axes = plt.subplots(
        len(sigmas), len(constants), figsize=(2.1 * len(constants), 1.65 * len(sigmas)), squeeze=False, sharex=True,
        sharey=True, layout="compressed",
    )  # fmt: skip
    for line, sigma in zip(axes, sigmas, strict=True):
        for axis, constant in zip(line, constants, strict=True):
            content = shown[sigma, constant]
            colours = ["#1e3a8a" if label else "#d97706" for label in content["labels"]]
            axis.scatter(*zip(*content["means"], strict=True), s=4, c=colours, alpha=0.6, linewidths=0)
            for mean, deviation in zip(content["components"], content["deviations"], strict=True):
                axis.plot(*mean, "k+", markersize=8)
                angles = [2 * math.pi * k / 90 for k in range(91)]
                circle = [
                    [mean[i] + 2 * deviation[i] * f(a) for a in angles] for i, f in enumerate((math.cos, math.sin))
                ]
                axis.plot(*circle, color="#9ca3af", linewidth=0.8)
            axis.set_aspect("equal")
            axis.xaxis.set_major_locator(plt.MultipleLocator(2))
        line[0].set_ylabel(rf"$\sigma = {sigma:g}$")
    for axis, constant in zip(axes[0], constants, strict=True):
        axis.set_title(_name(constant), fontsize=9)
    return figure
