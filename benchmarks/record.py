"""What every committed result says about itself: command, commit, machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import ilvae_fast as il
from ilvae_fast._support.files import write_atomically

RESULTS = Path(__file__).parent / "results"


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return result.stdout.strip()


def _commit() -> str:
    """Marked where the tree had changes; ILVAE_FAST_COMMIT says it where the tree is no git checkout."""
    commit = _git("rev-parse", "--short", "HEAD")
    if not commit:
        return os.environ.get("ILVAE_FAST_COMMIT", "unknown")
    return commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _module() -> str:
    name = Path(sys.argv[0]).stem
    return "benchmarks" if name == "__main__" else f"benchmarks.{name}"


def _arguments() -> list[str]:
    """Of the command line, but for where the data lie on this machine."""
    return ["DATA" if before == "--data-root" else word for before, word in pairwise(sys.argv)]


def provenance() -> dict[str, Any]:
    """Command, commit, versions and processor of this run."""
    return {
        "command": " ".join(["python -m", _module(), *_arguments()]),
        "commit": _commit(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "build": il.build_info(),
    }


def write(name: str | Path, content: dict[str, Any]) -> Path:
    """Write ``results/name.json``, or a path, all or nothing."""
    path = name if isinstance(name, Path) else RESULTS / f"{name}.json"
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    return path
