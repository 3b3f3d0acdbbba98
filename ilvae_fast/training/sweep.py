"""Grids of runs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .._support.extras import require
from .._support.files import write_atomically
from .config import TrainConfig, constant_name
from .loop import Diverged, Progress, Unsaved, train


def sweep(
    config: TrainConfig,
    constants: Sequence[float | str],
    seeds: Sequence[int],
    folder: Path,
    on_run: Callable[[TrainConfig], Progress | None] | None = None,
    restart: bool = False,
) -> list[dict[str, Any]]:
    """Train ``config`` for every L and seed; what is finished is skipped, what was interrupted goes on.

    A run that diverges does not keep the others from being trained.

    Args:
        constants: certified constants L, ``"auto"`` among them; without any L is that of ``config``, or of the model.
        folder: of the sweep, with one folder for each run and a table of all, those of earlier sweeps too, as
            ``sweep.csv`` and ``sweep.json``.
        on_run: called before each run; what it returns is that run's progress.
        restart: forget those runs of the grid that are in the folder.

    Returns:
        One row for each run of this grid: model, L (as asked for), seed and the measures that are single numbers, with
        not_finite and warnings; or instead of measures diverged, which says where.

    Raises:
        ValueError: constants for a model that has none.
        Unsaved: a file cannot be written; has the measures of all runs so far.
    """
    rows: list[dict[str, Any]] = []
    grid: list[float | str | None] = [*constants] if constants else [config.L]
    for constant in grid:
        for seed in seeds:
            name = "-".join([config.model, *([] if constant is None else [constant_name(constant)]), f"seed{seed}"])
            run = replace(config, L=constant, seed=seed, output=str(folder / name))
            row: dict[str, Any] = {"model": config.model, "L": constant, "seed": seed}
            try:
                measures = train(run, None if on_run is None else on_run(run), restart)
                remarks = ("not_finite", "warnings")
                row |= {k: v for k, v in measures.items() if not isinstance(v, dict | list) or k in remarks}
            except Diverged as error:
                row["diverged"] = str(error)
            except Unsaved as error:
                raise Unsaved(error, {**{named(r): r for r in rows}, **error.measured}) from error
            rows.append(row)
            if require("accelerate", "train").PartialState().is_main_process:
                try:
                    _add(row, folder)
                except OSError as error:
                    raise Unsaved(error, {named(r): r for r in rows}) from error
    return rows


def named(row: Mapping[str, Any]) -> str:
    """A row of a sweep in words."""
    return f"seed={row['seed']}" if row["L"] is None else f"L={row['L']} seed={row['seed']}"


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_bytes())
        assert all({"model", "L", "seed"} <= row.keys() for row in rows)
    except (ValueError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"{path}: is not the table of a sweep; remove it, and the same sweep writes it anew"
        ) from error
    return rows


def _add(row: dict[str, Any], folder: Path) -> None:
    """Put ``row`` into the tables, in the place of one of the same model, L and seed."""
    path = folder / "sweep.json"
    rows = [*_rows(path), row]
    rows = list({(r["model"], r["L"], r["seed"]): r for r in rows}.values())
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(name for r in rows for name in r))
    writer.writeheader()
    writer.writerows({name: " ".join(v) if isinstance(v, list) else v for name, v in r.items()} for r in rows)
    write_atomically(folder / "sweep.csv", text.getvalue())
    write_atomically(path, json.dumps(rows, indent=2) + "\n")
