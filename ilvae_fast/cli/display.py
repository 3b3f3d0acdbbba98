"""What the command line shows: tables of measures and bars of progress."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .._support.extras import require

COLUMNS = (
    ("NLL", "nll"), ("gain", "gain"), ("KL", "elbo_kl"), ("MI", "mutual_information"), ("KL-MI", "kl_minus_mi"),
    ("active", "active_units"), ("directions", "active_directions"), ("Fisher", "fisher"),
    ("bound", "fisher_lower_bound"), ("ESS", "fisher_effective_sample_size"), ("certified L", "certified"),
    ("measured L", "measured"), ("clusters", "clustering_accuracy"),
)  # fmt: skip


def show(rows: Sequence[tuple[str, dict[str, Any]]]) -> None:
    table_of = require("rich.table", "train").Table
    table = table_of(box=require("rich.box", "train").SIMPLE_HEAD, show_edge=False)
    table.add_column("run", overflow="fold")
    cells = [(name, {**row, **dict.fromkeys(row.get("not_finite", ()), "not finite")}) for name, row in rows]
    shown = [(heading, key) for heading, key in COLUMNS if any(row.get(key) is not None for _, row in cells)]
    for heading, _ in shown:
        table.add_column(heading, justify="right")
    for name, row in cells:
        values = (row.get(key) for _, key in shown)
        table.add_row(name, *("" if v is None else v if isinstance(v, str) else f"{v:.4g}" for v in values))
    out = console()
    out.print(table)
    for name, row in rows:
        for warning in row.get("warnings", ()):
            out.print(f"{name}: {warning}", markup=False, highlight=False)


def console() -> Any:
    out = require("rich.console", "train").Console()
    return out if out.is_terminal else require("rich.console", "train").Console(width=140)


def is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


class Bar:
    """A bar that follows the steps of a run, or of one run after the other."""

    def __init__(self, bars: Any, name: str) -> None:
        self.bars, self.name, self.task = bars, name, None

    def named(self, name: str) -> Bar:
        return Bar(self.bars, name)

    def __call__(self, step: int, steps: int, values: dict[str, float]) -> None:
        if self.task is None:
            self.task = self.bars.add_task(self.name, total=steps, note="")
        note = {}
        if "loss" in values:
            note = {"note": f"loss {values['loss']:.2f}"}
        elif "measured" in values:
            note = {"note": f"measuring, {values['measured']:.0%}"}
        self.bars.update(self.task, completed=step, **note)


@contextmanager
def progress_bar(name: str) -> Iterator[Bar]:
    progress = require("rich.progress", "train")
    columns = [
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}"),
    ]
    with progress.Progress(*columns, disable=not is_main()) as bars:
        yield Bar(bars, name)
