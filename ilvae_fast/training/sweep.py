"""Grids of runs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .._support.extras import require
from .._support.files import write_atomically
from .config import TrainConfig, constant_name, takes_constant
from .loop import Progress, train


def sweep(
    config: TrainConfig,
    constants: Sequence[float | str],
    seeds: Sequence[int],
    folder: Path,
    on_run: Callable[[TrainConfig], Progress | None] | None = None,
) -> list[dict[str, Any]]:
    """Train ``config`` for every L and seed; what is finished is skipped, what was interrupted goes on.

    Args:
        constants: certified constants L, ``"auto"`` among them; models without one take an empty sequence.
        folder: of the sweep, with one folder for each run and a table of all, those of earlier sweeps too, as
            ``sweep.csv`` and ``sweep.json``.
        on_run: called before each run; what it returns is that run's progress.

    Returns:
        One row for each run of this grid: model, L (as asked for), seed and the measures that are single numbers, with
        not_finite and warnings.

    Raises:
        ValueError: constants for a model that has none, or none for one that has.
    """
    if takes_constant(config) and "inverse_lipschitz" not in config.model_options and not constants:
        raise ValueError(f"L: got none, wanted at least one for {config.model!r}")
    rows: list[dict[str, Any]] = []
    grid: list[float | str | None] = [*constants] if constants else [None]
    for constant in grid:
        for seed in seeds:
            name = f"seed{seed}" if constant is None else f"{constant_name(constant)}-seed{seed}"
            run = replace(config, L=constant, seed=seed, output=str(folder / name))
            measures = train(run, None if on_run is None else on_run(run))
            remarks = ("not_finite", "warnings")
            single = {k: v for k, v in measures.items() if not isinstance(v, dict | list) or k in remarks}
            rows.append({"model": config.model, "L": constant, "seed": seed, **single})
            if require("accelerate", "train").PartialState().is_main_process:
                _add(rows[-1], folder)
    return rows


def _add(row: dict[str, Any], folder: Path) -> None:
    """Put ``row`` into the tables, in the place of one of the same model, L and seed."""
    path = folder / "sweep.json"
    rows = [*(json.loads(path.read_text()) if path.is_file() else []), row]
    rows = list({(r["model"], r["L"], r["seed"]): r for r in rows}.values())
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(name for r in rows for name in r))
    writer.writeheader()
    writer.writerows({name: " ".join(v) if isinstance(v, list) else v for name, v in r.items()} for r in rows)
    write_atomically(folder / "sweep.csv", text.getvalue())
    write_atomically(path, json.dumps(rows, indent=2) + "\n")
