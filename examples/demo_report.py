"""Tables, figures and the page of the demo, all from its record of numbers (the content of metrics.json)."""

from __future__ import annotations

import base64
import html as markup
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

COLUMNS_OF_IMAGES = 12
ACTIVE = 0.01  # the threshold of Var_x E_q[z], as in metrics.active_units

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "axes.edgecolor": "#9ca3af",
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.dpi": 150,
}
_GREY, _ORANGE, _DARK = "#6b7280", "#d97706", "#1e3a8a"


class Column(NamedTuple):
    """One column of the results: its heading, how a model's result becomes a cell, and what it means."""

    heading: str
    cell: Callable[[Mapping[str, Any]], str]
    meaning: str


def _number(key: str, digits: int) -> Callable[[Mapping[str, Any]], str]:
    return lambda result: "-" if result[key] is None else f"{result[key]:.{digits}f}"


def _constant(result: Mapping[str, Any]) -> str:
    return "-" if result["L"] is None else f"{result['L']:g}"


COLUMNS = (
    Column("model", lambda result: result["label"], ""),
    Column("L", _constant, "the constant asked for, L = L1 L2 with L1 = L2"),
    Column("test NLL", _number("nll", 2), "importance-weighted negative log-likelihood of a test datum, nats"),
    Column("KL", _number("kl", 2), "of the approximate posterior from the prior, nats"),
    Column(
        "active units",
        lambda result: f"{result['active_units']}/{len(result['variances'])}",
        "latents whose posterior mean varies over the test data by a variance of at least 0.01",
    ),
    Column("rel. Fisher", _number("fisher", 2), "relative Fisher divergence of the true posterior from the prior"),
    Column("lower bound", _number("fisher_lower_bound", 2), "what the certified constant guarantees of it"),
    Column("ESS", _number("effective_sample_size", 1), "effective sample size of that estimate, mean over the data"),
    Column("cert. L", _number("certified", 3), "inverse-Lipschitz constant by construction"),
    Column("meas. L", _number("measured", 3), "smallest singular value of the decoder's Jacobian that was seen"),
    Column("fused ms", _number("step_ms_fused", 2), "median time of a training step by the fused operators"),
    Column(
        "autograd ms",
        _number("step_ms_autograd", 2),
        "the same by autograd, for the Brenier maps by double backward; both in turns, in this run",
    ),
)
# for the page alone
_SQUARED_ERROR = Column("squared error", _number("squared_error", 2), "of a test datum's reconstruction")


def table(record: Mapping[str, Any]) -> Table:
    """The results for the terminal."""
    settings = record["settings"]
    title = f"{settings['dataset']}, {settings['latent_dim']} latents, Gaussian with sigma = {settings['scale']:g}"
    result = Table(title=title, box=SIMPLE_HEAD, padding=0, show_edge=False, title_justify="left")
    for column in COLUMNS:
        left = column.heading == "model"
        # one word to a line: the columns are as narrow as their numbers, and rich leaves out what does not fit
        heading = column.heading.replace(" ", "\n")
        result.add_column(heading, justify="left" if left else "right", no_wrap=True, vertical="bottom")
    for model in record["models"]:
        result.add_row(*(column.cell(model) for column in COLUMNS))
    return result


def verdict(record: Mapping[str, Any]) -> str:
    """Whether the setting shows what it was chosen for."""
    collapse, epochs = record["collapse"], record["settings"]["epochs"]
    counted = f"{collapse['active_units_of_vae']} of its {collapse['latent_dim']} latents after {epochs} epochs"
    if collapse["visible"]:
        return f"The plain VAE collapses: it uses {counted}, at most a quarter."
    return f"The plain VAE does NOT visibly collapse here: it uses {counted}, more than a quarter."


def _name(result: Mapping[str, Any]) -> str:
    return result["label"] + (f"\nL = {result['L']:g}" if result["L"] else "")


