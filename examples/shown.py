"""Short runs on real data by the command line, recorded with the commands that made them.

    python examples/shown.py --data-root ../shared/data [--output results/shown]

Each is ``ilvae-fast train`` and ``ilvae-fast eval``; what is finished under runs/ is not run again. Written to
--output: one JSON file for each, and table.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from ilvae_fast._support.files import write_atomically
from ilvae_fast.cli import COLUMNS

_FEW = "--set eval_limit=300 --set num_importance_samples=20 --set fisher_samples=8 --cpu"
RUNS = {  # the folder of each and its options of train beside those for all
    "mnist": ("mnist-il-lidvae-L1-seed0", "--data mnist --model il-lidvae --L 1.0"),
    "fashion_mnist": ("fashion_mnist-il-lidmvae-L1-seed0", "--data fashion_mnist --model il-lidmvae --L 1.0"),
    "synthetic_text": ("synthetic_text-il-lidsvae-L1-seed0", "--data synthetic_text --model il-lidsvae --L 1.0"),
    # to compare with: another decoder, a larger constant, one that is relaxed
    "synthetic_text_svae": ("x-svae", f"--data synthetic_text --model svae {_FEW}"),
    "synthetic_text_L10": ("x-L10", f"--data synthetic_text --model il-lidsvae --L 10 {_FEW}"),
    "synthetic_text_annealed": (
        "x-anneal",
        "--data synthetic_text --model il-lidsvae --L 1 "
        f"--set 'annealing={{L1: {{kind: linear, start: 30, end: 1, steps: 250}}}}' {_FEW}",
    ),
}


def run(name: str, data_root: str) -> dict[str, Any]:
    """Train and measure one model; commands and what they left."""
    folder, options = Path("runs") / RUNS[name][0], shlex.split(RUNS[name][1])
    output = ["--output", str(folder)] if folder.name.startswith("x-") else []  # the others are called so by themselves
    few = ["--importance-samples", "50", "--limit", "200"] if output else []
    train = ["train", *options, "--data-root", data_root, "--epochs", "2", *output]
    commands = {"metrics.json": train, "eval.json": ["eval", str(folder), *few]}
    for file, arguments in commands.items():
        if not (folder / file).is_file():
            subprocess.run([sys.executable, "-m", "ilvae_fast", *arguments], check=True)
    left = {part: json.loads((folder / f"{part}.json").read_text()) for part in ("metrics", "eval", "history")}
    return {"commands": [shlex.join(["ilvae-fast", *arguments]) for arguments in commands.values()], **left}


def table(records: dict[str, dict[str, Any]]) -> str:
    """The measures of ``eval`` as Markdown."""
    lines = [["run", *(heading for heading, _ in COLUMNS)], ["---"] * (len(COLUMNS) + 1)]
    for name, record in records.items():
        values = [record["eval"].get(key) for _, key in COLUMNS]
        lines.append([name, *("" if v is None else f"{v:.4g}" for v in values)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-root", default="../shared/data", help="folder of the data sets in files")
    parser.add_argument("--output", type=Path, default=Path("results/shown"), help="folder to write to")
    options = parser.parse_args()
    records = {}
    for name in RUNS:
        records[name] = run(name, options.data_root)
        write_atomically(options.output / f"{name}.json", json.dumps(records[name], indent=2) + "\n")
    write_atomically(options.output / "table.md", table(records))


if __name__ == "__main__":
    main()
