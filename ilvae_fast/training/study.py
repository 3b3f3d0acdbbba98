"""Studies: grids of runs that a YAML file describes, each finished run a file, so that a study goes on in parts.

A study file has

    title: one line
    common: fields of :class:`~.config.TrainConfig` of all runs
    grids: a list; each has ``axes`` and perhaps ``common`` and ``labels``. An axis has a name and its choices: a list
        of values of the field of that name, or a mapping of labels to fields. ``labels`` are constant ones.
    quick: ``common`` and ``axes`` to put over those above, for a trial of the whole with little work
    keep: how many ``samples`` and ``reconstructions`` of each run to keep for figures, and for which labels
    figures: what to draw (:mod:`~.study_report`)

Fields that are mappings, such as data_options, are merged, the later over the earlier: common, the grid's, those of the
choices. ``$AXIS`` in the place of a value is the label on that axis, such as ``seed: $seed`` inside data_options.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._support.checks import check_number
from .._support.files import read_json, write_atomically
from .._support.options import check_names
from .._version import __version__
from ..data import Dataset
from ..distributions import GaussianMixture
from ..vae import VAE
from .config import TrainConfig, load_dataset, parse_yaml, read_yaml
from .loop import Diverged, train

_NOT_OF_A_RUN = ("output", "data_root", "cpu")  # where it was made, which changes nothing
Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run of a study: its place in the grid, and the fields of its configuration."""

    labels: Mapping[str, str]
    fields: Fields

    @property
    def name(self) -> str:
        """Of its file."""
        return "__".join(re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-") for label in self.labels.values())


@dataclass(frozen=True)
class Study:
    """What a study file says.

    Raises:
        ValueError, TypeError: naming the file and what is wrong in it.
    """

    name: str
    title: str
    cells: tuple[Cell, ...]
    keep: Fields = field(default_factory=dict)
    figures: Sequence[Fields] = ()

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], quick: bool = False) -> Study:
        """Read a study file; with ``quick`` its trial."""
        source = os.fspath(path)
        if not Path(path).is_file():
            raise FileNotFoundError(f"study: no file {source!r}, wanted YAML with title, common and grids")
        content = read_yaml(path)
        check_names(f"{source}: field", content, ("title", "common", "grids", "quick", "keep", "figures"))
        trial = content.get("quick", {}) if quick else {}
        check_names(f"{source}: field of quick", trial, ("common", "axes"))
        cells = []
        for grid in content["grids"]:
            check_names(f"{source}: field of a grid", grid, ("axes", "common", "labels"))
            cells += list(_cells(grid, content.get("common", {}), trial))
        if quick:  # grids that differ in what the trial leaves out
            cells = list({cell.name: cell for cell in cells}.values())
        names = [cell.name for cell in cells]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{source}: two runs are called {twice[0]}, wanted labels that tell them apart")
        for cell in cells:
            TrainConfig.from_dict(cell.fields)  # says what is wrong before the first run
        cells.sort(key=lambda cell: int(cell.fields.get("seed", 0)))  # a part of a study has all models
        return cls(Path(path).stem, content["title"], tuple(cells), content.get("keep", {}), content.get("figures", ()))


def _cells(grid: Fields, common: Fields, trial: Fields) -> Iterator[Cell]:
    axes = {
        name: _restricted(name, _choices(name, values), trial.get("axes", {}).get(name))
        for name, values in grid["axes"].items()
    }
    for choices in itertools.product(*(choices.items() for choices in axes.values())):
        labels = {**grid.get("labels", {}), **dict(zip(axes, (label for label, _ in choices), strict=True))}
        layers = [common, grid.get("common", {}), *(fields for _, fields in choices), trial.get("common", {})]
        yield Cell({name: str(label) for name, label in labels.items()}, _filled(_merged(layers), labels))


def _choices(name: str, values: Any) -> dict[str, Fields]:
    """The choices of an axis: fields by label."""
    if isinstance(values, Mapping):
        return {str(label): fields or {} for label, fields in values.items()}
    return {str(value): {name: value} for value in values}


def _restricted(name: str, choices: dict[str, Fields], wanted: Any) -> dict[str, Fields]:
    """Those of the trial: labels of the axis, or values of the field that it is named after, else the first choice."""
    if wanted is None:
        return choices
    if isinstance(wanted, Mapping):
        return _choices(name, wanted)
    labels = [str(value) for value in wanted]
    known = [label for label in labels if label in choices]
    if known:
        return {label: choices[label] for label in known}
    of_a_field = name in TrainConfig.__dataclass_fields__
    return _choices(name, wanted) if of_a_field else dict(itertools.islice(choices.items(), 1))


