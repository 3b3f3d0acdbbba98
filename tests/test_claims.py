"""What the committed studies claim: in every finished run, and in the trials that CI runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ilvae_fast.training import Study

ROOT = Path(__file__).parents[1]
STUDIES = sorted(path.stem for path in (ROOT / "studies").glob("*.yaml"))


def finished(name: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((ROOT / "results" / name / "runs").glob("*.json"))]


def check_theorem(measures: dict) -> None:
    """The divergence is at least each of its bounds, and no singular value is below the certified constant."""
    slack = 1 + 1e-6
    divergence, local = measures["fisher"], measures["fisher_local_bound"]
    assert divergence > 0
    assert local <= divergence * slack
    if measures["certified"] is None:  # a plain decoder
        return
    assert measures["fisher_lower_bound"] <= local * slack
    if measures["fisher_cotangent_bound"] is not None:
        assert measures["fisher_lower_bound"] <= measures["fisher_cotangent_bound"] * slack
        assert measures["fisher_cotangent_bound"] <= divergence * slack
    assert measures["measured"] >= measures["certified"] * (1 - 1e-6)


@pytest.mark.parametrize("name", STUDIES)
def test_the_theorem_holds_in_every_finished_run(name):
    for record in finished(name):
        check_theorem(record["measures"])
        if "best" in record["measures"]:
            check_theorem(record["measures"]["best"])


@pytest.mark.parametrize("name", STUDIES)
def test_finished_runs_are_those_of_the_study(name):
    """A study that was changed after some of its runs says so here."""
    records = finished(name)
    if not records:
        assert not (ROOT / "results" / name / "runs.csv").exists()
        return
    known = {cell.name: cell for cell in Study.from_yaml(ROOT / "studies" / f"{name}.yaml").cells}
    summary = json.loads((ROOT / "results" / name / "study.json").read_text())
    assert summary["finished"] == len(records)
    assert summary["runs"] == len(known)
    for record in records:
        assert record["labels"] == known[record["name"]].labels
        assert "-dirty" not in record["commit"], record["name"]


def test_the_page_says_how_many_runs_each_study_has():
    page = (ROOT / "docs" / "reproduction.md").read_text()
    for name in STUDIES:
        count = len(Study.from_yaml(ROOT / "studies" / f"{name}.yaml").cells)
        rows = [line for line in page.splitlines() if line.startswith(f"| `studies/{name}.yaml` |")]
        assert [row.rpartition("| ")[2] for row in rows] == [f"{count} |"], name
