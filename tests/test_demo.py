"""The demo, from its command line to the files it writes."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import demo_report
from ilvae_fast.vae import VAE

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"
FIGURES = ("advice.png", "comparison.png", "directions.png", "reconstructions.png", "samples.png")


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    command = [sys.executable, str(DEMO), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Output folder and printed text of one quick run."""
    folder = tmp_path_factory.mktemp("demo")
    process = run("--quick", "--L", "2", "0.5", "--epochs", "3", cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder / "runs" / "demo", process.stdout


@pytest.mark.slow
def test_the_demo_writes_consistent_numbers(finished):
    output, _ = finished
    # no NaN or Infinity, which are not JSON
    record = json.loads((output / "metrics.json").read_text(), parse_constant=pytest.fail)
    vae, lidvae, *il_lidvaes = record["models"]
    assert [model["label"] for model in record["models"]] == ["VAE", "LIDVAE"] + 3 * ["IL-LIDVAE"]
    advised = float(f"{record['advice']['L']:.3g}")
    assert [model["L"] for model in record["models"]] == [None, 0, advised, 0.5, 2]
    assert [model["advised"] for model in record["models"]] == [False, False, True, False, False]
    assert vae["certified"] is None
    assert vae["fisher_lower_bound"] is None
    assert vae["step_ms_fused"] is None
    latent_dim = record["settings"]["latent_dim"]
    for model in record["models"]:
        assert len(model["kl_per_dimension"]) == len(model["direction_variances"]) == latent_dim
        assert model["elbo_kl"] == pytest.approx(sum(model["kl_per_dimension"]))
        assert model["active_units"] == sum(variance >= 0.01 for variance in model["latent_variances"])
        assert model["active_directions"] == sum(variance >= 0.01 for variance in model["direction_variances"])
        assert model["mutual_information"] + model["kl_minus_mi"] == pytest.approx(model["elbo_kl"], rel=1e-5)
        # one baseline for all
        assert model["gain"] - model["elbo"] == pytest.approx(vae["gain"] - vae["elbo"])
        assert len(model["history"]) == record["settings"]["epochs"] == 3
        assert model["step_ms_autograd"] > 0
        assert 1 <= model["fisher_effective_sample_size"] <= record["settings"]["fisher_samples"]
    for model in (lidvae, *il_lidvaes):
        assert model["certified"] == pytest.approx(model["L"], rel=1e-6)
        assert model["measured"] >= model["certified"] * (1 - 1e-9)
        assert model["fisher"] >= model["fisher_lower_bound"] * (1 - 1e-9)
        assert model["step_ms_fused"] > 0
    assert il_lidvaes[0]["fisher_lower_bound"] > 0
    assert record["versions"]["torch"] == torch.__version__
    assert record["command"] == "python examples/demo.py --quick --L 2 0.5 --epochs 3"


@pytest.mark.slow
def test_the_demo_writes_figures_and_a_self_contained_page(finished):
    output, _ = finished
    for name in FIGURES:
        assert (output / name).read_bytes().startswith(b"\x89PNG"), name
    page = (output / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(FIGURES)
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    record = json.loads((output / "metrics.json").read_text())
    assert html.escape(record["advice"]["text"]) in page
    # two or three epochs are too few for any gain
    said = [html.escape(warning) for model in record["models"] for warning in model["warnings"]]
    assert said
    assert all(warning in page for warning in said)
    assert {path.name for path in output.iterdir()} == {*FIGURES, "metrics.json", "report.html", "checkpoints"}


@pytest.mark.slow
def test_the_demo_writes_a_checkpoint_of_each_model(finished):
    output, _ = finished
    keys = [model["key"] for model in json.loads((output / "metrics.json").read_text())["models"]]
    assert len(keys) == 5
    assert (keys[:2], keys[3:]) == (["vae", "lidvae"], ["il-lidvae-L0.5", "il-lidvae-L2"])
    sizes = []
    for key in keys:
        model = VAE.from_pretrained(output / "checkpoints" / key)
        assert model.sample(2).shape == (2, 64)
        sizes.append(sum(parameter.numel() for parameter in model.decoder.parameters()))
    # no decoder is larger than the others
    assert max(sizes) <= 1.1 * min(sizes)


@pytest.mark.slow
def test_the_terminal_ends_with_the_table_and_the_verdict(finished):
    output, terminal = finished
    record = json.loads((output / "metrics.json").read_text())
    assert re.sub(r"\s+", "", record["advice"]["text"]) in re.sub(r"\s+", "", terminal)  # before the table, wrapped
    rows = [line.split() for line in terminal.splitlines() if re.match(r"(IL-)?(LID)?VAE +(-|[0-9.]+) ", line)]
    assert len(rows) == 5
    for row, model in zip(rows, record["models"], strict=True):
        assert len(row) == 15
        assert row[2] == f"{model['nll']:.2f}"
        assert row[3] == f"{model['gain']:.2f}"
        assert row[8] == f"{model['active_directions']}/10"
        assert row[-1] == f"{model['step_ms_autograd']:.2f}"
    for text in [*demo_report.warnings(record), *demo_report.verdict(record)]:
        assert re.sub(r"\s+", "", text) in re.sub(r"\s+", "", terminal)


def judged(vae: dict, advised: dict, larger: dict, payable: int = 12) -> tuple[list[bool], str]:
    """For given numbers: whether each finding is the one that the demo is meant to show, and the verdict."""
    first = {"label": "VAE", "L": None, "advised": False, **vae}
    others = [("LIDVAE", 0.0, advised), ("IL-LIDVAE", 0.06, advised), ("IL-LIDVAE", 1.2, larger)]
    models = [first, *({"label": label, "L": L, "advised": L == 0.06, **numbers} for label, L, numbers in others)]
    record = {"settings": {"latent_dim": 10}, "advice": {"payable": payable, "high": 0.12}, "models": models}
    return [finding.shown for finding in demo_report.findings(record)], "\n".join(demo_report.verdict(record))


def numbers(directions: int, nll: float, gain: float) -> dict:
    return {
        "active_directions": directions, "nll": nll, "gain": gain, "elbo_kl": 5.0, "mutual_information": 4.0,
    }  # fmt: skip


def test_the_verdict_is_all_good_where_the_advised_model_is_better_by_every_measure():
    shown, text = judged(numbers(3, 2.0, 9.0), numbers(10, 1.5, 9.25), numbers(10, 9.0, -2.0))
    assert shown == [True, True, True]
    assert "pay for 10 latents. The plain VAE uses 3 directions: it collapses." in text
    assert "IL-LIDVAE with L = 0.06, as advised, uses 10 directions" in text
    assert "Against VAE: NLL is 0.50 nats better, gain is 0.25 nats larger." in text
    assert "Against LIDVAE, whose L is 0: NLL is the same within 0.1 nats" in text
    assert "L = 1.2, 10 times the upper end" in text
    assert "gain -2.0 (there 9.2); larger is not better." in text


@pytest.mark.parametrize(
    ("vae", "advised", "larger", "expected", "words"),
    [
        # many active directions do not make up for a worse fit
        (numbers(3, 1.0, 9.0), numbers(10, 1.5, 9.5), numbers(10, 9, -2), [True, False, True], "0.50 nats WORSE"),
        (numbers(3, 2.0, 9.0), numbers(10, 1.5, 8.5), numbers(10, 9, -2), [True, False, True], "0.50 nats SMALLER"),
        (numbers(3, 2.0, 9.0), numbers(9, 1.5, 9.5), numbers(10, 9, -2), [True, False, True], "uses 9 directions"),
        (numbers(3, 2.0, -3.0), numbers(10, 1.5, -1.0), numbers(10, 9, -2), [True, False, True], "ignores z"),
        (numbers(6, 2.0, 9.0), numbers(10, 1.5, 9.5), numbers(10, 9, -2), [False, True, True], "hardly a collapse"),
        (numbers(10, 2.0, 9.0), numbers(10, 1.5, 9.5), numbers(10, 9, -2), [False, True, True], "does NOT collapse"),
        (numbers(1, 2.0, 9.0), numbers(10, 1.5, 9.5), numbers(10, 1, 9.6), [True, True, False], "NOT worse"),
    ],
)
def test_the_verdict_says_what_is_not_better(vae, advised, larger, expected, words):
    shown, text = judged(vae, advised, larger)
    assert shown == expected
    assert words in text


def test_a_vae_is_not_blamed_for_latents_that_the_data_do_not_pay_for():
    shown, text = judged(numbers(2, 2.0, 1.0), numbers(5, 1.5, 1.5), numbers(10, 9, -2), payable=2)
    assert shown == [False, True, True]
    assert "pay for 2 latents" in text


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
