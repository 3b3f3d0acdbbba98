"""The demo, from its command line to the files it leaves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ilvae_fast.vae import VAE

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"
FIGURES = ("latent_use.png", "collapse.png", "reconstructions.png", "samples.png")


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    command = [sys.executable, str(DEMO), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Output folder and terminal of one quick run."""
    folder = tmp_path_factory.mktemp("demo")
    process = run("--quick", "--L", "2", "0.5", "--epochs", "3", cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder / "runs" / "demo", process.stdout


@pytest.mark.slow
def test_the_demo_leaves_numbers_that_are_consistent(finished):
    output, _ = finished
    # no NaN or Infinity, which are not JSON
    record = json.loads((output / "metrics.json").read_text(), parse_constant=pytest.fail)
    vae, lidvae, *il_lidvaes = record["models"]
    assert [vae["label"], lidvae["label"], *(m["label"] for m in il_lidvaes)] == ["VAE", "LIDVAE"] + 2 * ["IL-LIDVAE"]
    assert [vae["L"], lidvae["L"], *(m["L"] for m in il_lidvaes)] == [None, 0, 0.5, 2]
    assert vae["certified"] is None
    assert vae["fisher_lower_bound"] is None
    assert vae["step_ms_fused"] is None
    latent_dim = record["settings"]["latent_dim"]
    for model in record["models"]:
        assert len(model["kl_per_dimension"]) == len(model["variances"]) == latent_dim
        assert model["kl"] == pytest.approx(sum(model["kl_per_dimension"]))
        assert model["active_units"] == sum(variance >= 0.01 for variance in model["variances"])
        assert len(model["history"]) == record["settings"]["epochs"] == 3
        assert model["step_ms_autograd"] > 0
        assert 1 <= model["effective_sample_size"] <= record["settings"]["fisher_samples"]
    for model in (lidvae, *il_lidvaes):
        assert model["certified"] == pytest.approx(model["L"], rel=1e-6)
        assert model["measured"] >= model["certified"] * (1 - 1e-9)
        assert model["fisher"] >= model["fisher_lower_bound"] * (1 - 1e-9)
        assert model["step_ms_fused"] > 0
    assert il_lidvaes[0]["fisher_lower_bound"] > 0
    collapse = record["collapse"]
    assert collapse["active_units_of_vae"] == vae["active_units"]
    assert collapse["visible"] == (vae["active_units"] <= latent_dim / 4)
    assert record["versions"]["torch"] == torch.__version__
    assert record["command"] == "python examples/demo.py --quick --L 2 0.5 --epochs 3"


@pytest.mark.slow
def test_the_demo_leaves_figures_and_a_page_that_needs_nothing_else(finished):
    output, _ = finished
    for name in FIGURES:
        assert (output / name).read_bytes().startswith(b"\x89PNG"), name
    page = (output / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(FIGURES)
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "IL-LIDVAE" in page
    assert {path.name for path in output.iterdir()} == {*FIGURES, "metrics.json", "report.html", "checkpoints"}


@pytest.mark.slow
def test_the_demo_leaves_a_checkpoint_of_each_model(finished):
    output, _ = finished
    keys = [model["key"] for model in json.loads((output / "metrics.json").read_text())["models"]]
    assert keys == ["vae", "lidvae", "il-lidvae-L0.5", "il-lidvae-L2"]
    for key in keys:
        model = VAE.from_pretrained(output / "checkpoints" / key)
        assert model.sample(2).shape == (2, 64)


@pytest.mark.slow
def test_the_terminal_ends_with_the_table_and_the_verdict(finished):
    output, terminal = finished
    record = json.loads((output / "metrics.json").read_text())
    rows = [line.split() for line in terminal.splitlines() if line.startswith(("VAE", "LIDVAE", "IL-LIDVAE"))]
    assert len(rows) == 4
    for row, model in zip(rows, record["models"], strict=True):
        assert len(row) == 12
        assert row[2] == f"{model['nll']:.2f}"
        assert row[-1] == f"{model['step_ms_autograd']:.2f}"
    visible = record["collapse"]["visible"]
    assert ("The plain VAE collapses" in terminal) == visible
    assert ("does NOT visibly collapse" in terminal) == (not visible)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs: got 0"),
        (["--L", "0.5", "-1"], "--L: got -1.0"),
        (["--L", "nan"], "--L: got nan"),
        (["--threads", "0"], "--threads: got 0"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(tmp_path, arguments, message):
    process = run(*arguments, cwd=tmp_path)
    assert process.returncode == 2
    assert message in process.stderr
    assert not list(tmp_path.iterdir())