def _filled(value: Any, labels: Mapping[str, Any]) -> Any:
    """``value`` with the label of its axis, as YAML reads it, for each ``$AXIS``."""
    if isinstance(value, Mapping):
        return {name: _filled(v, labels) for name, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, labels) for v in value]
    if isinstance(value, str) and value.startswith("$"):
        check_names("study: axis", [value[1:]], labels)
        return parse_yaml(value, str(labels[value[1:]]))
    return value


def _merged(layers: Sequence[Fields]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            old = result.get(name)
            nested = isinstance(value, Mapping) and isinstance(old, Mapping)
            result[name] = _merged((old or {}, value)) if nested else value
    return result


def run_study(
    study: Study,
    folder: Path,
    *,
    data_root: str | None = None,
    jobs: int = 1,
    seconds: float | None = None,
    command: str = "",
    work: Path = Path("runs/studies"),
    on_run: Callable[[str, int, int, str | None], None] | None = None,
) -> bool:
    """Do the runs that have no file yet; whether all have one in the end.

    Args:
        folder: of the results: ``runs/NAME.json`` for each run, pictures that are kept beside it, and of all runs
            runs.csv and study.json.
        data_root: as in :class:`~.config.TrainConfig`.
        jobs: runs beside each other, each on one core; with one, it has all of torch's threads.
        seconds: after which no run is begun.
        command: what to record as the command.
        work: folder of unfinished runs, with their checkpoints.
        on_run: called when a run ends with its name, how many have a file, how many there are, and what went wrong.

    Raises:
        ValueError: a file of another configuration; data that are fewer than a run asks for.
        FileNotFoundError: missing data.
    """
    check_number("jobs", jobs, least=1, whole=True)
    done = _finished(study, folder)
    todo = [cell for cell in study.cells if cell.name not in done]
    count, start = len(done), time.monotonic()
    arguments: dict[str, Any] = {"data_root": data_root, "command": command, "keep": study.keep, "commit": _commit()}
    scratch = work / folder.name

    def ended(cell: Cell, record: Fields) -> None:
        nonlocal count
        count += 1
        _summarise(study, folder, command)
        if on_run is not None:
            on_run(cell.name, count, len(study.cells), record.get("error"))

    _summarise(study, folder, command)
    _check_data(todo, data_root)
    if jobs == 1:
        for cell in todo:
            if seconds is not None and time.monotonic() - start > seconds:
                break
            ended(cell, _run(cell, folder, scratch, threads=0, **arguments))
        return count == len(study.cells)
    waiting = list(reversed(todo))
    running: dict[Future[Fields], Cell] = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _end_with, (os.getpid(),)) as pool:
        try:
            while True:
                late = seconds is not None and time.monotonic() - start > seconds
                while len(running) < jobs and not late and waiting:
                    cell = waiting.pop()
                    running[pool.submit(_run, cell, folder, scratch, threads=1, **arguments)] = cell
                if not running:
                    return count == len(study.cells)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    ended(running.pop(future), future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _check_data(cells: Sequence[Cell], data_root: str | None) -> None:
    """Load each data set once: what is missing, or too little, is to be known before hours of runs."""
    seen = set()
    for cell in cells:
        config = TrainConfig.from_dict({**cell.fields, "data_root": data_root})
        key = json.dumps([config.data, config.to_dict()["data_options"]], sort_keys=True)
        if key not in seen:
            load_dataset(config)
            seen.add(key)


def _end_with(parent: int) -> None:
    """Let this process end when ``parent`` does, however that happens: nobody would wait for its run."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(
    cell: Cell, folder: Path, scratch: Path, *, threads: int, data_root: str | None, command: str, keep: Fields,
    commit: str,
) -> Fields:  # fmt: skip
    """Do one run and write its files."""
    if threads:
        torch.set_num_threads(threads)
    output = scratch / cell.name
    config = TrainConfig.from_dict({**cell.fields, "cpu": True, "data_root": data_root, "output": str(output)})
    start = time.monotonic()
    record: dict[str, Any] = {
        "name": cell.name,
        "labels": dict(cell.labels),
        "config": _of_a_run(config),
        "command": command,
        "commit": commit,
        "versions": {"ilvae_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"processor": _processor(), "threads": torch.get_num_threads()},
    }
    try:
        record["measures"] = train(config)
        model, dataset = VAE.from_pretrained(output / "model").eval(), load_dataset(config)
        record["parameters"] = {
            part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("encoder", "decoder")
        }
        epochs = json.loads((output / "history.json").read_text())
        record["history"] = epochs[:: -(-len(epochs) // 20)]  # at most 20 of them
        if all(cell.labels.get(name) in set(map(str, those)) for name, those in keep.get("labels", {}).items()):
            record |= _kept(model, dataset, keep, folder / "runs" / f"{cell.name}.npz")
    except Diverged as error:
        record["error"] = str(error).replace(str(output), cell.name)
    record["seconds"] = round(time.monotonic() - start, 1)  # of an interrupted run those since it went on
    write_atomically(folder / "runs" / f"{cell.name}.json", json.dumps(record, indent=1) + "\n")
    shutil.rmtree(output, ignore_errors=True)
    return record


@torch.no_grad()
def _kept(model: VAE, dataset: Dataset, keep: Fields, path: Path) -> dict[str, Any]:
    """Samples, of a mixture by component, and reconstructions: text in the record, pictures of eight bits in a file."""
    generator = torch.Generator().manual_seed(0)
    samples, reconstructions = int(keep.get("samples", 0)), int(keep.get("reconstructions", 0))
    if isinstance(model.prior, GaussianMixture):
        means = model.prior.means
        noise = torch.randn(samples, *means.shape, generator=generator)
        z = (means + (0.5 * model.prior.log_variances).exp() * noise).transpose(0, 1)  # (K, samples, m)
    else:
        z = model.prior.sample(samples, generator)
    drawn, x = model.decode(z), dataset.test[:reconstructions]
    again = model.reconstruct(x)
    if dataset.num_categories is not None:
        middle = model.interpolate(x[:1], x[1:2], 6)[:, 0]
        texts = {"samples": drawn.flatten(0, -2), "data": x, "reconstructions": again, "interpolation": middle}
        return {"texts": {name: dataset.to_text(tokens) for name, tokens in texts.items()}}
    if len(dataset.shape) == 2 and dataset.unit_range:
        arrays = {"samples": drawn, "data": x, "reconstructions": again}
        pictures: dict[str, Any] = {
            name: a.mul(255).round().to(torch.uint8).reshape(*a.shape[:-1], *dataset.shape).numpy()
            for name, a in arrays.items()
        }
        content = io.BytesIO()
        np.savez_compressed(content, **pictures)
        write_atomically(path, content.getvalue())
    return {}


def _of_a_run(config: TrainConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in _NOT_OF_A_RUN}


def records(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Those runs of a study that are finished, in the order of ``names``.

    Raises:
        FileNotFoundError: there is none; says how to make them.
        ValueError: a damaged file.
    """
    found = _records(folder, names)
    if not found:
        raise FileNotFoundError(f"results: no runs in {os.fspath(folder)!r}; `ilvae-fast study FILE` makes them")
    return found


def _records(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    paths = [folder / "runs" / f"{name}.json" for name in names]
    return [read_json(path, "remove it, and the study makes it again") for path in paths if path.is_file()]


def _finished(study: Study, folder: Path) -> set[str]:
    """Names of the runs that have a file."""
    cells, done = {cell.name: cell for cell in study.cells}, set()
    for record in _records(folder, list(cells)):
        cell, old = cells[record["name"]], TrainConfig.from_dict(record["config"])
        if _of_a_run(old) != _of_a_run(TrainConfig.from_dict(cell.fields)):
            path = folder / "runs" / f"{cell.name}.json"
            raise ValueError(
                f"{path}: is of another configuration than the study's; remove it to run it again, or choose another "
                "--output"
            )
        done.add(cell.name)
    return done


def _summarise(study: Study, folder: Path, command: str) -> None:
    """Write runs.csv and study.json."""
    names = [cell.name for cell in study.cells]
    rows = [row(record) for record in _records(folder, names)]
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, dict.fromkeys(name for r in rows for name in r), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(folder / "runs.csv", text.getvalue())
    summary = {
        "study": study.name,
        "title": study.title,
        "command": command,
        "runs": len(study.cells),
        "finished": len(rows),
        "hours": round(sum(r["seconds"] for r in rows) / 3600, 3),
        "names": names,
        "figures": study.figures,
    }
    write_atomically(folder / "study.json", json.dumps(summary, indent=2) + "\n")


def row(record: Fields) -> dict[str, Any]:
    """A run as one row: its labels, the measures that are single numbers, and what it took."""
    measures = record.get("measures", {})
    best = {f"best_{name}": value for name, value in measures.get("best", {}).items()}
    numbers = {k: v for k, v in {**measures, **best}.items() if isinstance(v, int | float)}
    collapsed = {f"collapsed_{e}": v for e, v in measures.get("epsilon_collapse", {}).items()}
    took = {
        **{f"{part}_parameters": n for part, n in record.get("parameters", {}).items()},
        "seconds": record["seconds"],
        "commit": record["commit"],
    }
    return {**record["labels"], **numbers, **collapsed, **took}


def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def _processor() -> str:
    """The processor's name where the system tells it, and what torch makes of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
