"""The toy study: that it runs, and what its committed results claim."""

from __future__ import annotations

import os
import statistics
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
    assert len(rows) == len({tuple(row[k] for k in ("setting", "prior", "L", "sigma", "seed")) for row in rows}) == 21
    for name in ("accuracy", "divergence", "posteriors"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / f"{name}.png").unlink()
    assert len(draw(tmp_path)) == 3  # from the files alone


def test_the_bayes_limit():
    assert bayes_accuracy(7.5) == pytest.approx(0.8271, abs=1e-4)
    assert bayes_accuracy(1e-3) == 1


# what its results claim


@pytest.fixture(scope="module")
def rows():
    return read(RESULTS)


def values(rows, column: str, **fixed) -> list[float]:
    """A column over the seeds of the full study, in their order."""
    found = [
        row[column] for row in sorted(rows, key=lambda row: row["seed"]) if all(row[k] == v for k, v in fixed.items())
    ]
    assert len(found) >= 5, fixed
    return found


def test_the_lower_bound_and_the_certified_constant_hold_in_every_run(rows):
    certified = [row for row in rows if row["L"] is not None]
    assert len(certified) == 360  # of 450 runs
    for row in certified:
        assert row["fisher_lower_bound"] <= row["fisher"] * (1 + 1e-9)
        assert row["certified"] == pytest.approx(row["L"], rel=1e-6)
        assert row["measured"] >= row["certified"] * (1 - 1e-6)
        assert row["effective_sample_size"] > 20  # of 128: the estimates can be trusted


@pytest.mark.parametrize("sigma", [0.5, 2.5, 5.0, 7.5, 10.0])
@pytest.mark.parametrize("prior", ["normal", "mixture"])
def test_the_divergence_is_larger_with_a_large_constant(rows, prior, sigma):
    """With the likelihood of the data's sigma. Up to L = 3 it hardly moves under the normal prior, see the README."""
    large, small, none = (
        values(rows, "fisher", setting="true", prior=prior, sigma=sigma, L=constant) for constant in (10.0, 3.0, 0.0)
    )
    assert min(large) > max(small)
    assert min(large) > max(none)
    assert statistics.mean(large) > 2.5 * statistics.mean(small)


def test_the_plain_latent_collapses_where_that_of_il_lidvae_does_not(rows):
    """In the less used latent, for all seeds; of the data's two directions one is noise alone."""
    at = {"setting": "true", "prior": "normal", "sigma": 7.5}
    assert max(values(rows, "kl_smaller", **at, L=None)) < 0.01
    for constant in (1.0, 3.0, 10.0):
        assert min(values(rows, "kl_smaller", **at, L=constant)) > 0.05
        assert values(rows, "active_units", **at, L=constant) == [2] * 5
    assert values(rows, "active_units", **at, L=None) == [1] * 5


def test_il_beats_l_0_in_accuracy_where_the_likelihood_asks_for_the_noise_too(rows):
    """At sigma = 7.5, by pairs of the same seed: 4.4 standard errors for L = 3, 2.7 for L = 1."""
    at = {"setting": "unit", "prior": "mixture", "sigma": 7.5}
    none = values(rows, "accuracy", **at, L=0.0)
    for constant, errors in ((3.0, 3), (1.0, 2)):
        gain = [a - b for a, b in zip(values(rows, "accuracy", **at, L=constant), none, strict=True)]
        assert len(gain) == 20
        assert statistics.mean(gain) > errors * statistics.stdev(gain) / 20**0.5
    assert min(values(rows, "accuracy", **at, L=3.0)) > 0.65
    assert sum(accuracy < 0.6 for accuracy in none) >= 4


@pytest.mark.parametrize("content", ["", "sigma,L\n1,2\n", "setting,prior,sigma,L\ntrue,normal,x,1\n", "\0"])
def test_a_table_of_something_else_is_named(tmp_path, content):
    (tmp_path / "runs.csv").write_text(content)
    with pytest.raises(
        ValueError, match=rf"^{tmp_path / 'runs.csv'}: is not the table of the toy study; python examples"
    ):
        draw(tmp_path)
