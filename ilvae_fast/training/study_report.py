"""Figures and tables of a study, drawn from its files alone. A study's ``figures`` say what to draw, each with a name:

    {kind: table, rows: LABEL, columns: [MEASURE, ..]}: Markdown, mean and standard error over what differs (the seeds)
    {kind: slopes, x: MEASURE, y: [MEASURE, ..], rows: LABEL}: of log y against log x, fitted for each seed: Markdown
    {kind: against, x: MEASURE, y: [MEASURE, ..], lines: LABEL}: measures against another one; runs without x as levels;
        ``scale: log`` for logarithmic axes
    {kind: plane, x: MEASURE, y: [MEASURE, ..], lines: LABEL, points: LABEL}: paths through the points of a line
    {kind: pictures, of: samples or reconstructions, rows: LABEL}: what the runs kept
    {kind: texts}: the same of runs on text, as Markdown

``panels: LABEL`` makes one panel, or table, for each of its values; ``where: {LABEL: [..]}`` takes these runs alone.
"""

from __future__ import annotations

import io
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .._support.extras import require
from .._support.files import write_atomically
from .._support.options import check_names
from .study import records, row

TITLES = {
    "nll": "NLL [nats]", "best_nll": "NLL, best epoch [nats]", "elbo_kl": "KL [nats]", "kl_minus_mi": "KL - MI [nats]",
    "mutual_information": "MI [nats]", "active_units": "active units", "active_directions": "active directions",
    "certified": "certified L", "measured": "measured L", "fisher": "Fisher divergence", "fisher_lower_bound": "bound",
    "fisher_local_bound": "local bound", "fisher_cotangent_bound": "cotangent bound",
    "fisher_projected_residual": "projected residual", "fisher_effective_sample_size": "ESS",
    "gain": "gain [nats]", "perplexity": "perplexity",
    "clustering_accuracy": "accuracy", "clustering_majority": "majority accuracy", "components_used": "components used",
    "collapsed_0.01": "collapsed, eps 0.01", "seconds": "seconds",
}  # fmt: skip
Row = dict[str, Any]


class Mean(NamedTuple):
    """Of runs that differ in their seed alone: mean, standard error, and their number."""

    mean: float
    error: float
    number: int


