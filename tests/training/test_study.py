"""Studies: grids from a file, runs that are not done twice, and figures from the files alone."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from ilvae_fast.training import Study, TrainConfig, run_study
from ilvae_fast.training.study_report import averaged, cells, draw
from training_cases import OPTIONS, SMALL, run_command

ROOT = Path(__file__).parents[2]
FIGURES = [
    {"kind": "against", "name": "measures", "x": "certified", "y": ["nll", "elbo_kl"]},
    {"kind": "plane", "name": "plane", "lines": "model", "points": "model", "x": "elbo_kl", "y": ["nll"]},
    {"kind": "table", "name": "table", "rows": "model", "columns": ["certified", "nll"]},
]
TOY = {
    "title": "Toy",
    "common": {**SMALL, "epochs": 1, "data_options": {**SMALL["data_options"], "validation": 20}},
    "grids": [
        {
            "axes": {
                "model": {
                    "VAE": {"model": "vae", "model_options": {"decoder_hidden": [6]}},
                    "L = 1": {"model": "il-lidvae", "L": 1.0, "model_options": OPTIONS},
                },
                "seed": [0, 1],
            }
        }
    ],
    "quick": {"common": {"num_importance_samples": 2}, "axes": {"seed": [0]}},
    "figures": FIGURES,
}


def written(folder: Path, **changes) -> Path:
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump({**TOY, **changes}, sort_keys=False))
    return path


def test_a_grid_merges_fields_and_takes_seed_after_seed(tmp_path):
    study = Study.from_yaml(written(tmp_path))
    assert [cell.name for cell in study.cells] == ["vae__0", "l-1__0", "vae__1", "l-1__1"]
    cell = study.cells[3]
    assert cell.labels == {"model": "L = 1", "seed": "1"}
    config = TrainConfig.from_dict(cell.fields)
    assert (config.L, config.seed, config.epochs) == (1.0, 1, 1)
    assert config.data_options == {"num_train": 300, "num_test": 60, "validation": 20}
    trial = Study.from_yaml(written(tmp_path), quick=True)
    assert [cell.name for cell in trial.cells] == ["vae__0", "l-1__0"]
    assert trial.cells[0].fields["num_importance_samples"] == 2
    assert trial.cells[0].fields["data_options"]["validation"] == 20


def test_a_field_may_name_an_axis(tmp_path):
    common = {
        **TOY["common"],
        "data_options": {"num_train": 300, "sigma": "$seed"},
        "annealing": {"kl_weight": "$seed"},
    }
    study = Study.from_yaml(written(tmp_path, common=common))
    assert [cell.fields["data_options"]["sigma"] for cell in study.cells] == [0, 0, 1, 1]
    assert study.cells[2].fields["annealing"] == {"kl_weight": 1}
    with pytest.raises(ValueError, match=r"study: axis: got 'sed'.*'seed'"):
        Study.from_yaml(written(tmp_path, common={**common, "loss_limit": "$sed"}))


def test_slopes_are_of_logarithms(tmp_path):
    from ilvae_fast.training.study_report import DRAWERS

    rows = [
        {"sigma": "1", "seed": str(s), "certified": L, "fisher": (2 + s) * L**2}
        for s in (0, 1) for L in (1.0, 3.0, 10.0)
    ]  # fmt: skip
    figure = {"x": "certified", "y": ["fisher"], "rows": "sigma"}
    text, _ = DRAWERS["slopes"](rows, [], figure, tmp_path)
    assert text.splitlines()[-1] == "| 1 | 2 | 2 |"


def test_bad_studies_are_refused_before_the_first_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="study: no file"):
        Study.from_yaml(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match=r"toy\.yaml: field: got 'grid'.*'grids'"):
        Study.from_yaml(written(tmp_path, grid=[]))
    with pytest.raises(ValueError, match="two runs are called l-1__0"):
        Study.from_yaml(written(tmp_path, grids=TOY["grids"] * 2))
    with pytest.raises(ValueError, match="field: got 'epoch'"):
        Study.from_yaml(written(tmp_path, common={**SMALL, "epoch": 3}))


def test_finished_runs_stay_and_a_part_is_a_study_too(tmp_path):
    study, folder = Study.from_yaml(written(tmp_path)), tmp_path / "results"
    seen = []

    def on_run(name, done, count, error):
        seen.append((name, done, count, error))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(study, folder, work=tmp_path / "work", on_run=on_run)
    assert seen == [("vae__0", 1, 4, None), ("l-1__0", 2, 4, None)]
    first = (folder / "runs" / "vae__0.json").read_bytes()
    assert json.loads((folder / "study.json").read_text())["finished"] == 2
    assert not run_study(study, folder, work=tmp_path / "work", seconds=0)  # nothing is begun
    assert run_study(study, folder, work=tmp_path / "work", command="the command")
    assert (folder / "runs" / "vae__0.json").read_bytes() == first
    assert not list((tmp_path / "work").glob("*/*"))
    record = json.loads((folder / "runs" / "l-1__1.json").read_text())
    assert record["measures"]["certified"] == pytest.approx(1.0)
    assert record["command"] == "the command"
    assert not {"output", "data_root"} & set(record["config"])
    assert str(tmp_path) not in json.dumps(record)
    rows = list(csv.DictReader(io.StringIO((folder / "runs.csv").read_text())))
    assert [row["model"] for row in rows] == ["VAE", "L = 1"] * 2
    assert float(rows[3]["nll"]) == record["measures"]["nll"]
    assert float(rows[3]["best_nll"]) == record["measures"]["best"]["nll"]


def test_missing_data_are_known_before_the_first_run(tmp_path):
    more = {"model": {"more": {"model": "il-lidvae", "data_options": {"limit": 400}}}, "seed": [2]}
    study = Study.from_yaml(written(tmp_path, grids=[*TOY["grids"], {"axes": more}]))
    with pytest.raises(ValueError, match="limit, validation: got 400 and 20, wanted at most 300"):
        run_study(study, tmp_path / "results", work=tmp_path / "work")
    assert not (tmp_path / "results" / "runs").exists()


def test_results_of_another_configuration_are_refused(tmp_path):
    study, folder = Study.from_yaml(written(tmp_path), quick=True), tmp_path / "results"
    run_study(study, folder, work=tmp_path / "work")
    other = Study.from_yaml(written(tmp_path, quick={**TOY["quick"], "common": {"batch_size": 25}}), quick=True)
    with pytest.raises(ValueError, match=r"vae__0.json: is of another configuration"):
        run_study(other, folder, work=tmp_path / "work")


def test_a_diverging_run_is_recorded_and_the_study_goes_on(tmp_path):
    common = {**TOY["common"], "loss_limit": 1e-3}
    study = Study.from_yaml(written(tmp_path, common=common), quick=True)
    errors = []
    assert run_study(
        study, tmp_path / "results", work=tmp_path / "work", on_run=lambda *ended: errors.append(ended[-1])
    )
    assert all("limit 0.001" in error for error in errors)
    assert str(tmp_path) not in (tmp_path / "results" / "runs" / "vae__0.json").read_text()


def test_figures_are_drawn_from_the_files_alone(tmp_path):
    study, folder = Study.from_yaml(written(tmp_path)), tmp_path / "results"
    run_study(study, folder, work=tmp_path / "work")
    (folder / "runs.csv").unlink()
    paths = draw(folder, json.loads((folder / "study.json").read_text()))
    assert [path.name for path in paths] == ["measures.png", "plane.png", "table.md"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[:2])
    records = [json.loads((folder / "runs" / f"l-1__{seed}.json").read_text()) for seed in (0, 1)]
    mean = averaged([record["measures"]["nll"] for record in records])
    assert f"| L = 1 | 2 | 1 | {mean.mean:.4g} ± {mean.error:.2g} |" in paths[2].read_text()


def test_means_are_over_seeds_alone():
    rows = [
        {"model": m, "rate": r, "seed": str(s), "commit": "x", "nll": n, "kl": k}
        for m, r, s, n, k in (("a", "1", 0, 1.0, 5.0), ("a", "1", 1, 3.0, None), ("a", "2", 0, 7.0, 1.0))
    ]
    found = cells(rows, ["nll", "kl"])
    assert [labels for labels, _ in found] == [{"model": "a", "rate": "1"}, {"model": "a", "rate": "2"}]
    assert found[0][1]["nll"] == (2.0, 1.0, 2)
    assert "kl" not in found[0][1]  # one of the two has none
    assert np.isnan(found[1][1]["nll"].error)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["images", "mixture", "text", "annealing", "cures", "theorem"])
def test_the_trial_of_each_study(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    run_command(capsys, "study", str(ROOT / "studies" / f"{name}.yaml"), "--quick", "--jobs", "1")
    folder = tmp_path / "results" / f"{name}-quick"
    summary = json.loads((folder / "study.json").read_text())
    assert summary["finished"] == summary["runs"] > 1
    for figure in summary["figures"]:
        assert list(folder.glob(f"{figure['name']}.*")), figure
    (folder / "table.md").unlink()
    run_command(capsys, "report", f"{name}-quick")
    assert (folder / "table.md").is_file()


@pytest.mark.slow
def test_a_killed_study_goes_on_with_several_runs_beside_each_other(tmp_path):
    path, folder = written(tmp_path), tmp_path / "results"
    command = [sys.executable, "-m", "ilvae_fast", "study", str(path), "--output", str(folder), "--jobs", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 240
    while not list(folder.glob("runs/*.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    while any(Path(f"/proc/{child}").exists() for child in children):  # they notice, and no run is done twice
        assert time.monotonic() < deadline
        time.sleep(0.1)
    done = {file: file.read_bytes() for file in folder.glob("runs/*.json")}
    assert done
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert len(list(folder.glob("runs/*.json"))) == 4
    assert all(file.read_bytes() == content for file, content in done.items())
