"""What the command line shows: tables of measures and bars of progress."""

from __future__ import annotations

import os
import sys
import time
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
_SECONDS = 30  # from one line of progress to the next
_NAME_WIDTH = 20  # of a run's name, before measures go on in another table


def show(rows: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Print the measures of runs, each with its name, and their warnings. What is too wide goes on in another table."""
    out = console()
    cells = [(name, {**row, **dict.fromkeys(row.get("not_finite", ()), "not finite")}) for name, row in rows]
    shown = [(heading, key) for heading, key in COLUMNS if any(row.get(key) is not None for _, row in cells)]
    while True:
        fitting = max(len(shown), 1)
        while fitting > 1 and _least_width(_table(cells, shown[:fitting])) > out.width:
            fitting -= 1
        out.print(_table(cells, shown[:fitting]))
        shown = shown[fitting:]
        if not shown:
            break
    for name, row in rows:
        remarks = [*([f"diverged at {row['diverged']}"] if "diverged" in row else ()), *row.get("warnings", ())]
        for remark in remarks:
            out.print(f"{name}: {remark}", markup=False, highlight=False)


def _table(cells: Sequence[tuple[str, dict[str, Any]]], shown: Sequence[tuple[str, str]]) -> Any:
    text = require("rich.text", "train").Text
    table = require("rich.table", "train").Table(box=require("rich.box", "train").SIMPLE_HEAD, show_edge=False)

    def add_column(heading: str, values: Sequence[str], narrowest: int, **options: Any) -> None:
        width = max(map(len, (heading, *values)))
        table.add_column(heading, overflow="fold", min_width=min(width, narrowest), **options)
        columns.append(values)

    columns: list[Sequence[str]] = []
    add_column("run", [name for name, _ in cells], _NAME_WIDTH)
    for heading, key in shown:
        values = (row.get(key) for _, row in cells)
        words = ["" if v is None else v if isinstance(v, str) else f"{v:.4g}" for v in values]
        add_column(heading, words, len("not finite"), justify="right")  # a number has fewer digits
    for row in zip(*columns, strict=True):
        table.add_row(*(text(cell) for cell in row))  # a name may have brackets, which are no markup
    return table


def _least_width(table: Any) -> int:
    """Of a table whose columns have least widths. rich itself shortens words without a word."""
    return sum(column.min_width + 3 for column in table.columns)  # a blank on both sides, and one between columns


def console() -> Any:
    out = require("rich.console", "train").Console()
    return out if out.is_terminal else require("rich.console", "train").Console(width=140)


def is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _note(values: dict[str, float]) -> str:
    if "loss" in values:
        return f"loss {values['loss']:.2f}"
    return f"measuring, {values['measured']:.0%}" if "measured" in values else ""


class Bar:
    """A bar that follows the steps of a run, or of one run after the other."""

    def __init__(self, bars: Any, name: str) -> None:
        self.bars, self.name, self.task = bars, name, None

    def named(self, name: str) -> Bar:
        return Bar(self.bars, name)

    def __call__(self, step: int, steps: int, values: dict[str, float]) -> None:
        if self.task is None:
            self.task = self.bars.add_task(self.name, total=steps, note="")
        note = _note(values)
        self.bars.update(self.task, completed=step, **({"note": note} if note else {}))


class Lines(Bar):
    """The same where there is no terminal: a line from time to time."""

    def __init__(self, name: str) -> None:
        super().__init__(None, name)
        self.last, self.note = time.monotonic(), ""

    def named(self, name: str) -> Lines:
        return Lines(name)

    def __call__(self, step: int, steps: int, values: dict[str, float]) -> None:
        self.note = _note(values) or self.note
        now = time.monotonic()
        if is_main() and now - self.last >= _SECONDS:
            self.last = now
            words = ", ".join(filter(None, (f"{step} of {steps}", self.note)))
            print(f"{self.name}: {words}", file=sys.stderr, flush=True)


@contextmanager
def progress_bar(name: str) -> Iterator[Bar]:
    """Progress on the standard error, so that the standard output has results alone."""
    if not sys.stderr.isatty():
        yield Lines(name)
        return
    progress = require("rich.progress", "train")
    columns = [
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}", markup=False),
    ]
    errors = require("rich.console", "train").Console(stderr=True)
    with progress.Progress(*columns, console=errors, disable=not is_main()) as bars:
        yield Bar(bars, name)
