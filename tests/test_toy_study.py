"""The toy study: that it runs, and what its committed results claim."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ilvae_fast.training.toy_report import bayes_accuracy, draw, read

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "toy"


# that it runs


@pytest.mark.slow
def test_a_quick_study_stops_goes_on_and_draws(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "toy_collapse.py"), "--quick", "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*more: str) -> str:
        process = subprocess.run(
            [*command, *more], env=environment, capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert process.returncode == 0, process.stderr
        return process.stdout

    assert "not done yet" in run("--seconds", "0.5")
    before = (tmp_path / "runs.csv").read_text()
    run()
    assert (tmp_path / "runs.csv").read_text().startswith(before)  # what was done stays
    rows = read(tmp_path)
    assert len(rows) == len({tuple(row[k] for k in ("setting", "prior", "L", "sigma", "seed")) for row in rows}) == 18
    for name in ("accuracy", "divergence", "posteriors"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / f"{name}.png").unlink()
    assert len(draw(tmp_path)) == 3  # from the files alone


def test_the_bayes_limit():
    assert bayes_accuracy(7.5) == pytest.approx(0.8271, abs=1e-4)
    assert bayes_accuracy(1e-3) == 1


# what its results claim
