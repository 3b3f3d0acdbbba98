"""Runs the tests of the command line with the lowest versions that pyproject.toml allows.

    python tests/lowest.py [PYTEST OPTIONS]

They are installed into build/lowest, in front of the other packages of this environment, torch among them.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement

from package import environment

ROOT = Path(__file__).parent.parent
EXTRAS = ("train", "test")
TESTS = ("tests/cli", "tests/data/test_data.py", "tests/vae/test_vae_files.py")


def lowest(requirements: Iterable[str], extras: Iterable[str]) -> Iterator[str]:
    """The lower bounds in requirements, those of the extras included, as requirements of those very versions."""
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
            for bound in requirement.specifier:
                if bound.operator == ">=" and requirement.name != "torch":  # the extension is built for one
                    yield f"{requirement.name}=={bound.version}"


def main() -> None:
    versions = sorted(set(lowest(importlib.metadata.requires("ilvae_fast") or (), EXTRAS)))
    print("lowest versions:", *versions, flush=True)
    folder = ROOT / "build" / "lowest"
    shutil.rmtree(folder, ignore_errors=True)
    python = environment(folder)
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(python)]
    subprocess.run([*pip, "install", "--no-deps", "--ignore-installed", *versions], check=True)
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-m", "not slow", *TESTS, *sys.argv[1:]]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    raise SystemExit(subprocess.run(command, cwd=ROOT, env=environ, check=False).returncode)


if __name__ == "__main__":
    main()
