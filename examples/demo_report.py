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
from matplotlib.patches import Patch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

COLUMNS_OF_IMAGES = 12
_SAME = 0.1  # nats, about two standard errors of what z was sampled for on the test data
ACTIVE = 0.01  # the threshold of metrics.active_directions

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
_GREY, _ORANGE, _RED, _INK = "#6b7280", "#d97706", "#dc2626", "#374151"


class Column(NamedTuple):
    """One column of the results: its heading, how a model's result becomes a cell, and what it means."""

    heading: str
    cell: Callable[[Mapping[str, Any]], str]
    meaning: str


def _number(key: str, digits: int) -> Callable[[Mapping[str, Any]], str]:
    return lambda result: "-" if result[key] is None else f"{result[key]:.{digits}f}"


def _of(count: str, values: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda result: f"{result[count]}/{len(result[values])}"


def _constant(result: Mapping[str, Any]) -> str:
    return "-" if result["L"] is None else f"{result['L']:g}"


COLUMNS = (
    Column("model", lambda result: result["label"], ""),
    Column("L", _constant, "the constant asked for, L = L1 L2 with L1 = L2"),
    Column(
        "NLL", _number("nll", 2), "importance-weighted negative log-likelihood of a test datum, nats; less is better"
    ),
    Column("gain", _number("gain", 2), "nats by which the ELBO beats the best model that ignores z"),
    Column("KL", _number("elbo_kl", 2), "of the approximate posterior from the prior, nats"),
    Column(
        "MI",
        _number("mutual_information", 2),
        "the part of it that is information about x, at most log N of N test data",
    ),
    Column("KL - MI", _number("kl_minus_mi", 2), "the rest, which says nothing about x; near log N an upper bound"),
    Column(
        "active units",
        _of("active_units", "latent_variances"),
        f"latents whose posterior mean varies over the test data by a variance of at least {ACTIVE}",
    ),
    Column(
        "active directions",
        _of("active_directions", "direction_variances"),
        "the same along the principal directions of the posterior means, however the latent space is rotated",
    ),
    Column("rel. Fisher", _number("fisher", 2), "relative Fisher divergence of the true posterior from the prior"),
    Column("lower bound", _number("fisher_lower_bound", 2), "what the certified constant guarantees of it"),
    Column("cert. L", _number("certified", 3), "inverse-Lipschitz constant by construction"),
    Column("meas. L", _number("measured", 3), "smallest singular value of the decoder's Jacobian that was seen"),
    Column("fused ms", _number("step_ms_fused", 2), "median time of a training step by the fused operators"),
    Column(
        "autograd ms",
        _number("step_ms_autograd", 2),
        "the same by autograd, for the Brenier maps by double backward; both in turns, in this run",
    ),
)


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


def warnings(record: Mapping[str, Any]) -> list[str]:
    """What :func:`ilvae_fast.metrics.diagnose` says about the models, a line each."""
    return [f"{_title(model)}: {warning}" for model in record["models"] for warning in model.get("warnings", ())]


class Finding(NamedTuple):
    """Whether the run shows what the setting was chosen for, and what it shows."""

    shown: bool
    text: str


def findings(record: Mapping[str, Any]) -> list[Finding]:
    """What matters, from the numbers alone: the VAE's collapse, the cure by advice, and what a larger L does."""
    vae, lidvae, *brenier = record["models"]
    advised = next(model for model in brenier if model["advised"])
    payable, high = payable_latents(record), record["advice"]["high"]
    return [
        _collapse(vae, payable),
        _cure(advised, vae, lidvae, payable),
        *(_excess(model, advised, high) for model in brenier if model["L"] > high and model is not advised),
    ]


def payable_latents(record: Mapping[str, Any]) -> int:
    """Of those that the models have."""
    return min(record["advice"]["payable"], record["settings"]["latent_dim"])


def _collapse(vae: Mapping[str, Any], payable: int) -> Finding:
    used = vae["active_directions"]
    if collapsed := used <= payable / 2:
        judged = "it collapses"
    elif used < payable:
        judged = "that is more than half of them, hardly a collapse"
    else:
        judged = "it does NOT collapse here"
    return Finding(
        collapsed, f"The data can pay for {payable} latents. The plain VAE uses {_directions(used)}: {judged}."
    )


def _cure(advised: Mapping[str, Any], vae: Mapping[str, Any], lidvae: Mapping[str, Any], payable: int) -> Finding:
    used = advised["active_directions"]
    as_good = vae["nll"] - advised["nll"] > -_SAME and advised["gain"] - vae["gain"] > -_SAME
    text = (
        f"{_title(advised)}, as advised, uses {_directions(used)}. {_against(advised, vae)} {_against(advised, lidvae)}"
    )
    if advised["gain"] <= 0:
        text += " A model that ignores z would do as well."
    return Finding(used >= payable and as_good and advised["gain"] > 0, text)


def _against(model: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    def compared(name: str, better_by: float, better: str, worse: str) -> str:
        if abs(better_by) < _SAME:
            return f"{name} is the same within {_SAME} nats"
        return f"{name} is {abs(better_by):.2f} nats {better if better_by > 0 else worse}"

    fit = compared("NLL", other["nll"] - model["nll"], "better", "WORSE")
    gain = compared("gain", model["gain"] - other["gain"], "larger", "SMALLER")
    guarantee = ", whose L is 0" if other["L"] == 0 else ""
    return f"Against {_title(other)}{guarantee}: {fit}, {gain}."


def _excess(model: Mapping[str, Any], advised: Mapping[str, Any], high: float) -> Finding:
    worse = model["gain"] < advised["gain"] and model["nll"] > advised["nll"]
    compared = ", ".join(
        f"{name} {model[key]:.1f} (there {advised[key]:.1f})"
        for name, key in (("KL", "elbo_kl"), ("MI", "mutual_information"), ("gain", "gain"))
    )
    judged = "larger is not better" if worse else "here that is NOT worse"
    return Finding(
        worse,
        f"{_title(model)}, {model['L'] / high:.2g} times the upper end of the advised range: {compared}; {judged}.",
    )


def verdict(record: Mapping[str, Any]) -> list[str]:
    """The findings, a paragraph each."""
    return [finding.text for finding in findings(record)]


def _directions(count: int) -> str:
    return f"{count} direction" + ("" if count == 1 else "s")


def _title(result: Mapping[str, Any]) -> str:
    return result["label"] + (f" with L = {result['L']:g}" if result["L"] else "")


def _name(result: Mapping[str, Any]) -> str:
    return result["label"] + (f"\nL = {result['L']:g}" if result["L"] else "")


def _colours(results: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Grey and orange for VAE and LIDVAE, blues that darken with L."""
    count = len(results) - 2
    blues = plt.get_cmap("Blues")(np.linspace(0.5, 0.95, count) if count > 1 else [0.8])
    return [_GREY, _ORANGE, *blues]


def _directions_of(record: Mapping[str, Any]) -> Figure:
    results, colours = record["models"], _colours(record["models"])
    figure, axes = plt.subplots(
        1, len(results), figsize=(10.2, 2.7), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    latents = np.arange(1, record["settings"]["latent_dim"] + 1)
    floor = 1e-5
    for axis, result, colour in zip(axes[0], results, colours, strict=True):
        variances = np.maximum(np.array(result["direction_variances"]), floor)  # a logarithmic axis has no 0
        axis.bar(latents, variances - floor, bottom=floor, color=colour, width=0.8)
        axis.axhline(ACTIVE, color=_RED, linewidth=1, linestyle=(0, (4, 2)))
        axis.set(yscale="log", ylim=(floor, 10), xticks=latents[:: max(1, len(latents) // 5)])
        axis.set_title(_name(result).replace("\n", ", "), fontsize=9)
        axis.text(0.97, 0.97, f"{result['active_directions']} active", transform=axis.transAxes, ha="right", va="top")
        axis.tick_params(length=0)
    axes[0, 0].set_ylabel("variance of the posterior mean")
    figure.supxlabel("direction of the latent space", fontsize=9, color=_INK)
    return figure


def _comparison(record: Mapping[str, Any]) -> Figure:
    results, colours = record["models"], _colours(record["models"])
    figure, axes = plt.subplots(1, 4, figsize=(10.2, 3.0), layout="constrained")
    places = np.arange(len(results))

    def bars(axis: Axes, title: str, values: Sequence[float], digits: int) -> None:
        drawn = axis.bar(places, values, color=colours, width=0.72)
        axis.bar_label(drawn, [f"{value:.{digits}f}" for value in values], padding=2, fontsize=8, color=_INK)
        axis.set_title(title)
        axis.axhline(0, color="#9ca3af", linewidth=0.8)
        axis.margins(y=0.12)

    directions, gain, nll, information = axes
    bars(directions, "active directions", [result["active_directions"] for result in results], 0)
    payable = payable_latents(record)
    directions.axhline(payable, color=_RED, linewidth=1, linestyle=(0, (4, 2)), label="the data can pay for")
    directions.set_ylim(0, 1.3 * max(payable, *(result["active_directions"] for result in results)))
    bars(gain, "gain (nats)", [result["gain"] for result in results], 1)
    bars(nll, "test NLL (nats)", [result["nll"] for result in results], 1)
    rest = [max(0.0, result["kl_minus_mi"]) for result in results]
    known = [result["mutual_information"] for result in results]
    information.bar(places, known, color=colours, width=0.72, label="information about x (MI)")
    information.bar(
        places, rest, bottom=known, width=0.72, color="#fff", edgecolor=colours, hatch="/////", linewidth=0.8,
        label="the rest (KL - MI)",
    )  # fmt: skip
    information.set_title("KL (nats)")
    for axis in (directions, information):
        axis.legend(loc="upper left", handlelength=1.4)
    information.set_ylim(0, 1.35 * max(result["elbo_kl"] for result in results))
    for axis in axes:
        axis.set_xticks([])
    figure.legend(
        handles=[Patch(color=colour, label=_title(model)) for model, colour in zip(results, colours, strict=True)],
        loc="outside lower center",
        ncols=len(results),
    )
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
            "comparison.png": _png(_comparison(record)),
            "directions.png": _png(_directions_of(record)),
            "reconstructions.png": _png(_rows_of_images([("test data", originals), *rows["reconstructions"]], shape)),
            "samples.png": _png(_rows_of_images(rows["samples"], shape)),
        }


_CAPTIONS = {
    "comparison.png": (
        "What each model makes of its latent",
        "Gain: the nats by which the ELBO beats the best model that ignores its latent. Where it is negative, the "
        "latent costs more than it explains. KL is that cost, and only the filled part of it is information about the "
        "data. Of the NLL less is better.",
    ),
    "directions.png": (
        "Directions in use",
        "The variance of the posterior mean over the test data, along its principal directions. A direction under the "
        "dashed line (0.01) is not used.",
    ),
    "reconstructions.png": (
        "Reconstructions",
        "Test data and the mean of p(x|z) at the mean of q(z|x). A collapsed latent has nothing to add to them.",
    ),
    "samples.png": (
        "Samples",
        "The mean of p(x|z) for latents of the prior, the same latents in every row, clipped to [0, 1]. With "
        "too large an L the decoder must move further than the data vary, and its samples leave them.",
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
  .finding, .warning {{ margin: .5rem 0; padding: .55rem 1rem; max-width: none; border-left: 4px solid #2563eb;
                       background: #f9fafb; }}
  .missed {{ border-color: #dc2626; }}
  .warning {{ border-color: #d97706; font-size: .9rem; }}
  .scroll {{ overflow-x: auto; }}
  table {{ border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }}
  th, td {{ padding: .4rem .42rem; text-align: right; border-bottom: 1px solid #e5e7eb; white-space: nowrap; }}
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
{verdict}
<h2>What L suits the data</h2>
<p>{advice}</p>
{advice_picture}
<h2>Measured on the test data</h2>
<div class="scroll"><table>
<thead><tr>{headings}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
{warnings}
<dl>{meanings}</dl>
{figures}
<h2>How it was made</h2>
<dl>{settings}</dl>
</body>
</html>
"""


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    return "".join(f"<dt>{markup.escape(term)}</dt><dd>{markup.escape(text)}</dd>" for term, text in pairs)


def _picture(name: str, alternative: str, figures: Mapping[str, bytes]) -> str:
    source = f"data:image/png;base64,{base64.b64encode(figures[name]).decode()}"
    return f'<img alt="{markup.escape(alternative)}" src="{source}">'


def html(record: Mapping[str, Any], figures: Mapping[str, bytes]) -> str:
    """A page with the results and figures that needs no other file."""
    settings = record["settings"]
    rows = ("".join(f"<td>{markup.escape(c.cell(result))}</td>" for c in COLUMNS) for result in record["models"])
    sections = [
        f"<h2>{heading}</h2>\n<p>{markup.escape(caption)}</p>\n{_picture(name, heading, figures)}"
        for name, (heading, caption) in _CAPTIONS.items()
    ]
    paragraphs = [
        f'<p class="{"finding" if finding.shown else "finding missed"}">{markup.escape(finding.text)}</p>'
        for finding in findings(record)
    ]
    versions = {k: v for k, v in record["versions"].items() if k != "build"}
    build = {f"build: {k}": v for k, v in record["versions"]["build"].items()}
    made = {"command": record["command"], "seconds": f"{record['seconds']:.0f}", **settings, **versions, **build}
    return _PAGE.format(
        title="Posterior collapse and the inverse-Lipschitz decoder",
        lead=markup.escape(
            f"{settings['dataset']}, {settings['latent_dim']} latents, Gaussian likelihood with sigma = "
            f"{settings['scale']:g}, {settings['epochs']} epochs; one setting for all models, one seed."
        ),
        verdict="\n".join(paragraphs),
        advice=markup.escape(record["advice"]["text"]),
        advice_picture=_picture("advice.png", "Principal deviations of the data, and what L costs", figures),
        headings="".join(f"<th>{markup.escape(column.heading)}</th>" for column in COLUMNS),
        rows="\n".join(f"<tr>{row}</tr>" for row in rows),
        warnings="\n".join(f'<p class="warning">{markup.escape(warning)}</p>' for warning in warnings(record)),
        meanings=_pairs([(column.heading, column.meaning) for column in COLUMNS if column.meaning]),
        figures="\n".join(sections),
        settings=_pairs([(str(name), str(value)) for name, value in made.items()]),
    )
