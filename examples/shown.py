"""Short runs on real data by the command line, recorded with the commands that made them.

    python examples/shown.py --data-root ../shared/data [--output results/shown]

Each is ``ilvae-fast train`` and ``ilvae-fast eval``; what is finished under runs/ is not run again. Written to
--output: one JSON file for each data set, and table.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from ilvae_fast._files import write_atomically
from ilvae_fast.cli import COLUMNS
from ilvae_fast.training import TrainConfig

RUNS = {"mnist": "il-lidvae", "fashion_mnist": "il-lidmvae", "synthetic_text": "il-lidsvae"}


def run(data: str, model: str, data_root: str) -> dict[str, object]:
    """Train and measure one model; commands and what they left."""
    options = ["--data", data, "--data-root", data_root, "--model", model, "--L", "1.0", "--epochs", "2"]
    folder = TrainConfig(data=data, model=model, L=1.0).folder
    commands = {"train": ["train", *options], "eval": ["eval", str(folder)]}
    for name, arguments in commands.items():
        if not (folder / {"train": "metrics.json", "eval": "eval.json"}[name]).is_file():
            subprocess.run([sys.executable, "-m", "ilvae_fast", *arguments], check=True)
    left = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "eval", "history")}
    return {"commands": [shlex.join(["ilvae-fast", *arguments]) for arguments in commands.values()], **left}


def table(records: dict[str, dict]) -> str:
    """The measures of ``eval`` as Markdown."""
    lines = [["data", "model", *(heading for heading, _ in COLUMNS)], ["---"] * (len(COLUMNS) + 2)]
    for data, record in records.items():
        values = [record["eval"].get(key) for _, key in COLUMNS]
        lines.append([data, RUNS[data], *("" if v is None else f"{v:.4g}" for v in values)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-root", default="../shared/data", help="folder of the data sets in files")
    parser.add_argument("--output", type=Path, default=Path("results/shown"), help="folder to write to")
    options = parser.parse_args()
    records = {}
    for data, model in RUNS.items():
        records[data] = run(data, model, options.data_root)
        write_atomically(options.output / f"{data}.json", json.dumps(records[data], indent=2) + "\n")
    write_atomically(options.output / "table.md", table(records))


if __name__ == "__main__":
    main()