def averaged(values: Sequence[float]) -> Mean:
    """Mean and standard error; of one value the error is NaN, for nothing is known of it."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Mean(statistics.mean(values), error, len(values))


def draw(folder: Path, summary: Mapping[str, Any]) -> list[Path]:
    """Write the figures that ``summary``, the study's study.json, asks for into ``folder``.

    Raises:
        FileNotFoundError, ValueError: no finished run; an unknown kind of figure.
    """
    require("matplotlib", "train").use("Agg")
    runs = records(folder, summary["names"])
    rows = [row(record) for record in runs]
    written = []
    for figure in summary["figures"]:
        kind = figure["kind"]
        check_names("figures: kind", [kind], DRAWERS)
        where = {name: set(map(str, values)) for name, values in figure.get("where", {}).items()}
        taken = [k for k, r in enumerate(rows) if all(r.get(n) in values for n, values in where.items())]
        if taken:
            content, suffix = DRAWERS[kind]([rows[k] for k in taken], [runs[k] for k in taken], figure, folder)
            path = folder / f"{figure['name']}{suffix}"
            write_atomically(path, content)
            written.append(path)
    return written


def groups(rows: Sequence[Row], label: str | None) -> dict[str, list[int]]:
    """Indices of rows by the value of a label; all of them without one."""
    found: dict[str, list[int]] = {}
    for k, r in enumerate(rows):
        found.setdefault("" if label is None else str(r.get(label, "")), []).append(k)
    return found


def cells(rows: Sequence[Row], columns: Sequence[str]) -> list[tuple[Row, dict[str, Mean]]]:
    """Rows that differ in their seed alone as one: their labels, and the mean of each column that all of them have."""
    together: dict[tuple[Any, ...], list[Row]] = {}
    for r in rows:
        labels = {k: v for k, v in r.items() if isinstance(v, str) and k not in ("seed", "commit")}
        together.setdefault(tuple(sorted(labels.items())), []).append(r)
    result = []
    for key, same in together.items():
        means = {c: averaged([r[c] for r in same]) for c in columns if all(r.get(c) is not None for r in same)}
        result.append((dict(key), means))
    return result


def _table(rows: list[Row], runs: Any, figure: Mapping[str, Any], folder: Path) -> tuple[str, str]:
    text = io.StringIO()
    columns = list(figure["columns"])
    for panel, members in groups(rows, figure.get("panels")).items():
        averages = cells([rows[k] for k in members], columns)
        shown = [c for c in columns if any(c in means for _, means in averages)]
        names = [n for n in dict.fromkeys(n for labels, _ in averages for n in labels) if n != figure.get("panels")]
        names = [n for n in (figure["rows"], *names) if n in names]
        names = list(dict.fromkeys(names))
        if panel:
            text.write(f"## {panel}\n\n")
        text.write(_line([*names, "runs", *(TITLES.get(c, c) for c in shown)]))
        text.write(_line(["---"] * (len(names) + 1 + len(shown))))
        for labels, means in averages:
            count = str(max((m.number for m in means.values()), default=0))
            text.write(_line([*(labels.get(n, "") for n in names), count, *(_cell(means.get(c)) for c in shown)]))
        text.write("\n")
    return text.getvalue().rstrip("\n") + "\n", ".md"


def _slopes(rows: list[Row], runs: Any, figure: Mapping[str, Any], folder: Path) -> tuple[str, str]:
    x, ys, label = figure["x"], list(figure["y"]), figure["rows"]
    text = io.StringIO()
    text.write(_line([label, "seeds", *(f"slope of {TITLES.get(y, y)}" for y in ys)]))
    text.write(_line(["---"] * (2 + len(ys))))
    for name, members in groups(rows, label).items():
        seeds = groups([rows[k] for k in members], "seed")
        fitted: dict[str, list[float]] = {y: [] for y in ys}
        for chosen in seeds.values():
            these = [rows[members[k]] for k in chosen]
            for y in ys:
                pairs = [(r[x], r[y]) for r in these if (r.get(x) or 0) > 0 and (r.get(y) or 0) > 0]
                if len(pairs) > 1:
                    fitted[y].append(statistics.linear_regression(*np.log(pairs).T.tolist()).slope)
        text.write(_line([name, str(len(seeds)), *(_cell(averaged(v)) if v else "" for v in fitted.values())]))
    return text.getvalue(), ".md"


def _line(entries: Sequence[str]) -> str:
    return f"| {' | '.join(entries)} |\n"


def _cell(mean: Mean | None) -> str:
    if mean is None:
        return ""
    exact = not mean.error > 1e-9 * abs(mean.mean)  # one run, or one value but for rounding
    return f"{mean.mean:.4g}" if exact else f"{mean.mean:.4g} ± {mean.error:.2g}"


def _saved(plt: Any, figure: Any) -> tuple[bytes, str]:
    content = io.BytesIO()
    figure.savefig(content, dpi=130, format="png", metadata={"Software": None})
    plt.close(figure)
    return content.getvalue(), ".png"


Averages = list[tuple[Row, dict[str, Mean]]]
DrawLine = Callable[[Any, Averages, str, str, str], None]  # axis, the line's cells, y, colour, name


def _curves(rows: Sequence[Row], figure: Mapping[str, Any], draw_line: DrawLine) -> tuple[bytes, str]:
    """A column of axes for each panel, one for each y, with one line for each value of ``lines``."""
    x, ys = figure["x"], list(figure["y"])
    panels = groups(rows, figure.get("panels"))
    plt = require("matplotlib.pyplot", "train")
    picture, axes = plt.subplots(
        len(ys), len(panels), figsize=(3.6 * len(panels), 2.5 * len(ys)), squeeze=False, layout="constrained"
    )
    for column, (panel, members) in enumerate(panels.items()):
        lines: dict[str, Averages] = {}
        for labels, means in cells([rows[k] for k in members], [x, *ys]):
            lines.setdefault(str(labels.get(figure.get("lines", ""), "")), []).append((labels, means))
        for axis, y in zip(axes[:, column], ys, strict=True):
            for number, (name, found) in enumerate(lines.items()):
                draw_line(axis, found, y, f"C{number}", name)
            axis.set_ylabel(TITLES.get(y, y) if column == 0 else "")
            axis.grid(alpha=0.3)
        axes[0][column].set_title(panel)
        axes[-1][column].set_xlabel(TITLES.get(x, x))
    axes[0][0].legend(fontsize=7)
    return _saved(plt, picture)


def _against(rows: list[Row], runs: Any, figure: Mapping[str, Any], folder: Path) -> tuple[bytes, str]:
    x = figure["x"]

    def draw_line(axis: Any, found: Averages, y: str, colour: str, name: str) -> None:
        points = sorted((m[x].mean, m[y]) for _, m in found if x in m and y in m)
        axis.errorbar(
            [at for at, _ in points], [m.mean for _, m in points], [m.error for _, m in points], fmt="o-",
            markersize=3, capsize=2, linewidth=1.2, color=colour, label=name or "Brenier decoder",
        )  # fmt: skip
        for labels, means in found:
            if x not in means and y in means:
                level, label = means[y], f"{name} {labels.get('model', 'no L')}".strip()
                axis.axhline(level.mean, color=colour, linestyle="--", linewidth=1, label=label)
                if not math.isnan(level.error):
                    axis.axhspan(level.mean - level.error, level.mean + level.error, color=colour, alpha=0.15)
        if figure.get("scale") == "log":
            axis.set_xscale("log")
            axis.set_yscale("log")
        else:
            axis.set_xscale("symlog", linthresh=0.1)
            axis.set_xlim(left=0)

    return _curves(rows, figure, draw_line)


def _plane(rows: list[Row], runs: Any, figure: Mapping[str, Any], folder: Path) -> tuple[bytes, str]:
    x = figure["x"]

    def draw_line(axis: Any, found: Averages, y: str, colour: str, name: str) -> None:
        points = [(m[x], m[y], labels.get(figure.get("points", ""), "")) for labels, m in found if x in m and y in m]
        points.sort(key=lambda point: point[0].mean)
        axis.errorbar(
            [at.mean for at, _, _ in points], [m.mean for _, m, _ in points], [m.error for _, m, _ in points],
            [at.error for at, _, _ in points], fmt="o-" if len(points) > 1 else "*", markersize=4, linewidth=1.2,
            color=colour, label=name,
        )  # fmt: skip
        for at, m, text in points:
            offset = {"textcoords": "offset points", "xytext": (3, 3)}
            axis.annotate(text, (at.mean, m.mean), fontsize=5, color=colour, **offset)

    return _curves(rows, figure, draw_line)


def _pictures(rows: list[Row], runs: Any, figure: Mapping[str, Any], folder: Path) -> tuple[bytes, str]:
    """One strip of pictures for each run that kept some: samples, of a mixture one line for a component."""
    kept: dict[str, list[tuple[str, np.ndarray]]] = {}
    for r, path in zip(rows, _kept_of(runs, folder), strict=True):
        if path is None:
            continue
        with np.load(path, allow_pickle=False) as arrays:
            wanted, data = arrays[figure["of"]], arrays["data"]
        panel = str(r.get(figure.get("panels", ""), ""))
        strips = kept.setdefault(panel, [])
        if figure["of"] == "reconstructions" and not strips:
            strips.append(("data", data))
        strips.append((str(r[figure["rows"]]), wanted))
    plt = require("matplotlib.pyplot", "train")
    if not kept:
        raise FileNotFoundError(
            f"results: no run in {os.fspath(folder)!r} kept pictures; the study's keep says which do"
        )
    lines = max(len(strips) for strips in kept.values())
    tall = max(1.0, max(_sheet(p).shape[0] / p.shape[-2] for strips in kept.values() for _, p in strips) / 3)
    picture, axes = plt.subplots(
        lines, len(kept), figsize=(4.2 * len(kept), 0.62 * lines * tall), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for column, (panel, strips) in enumerate(kept.items()):
        for k, (name, pictures) in enumerate(strips):
            axis = axes[k][column]
            axis.imshow(_sheet(pictures), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_title(f"{panel}: {name}" if k == 0 and panel else name, fontsize=7, loc="left", pad=1)
    return _saved(plt, picture)


def _kept_of(runs: Sequence[Mapping[str, Any]], folder: Path) -> list[Path | None]:
    paths = [folder / "runs" / f"{record['name']}.npz" for record in runs]
    return [path if path.is_file() else None for path in paths]


def _sheet(pictures: np.ndarray) -> np.ndarray:
    """(n, h, w) side by side, up to twelve; (K, n, h, w) with a line for each of the first axis."""
    grid = pictures[None] if pictures.ndim == 3 else pictures
    grid = grid[:, :12]
    count, n, height, width = grid.shape
    return grid.transpose(0, 2, 1, 3).reshape(count * height, n * width)


def _texts(rows: list[Row], runs: Any, figure: Mapping[str, Any], folder: Path) -> tuple[str, str]:
    text = io.StringIO()
    for record in runs:
        if "texts" in record:
            labels = ", ".join(f"{name} {value}" for name, value in record["labels"].items())
            text.write(f"## {labels}\n\n")
            texts = record["texts"]
            for title in ("samples", "interpolation"):
                text.write(f"{title}:\n\n" + "".join(f"    {line}\n" for line in texts[title]) + "\n")
            text.write("data, and its reconstruction:\n\n")
            for line, again in zip(texts["data"], texts["reconstructions"], strict=True):
                text.write(f"    {line}\n    -> {again}\n")
            text.write("\n")
    return text.getvalue().rstrip("\n") + "\n", ".md"


DRAWERS: dict[str, Callable[[list[Row], Any, Mapping[str, Any], Path], tuple[bytes | str, str]]] = {
    "table": _table,
    "against": _against,
    "plane": _plane,
    "slopes": _slopes,
    "pictures": _pictures,
    "texts": _texts,
}
