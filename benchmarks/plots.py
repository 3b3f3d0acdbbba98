"""Pictures of a result of the suite: a roofline and a bar chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

INK = "#333333"


def draw(result: dict[str, Any], stem: Path) -> list[Path]:
    """Draw ``stem-roofline.png`` and ``stem-peers.png`` from the result alone."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
    paths = []

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    peak, copy = result["matmul_ceiling"] / 1e9, result["copy_ceiling"] / 1e9
    intensity = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(*intensity, peak / copy) / 3, max(*intensity, peak / copy) * 3
    axes.plot([low, peak / copy, high], [low * copy, peak, peak], color=INK, lw=1.5)
    axes.text(high, peak * 1.05, f"measured matmul ceiling {peak:.0f} GF/s", ha="right", va="bottom", color=INK)
    axes.text(low, low * copy * 0.85, f"measured copy ceiling {copy:.0f} GB/s", va="top", color=INK)
    for label, colour, marker in (("ours", "#c1432e", "o"), ("best peer", "#4a7fb5", "s")):
        times = [row["milliseconds"][row["best_peer"] if label == "best peer" else "ours"] for row in rows]
        rates = [row["flops"] / (t * 1e-3) / 1e9 for row, t in zip(rows, times, strict=True)]
        axes.scatter(intensity, rates, color=colour, marker=marker, label=label, zorder=3)
    for k, row in enumerate(rows):
        rate = row["flops"] / (row["milliseconds"]["ours"] * 1e-3) / 1e9
        axes.annotate(f" {k + 1}", (intensity[k], rate), color=INK, fontsize=9)
    axes.set(xscale="log", yscale="log", xlabel="flops per byte of inputs, parameters and results", ylabel="GF/s")
    axes.set_title(
        "Map and all gradients: " + "; ".join(f"{k + 1}: {r['row']}" for k, r in enumerate(rows)), fontsize=6
    )
    axes.legend(loc="lower right")
    paths.append(stem.with_name(stem.name + "-roofline.png"))
    figure.savefig(paths[-1], dpi=120)
    plt.close(figure)

    names = [n for n in rows[0]["milliseconds"] if n != "ours"]
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        heights = [row["milliseconds"].get(name, float("nan")) / row["milliseconds"]["ours"] for row in rows]
        axes.bar([k + (i - (len(names) - 1) / 2) * width for k in range(len(rows))], heights, width, label=name)
    axes.axhline(1, color=INK, lw=1)
    axes.set_xticks(range(len(rows)), [row["row"] for row in rows], rotation=20, ha="right", fontsize=8)
    axes.set(ylabel="time / ours", title=f"Map and all gradients, {result['dtype']}, {result['processor']}")
    axes.legend(fontsize=8)
    paths.append(stem.with_name(stem.name + "-peers.png"))
    figure.savefig(paths[-1], dpi=120)
    plt.close(figure)
    return paths