def _colours(results: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Grey and orange for VAE and LIDVAE, blues that darken with L."""
    count = len(results) - 2
    blues = plt.get_cmap("Blues")(np.linspace(0.5, 0.95, count) if count > 1 else [0.8])
    return [_GREY, _ORANGE, *blues]


def _latent_use(record: Mapping[str, Any]) -> Figure:
    results = record["models"]
    figure, axes = plt.subplots(
        2, len(results), figsize=(2.1 * len(results), 4.2), sharex=True, sharey="row", layout="constrained"
    )
    units = np.arange(1, record["settings"]["latent_dim"] + 1)
    axes[0, 0].set_xticks(np.unique(np.linspace(1, len(units), 4).round().astype(int)))
    floor = 1e-6
    for column, (result, colour) in enumerate(zip(results, _colours(results), strict=True)):
        kl = np.array(result["kl_per_dimension"])
        order = np.argsort(-kl)
        top, bottom = axes[:, column]
        top.bar(units, kl[order], color=colour, width=0.8)
        top.set_title(_name(result) if result["L"] else _name(result) + "\n", fontsize=9)
        variances = np.maximum(np.array(result["variances"])[order], floor)  # a logarithmic axis has no 0
        bottom.bar(units, variances - floor, bottom=floor, color=colour, width=0.8)
        bottom.axhline(ACTIVE, color="#dc2626", linewidth=1, linestyle=(0, (4, 2)))
        bottom.set_yscale("log")
        bottom.set_ylim(floor, 10)
        bottom.text(
            0.97, 0.97, f"{result['active_units']} active", transform=bottom.transAxes, ha="right", va="top", fontsize=8
        )
        top.tick_params(length=0)
        bottom.tick_params(length=0)
    axes[0, 0].set_ylabel("KL (nats)")
    axes[1, 0].set_ylabel(r"Var$_x$ E$_q$[z]")
    figure.supxlabel("latent, in the order of its KL", fontsize=9, color="#4b5563")
    return figure


def _rows_of_images(rows: Sequence[tuple[str, Tensor]], shape: tuple[int, ...]) -> Figure:
    """One labelled row of grey images each; values outside [0, 1] are clipped."""
    count, labels, side = len(rows[0][1]), 0.95, 0.66  # inches
    width = labels + side * count
    figure, axes = plt.subplots(
        len(rows), count, figsize=(width, side * len(rows)), gridspec_kw={"wspace": 0.08, "hspace": 0.08}
    )
    figure.subplots_adjust(left=labels / width, right=0.995, top=0.99, bottom=0.01)
    for line, (label, images) in zip(axes, rows, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.reshape(shape).numpy(), cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            for spine in axis.spines.values():
                spine.set(visible=True, color="#e5e7eb")
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=8, fontsize=8)
    return figure


def _against_constant(record: Mapping[str, Any]) -> Figure:
    vae, *brenier = record["models"]
    constants = [result["L"] for result in brenier]
    figure, axes = plt.subplots(2, 3, figsize=(10.5, 5.4))

    def draw(axis: Axes, key: str, colour: str = _DARK, label: str | None = None, style: str = "-") -> None:
        values = [result[key] for result in brenier]
        axis.plot(constants, values, style, color=colour, marker="o", markersize=4, label=label)
        if vae[key] is not None and style == "-":
            axis.axhline(vae[key], color=_GREY, linewidth=1, linestyle=(0, (4, 2)), label="VAE (no constant)")

    figure.set_layout_engine("constrained", hspace=0.08)
    panels = zip(
        axes.flat,
        (
            "active units",
            "KL (nats)",
            "test NLL (nats)",
            "relative Fisher divergence",
            r"the bound's other factor, E|$\Pi$ s|$^2$",
            "inverse-Lipschitz constant",
        ),
        strict=True,
    )
    for axis, title in panels:
        axis.set_title(title)
        axis.set_xticks(constants, [f"{constant:g}" for constant in constants])
        axis.set_xlim(-0.04 * max(constants), 1.04 * max(constants))
    active, kl, nll, fisher, residual, constant = axes.flat
    draw(active, "active_units")
    active.set_ylim(0, record["settings"]["latent_dim"] * 1.06)
    draw(kl, "kl")
    draw(nll, "nll")
    draw(fisher, "fisher", label="divergence")
    draw(fisher, "fisher_lower_bound", _ORANGE, "lower bound", "--")
    draw(residual, "fisher_projected_residual")
    draw(constant, "measured", label="measured")
    draw(constant, "certified", _ORANGE, "certified", "--")
    for axis in (kl, fisher, residual, constant):
        axis.set_ylim(bottom=0)
    for axis in axes.flat:
        axis.legend()
    for axis in axes[1]:
        axis.set_xlabel("L (0 is LIDVAE)")
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def draw(
    record: Mapping[str, Any], images: Sequence[Mapping[str, Tensor]], originals: Tensor, shape: tuple[int, ...]
) -> dict[str, bytes]:
    """The figures as PNG, by file name. images: each model's reconstructions of ``originals``, and samples."""
    names = [_name(result) for result in record["models"]]
    rows = {
        kind: [(name, model[kind]) for name, model in zip(names, images, strict=True)]
        for kind in ("reconstructions", "samples")
    }
    with plt.rc_context(_STYLE):
        return {
            "latent_use.png": _png(_latent_use(record)),
            "collapse.png": _png(_against_constant(record)),
            "reconstructions.png": _png(_rows_of_images([("test data", originals), *rows["reconstructions"]], shape)),
            "samples.png": _png(_rows_of_images(rows["samples"], shape)),
        }


_CAPTIONS = {
    "latent_use.png": (
        "Use of each latent",
        "Above, what each latent contributes to the KL of posterior and prior. Below, how much its posterior mean "
        "varies over the test data; a latent under the dashed line (0.01) does not count as active.",
    ),
    "collapse.png": (
        "Collapse against L",
        "The lower bound of the divergence is L² E|Π s|², with the certified L, the likelihood's score s = (x - f)/σ² "
        "and its projection Π on the range of the decoder's Jacobian. The factor E|Π s|² changes with L too, so the "
        "bound is not L² times a constant. The divergence sums over latents: a few that are used much can outweigh "
        "many that are used a little. The measured constant is a minimum over latents that were looked at.",
    ),
    "reconstructions.png": (
        "Reconstructions",
        "Test data and the mean of p(x|z) at the mean of q(z|x). A collapsed latent has nothing to add to them.",
    ),
    "samples.png": (
        "Samples",
        "The mean of p(x|z) for latents of the prior, the same latents in every row, clipped to [0, 1]. The decoder "
        "must spread every latent by at least L: where the data vary less than that, its samples leave the data.",
    ),
}

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  :root {{ color-scheme: light; }}
  body {{ margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 62rem; background: #fff; color: #1f2937;
         font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }}
  h1 {{ margin: 0 0 .3rem; font-size: 1.7rem; line-height: 1.2; }}
  h2 {{ margin: 2.6rem 0 .4rem; font-size: 1.15rem; }}
  p {{ margin: .4rem 0 .8rem; max-width: 46rem; }}
  .lead {{ color: #4b5563; }}
  .verdict {{ margin: 1.2rem 0; padding: .7rem 1rem; border-left: 4px solid {accent}; background: #f9fafb; }}
  .scroll {{ overflow-x: auto; }}
  table {{ border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }}
  th, td {{ padding: .4rem .6rem; text-align: right; border-bottom: 1px solid #e5e7eb; white-space: nowrap; }}
  thead th {{ vertical-align: bottom; white-space: normal; color: #4b5563; border-bottom: 2px solid #9ca3af; }}
  th:first-child, td:first-child {{ text-align: left; }}
  tbody td:first-child {{ font-weight: 600; }}
  dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .84rem; color: #4b5563; }}
  dt {{ font-weight: 600; }}
  dd {{ margin: 0; overflow-wrap: anywhere; }}
  img {{ display: block; max-width: 100%; height: auto; }}
  code {{ font-size: .92em; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="lead">{lead}</p>
<p class="verdict">{verdict}</p>
<div class="scroll"><table>
<thead><tr>{headings}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
<dl>{meanings}</dl>
{figures}
<h2>How it was made</h2>
<dl>{settings}</dl>
</body>
</html>
"""


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    return "".join(f"<dt>{markup.escape(term)}</dt><dd>{markup.escape(text)}</dd>" for term, text in pairs)


def html(record: Mapping[str, Any], figures: Mapping[str, bytes]) -> str:
    """A page with the results and figures that needs no other file."""
    columns = [*COLUMNS[:4], _SQUARED_ERROR, *COLUMNS[4:]]
    settings = record["settings"]
    rows = ("".join(f"<td>{markup.escape(c.cell(result))}</td>" for c in columns) for result in record["models"])
    sections = []
    for name, (heading, caption) in _CAPTIONS.items():
        source = f"data:image/png;base64,{base64.b64encode(figures[name]).decode()}"
        sections.append(
            f'<h2>{heading}</h2>\n<p>{markup.escape(caption)}</p>\n<img alt="{markup.escape(heading)}" src="{source}">'
        )
    versions = {k: v for k, v in record["versions"].items() if k != "build"}
    build = {f"build: {k}": v for k, v in record["versions"]["build"].items()}
    made = {"command": record["command"], "seconds": f"{record['seconds']:.0f}", **settings, **versions, **build}
    return _PAGE.format(
        title="Posterior collapse and the inverse-Lipschitz decoder",
        lead=markup.escape(
            f"{settings['dataset']}, {settings['latent_dim']} latents, Gaussian likelihood with sigma = "
            f"{settings['scale']:g}, {settings['epochs']} epochs; one setting for all models, one seed."
        ),
        accent="#2563eb" if record["collapse"]["visible"] else "#dc2626",
        verdict=markup.escape(verdict(record)),
        headings="".join(f"<th>{markup.escape(column.heading)}</th>" for column in columns),
        rows="\n".join(f"<tr>{row}</tr>" for row in rows),
        meanings=_pairs([(column.heading, column.meaning) for column in columns if column.meaning]),
        figures="\n".join(sections),
        settings=_pairs([(str(name), str(value)) for name, value in made.items()]),
    )
