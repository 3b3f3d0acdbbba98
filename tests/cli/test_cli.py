"""The command line, from its arguments to the files it writes."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import typer
from rich.console import Console

from ilvae_fast import cli
from ilvae_fast.data import load
from ilvae_fast.training import TrainConfig, train
from ilvae_fast.training.state import latest
from ilvae_fast.vae import CONFIGURATIONS
from training_cases import interrupt, run_command, small

SMALL = [
    "--data", "toy", "--latent-dim", "2", "--epochs", "1", "--batch-size", "50", "--cpu",
    "--set", "data_options.num_train=200", "--set", "data_options.num_test=40", "--set", "num_importance_samples=2",
    "--set", "fisher_samples=2", "--set", "model_options.decoder_hidden=[[4],[5]]",
]  # fmt: skip

OF_A_FILE = [
    "--model", "vae", "--latent-dim", "1", "--epochs", "1", "--batch-size", "10", "--cpu",
    "--set", "num_importance_samples=2", "--set", "fisher_samples=2",
]  # fmt: skip
FEW = ["--importance-samples", "2", "--fisher-samples", "2"]


def test_train_eval_sample_report(tmp_path, capsys):
    folder = tmp_path / "runs" / "one"
    printed = run_command(capsys, "train", *SMALL, "--model", "il-lidvae", "--L", "0.5", "--output", str(folder))
    assert "one" in printed
    assert "certified" in printed
    printed = run_command(
        capsys, "eval", str(folder), "--importance-samples", "3", "--fisher-samples", "3", "--limit", "0"
    )
    assert "NLL" in printed
    assert json.loads((folder / "eval.json").read_text())["certified"] == pytest.approx(0.5)
    run_command(capsys, "sample", str(folder), "--count", "3", "--noise")
    assert (folder / "samples.npz").is_file()
    assert "one" in run_command(capsys, "report", str(tmp_path / "runs"))
    config = str(folder / "config.yaml")
    again = run_command(capsys, "train", "--config", config, "--set", "epochs=1")
    assert "0.5" in again  # done already


def test_sweep(tmp_path, capsys):
    grid = ["--L", "0.5", "--L", "1", "--seed", "3", "--output", str(tmp_path)]
    printed = run_command(capsys, "sweep", *SMALL, "--model", "lidvae", *grid)
    assert "L=1.0 seed=3" in printed
    assert len(json.loads((tmp_path / "sweep.json").read_text())) == 2


def test_a_sweep_takes_the_grid_of_its_configuration(tmp_path, capsys):
    one, other = tmp_path / "one", tmp_path / "other"
    run_command(capsys, "sweep", *SMALL, "--set", "L=0.5", "--set", "seed=4", "--output", str(one))
    rows = json.loads((one / "sweep.json").read_text())
    assert [(row["L"], row["seed"]) for row in rows] == [(0.5, 4)]
    config = str(one / "il-lidvae-L0.5-seed4" / "config.yaml")  # its own output is ignored
    run_command(capsys, "sweep", "--config", config, "--seed", "5", "--output", str(other))
    assert [(row["L"], row["seed"]) for row in json.loads((other / "sweep.json").read_text())] == [(0.5, 5)]
    printed = run_command(capsys, "sweep", *SMALL, "--set", "output=x", "--output", str(tmp_path / "third"), status=2)
    assert "set: got 'output=x', but each run has a folder of its own in --output" in printed
    assert not (tmp_path / "third").exists()


def test_a_sweep_lists_a_run_that_diverges_and_ends_with_status_1(tmp_path, capsys):
    grid = ["--model", "lidvae", "--seed", "0", "--lr", "1e30", "--set", "loss_limit=1e3", "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as caught:
        cli.main(["sweep", *SMALL, *grid])
    printed = capsys.readouterr()
    assert caught.value.code == 1
    assert "seed=0: diverged at step " in printed.out
    assert "Traceback" not in printed.err


def test_a_folder_that_cannot_be_written_is_found_before_measuring(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    run_command(capsys, "train", *SMALL, "--output", str(folder))

    def read_only(path, mode="r", *arguments, **options):
        if "x" in mode and str(path).startswith(str(folder)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return open(path, mode, *arguments, **options)

    monkeypatch.setattr("ilvae_fast._support.files.open", read_only, raising=False)
    monkeypatch.setattr("ilvae_fast.training.evaluate", lambda *args, **options: pytest.fail("measured"))
    assert run_command(capsys, "eval", str(folder), *FEW, status=2) == (
        f"error: {folder / 'eval.json'}: Read-only file system; change its permissions, or name another place\n"
    )
    assert "NLL" in run_command(capsys, "train", *SMALL, "--output", str(folder))  # of a finished run
    monkeypatch.undo()
    monkeypatch.setattr("ilvae_fast._support.files.open", read_only, raising=False)
    run_command(capsys, "eval", str(folder), *FEW, "--output", str(tmp_path / "eval.json"))
    assert json.loads((tmp_path / "eval.json").read_text())["nll"]
    assert "Read-only file system" in run_command(capsys, "train", *SMALL, "--output", str(folder / "x"), status=2)


def test_numbers_are_printed_whatever_happens(tmp_path, capsys, monkeypatch):
    from ilvae_fast._support import files

    folder, replace_file = tmp_path / "run", os.replace

    def full(old, new):
        if Path(new).name in ("metrics.json", "eval.json", "sweep.csv"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace_file(old, new)

    monkeypatch.setattr(files.os, "replace", full)
    for arguments, file in (
        (["train", *SMALL, "--output", str(folder)], "metrics.json"),
        (["eval", str(folder), *FEW], "eval.json"),
        (["sweep", *SMALL, "--model", "lidvae", "--output", str(folder)], "lidvae-seed0/metrics.json"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        printed = capsys.readouterr()
        assert caught.value.code == 2
        assert "NLL" in printed.out
        assert f"error: {folder / file}: No space left on device; free some space there" in printed.err
        assert not (folder / file).exists()


def test_measures_that_are_not_finite_are_shown_as_such(tmp_path, capsys):
    folder = tmp_path / "one"
    run_command(capsys, "train", *SMALL, "--output", str(folder))
    config = json.loads((folder / "model" / "config.json").read_text())
    config["likelihood_options"] = {"scale": 1e-25}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    printed = run_command(capsys, "eval", str(folder), "--importance-samples", "2", "--fisher-samples", "2")
    heading, _, row = map(str.split, printed.splitlines()[-3:])
    assert heading[:4] == ["run", "NLL", "gain", "KL"]
    assert row[:5] == ["one", "not", "finite", "not", "finite"]
    assert json.loads((folder / "eval.json").read_text())["not_finite"] == ["elbo", "gain", "nll"]
    cli.display.show([("a", {"nll": None, "certified": None, "fisher": None}), ("b", {"nll": 1.5, "certified": None})])
    heading, _, absent, _ = map(str.split, capsys.readouterr().out.splitlines())
    assert (heading, absent) == (["run", "NLL"], ["a"])


@pytest.mark.parametrize("width", [200, 140, 80, 60, 40])
def test_a_number_is_never_shortened(width, capsys, monkeypatch):
    monkeypatch.setattr(cli.display, "console", lambda: Console(width=width))
    values = (123456.7, -1.23456e-5, 1.2e-5, 23.456, 0.0123, 10, 9, 4.5e-10, 6e8, 7.25, 0.25, 0.3, 0.999)
    one = {key: value for (_, key), value in zip(cli.display.COLUMNS, values, strict=True)}
    other = {key: 2 * value for key, value in one.items()}
    cli.display.show([("runs/a name of forty letters and some more", one), ("b", {**other, "not_finite": ["nll"]})])
    lines = capsys.readouterr().out.splitlines()
    words = " ".join(lines).split()
    assert "…" not in "".join(words)
    for row in (one, other):
        for key, value in row.items():
            assert (f"{value:.4g}" in words) or (row is other and key == "nll"), (key, value)
    assert "not finite" in " ".join(words)
    assert max(map(len, lines)) <= width
    headings = [heading for heading, _ in cli.display.COLUMNS]
    assert all(set(heading.split()) <= set(words) for heading in headings)


def test_warnings_are_printed_under_the_table(tmp_path, capsys):
    # an L far beyond the spread of the data fits worse than their mean
    steep = ["--model", "il-lidvae", "--L", "900", "--output", str(tmp_path / "steep")]
    printed = run_command(capsys, "train", *SMALL, *steep)
    measures = json.loads((tmp_path / "steep" / "metrics.json").read_text())
    assert measures["gain"] < 0
    (*_, warning) = measures["warnings"]
    for shown in (printed, run_command(capsys, "report", str(tmp_path))):
        words = " ".join(shown.split())
        assert f"steep: {warning}" in words
        assert words.index("KL-MI") < words.index(warning)
    assert "Try a smaller L than 900 (`ilvae-fast advise`" in warning
    few = ["--importance-samples", "2", "--fisher-samples", "2"]
    assert f"steep: {warning[:50]}" in " ".join(run_command(capsys, "eval", str(tmp_path / "steep"), *few).split())


def test_runs_of_an_earlier_version_are_reported(tmp_path, capsys):
    """Their metrics.json has no gain, no directions and no warnings."""
    earlier = {"nll": 1.5, "elbo_kl": 2.25, "active_units": 2, "mutual_information": 0.125, "certified": None}
    for name, measures in (("a", earlier), ("b", {**earlier, "gain": -0.5, "warnings": ["Beware [of] this."]})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(measures))
    heading, _, first, second, warning = map(str.split, run_command(capsys, "report", str(tmp_path)).splitlines())
    assert heading == ["run", "NLL", "gain", "KL", "MI", "active"]
    assert first == ["a", "1.5", "2.25", "0.125", "2"]
    assert second == ["b", "1.5", "-0.5", "2.25", "0.125", "2"]
    assert warning == ["b:", "Beware", "[of]", "this."]


def test_images_and_text_are_shown(tmp_path, capsys):
    quick = ["--epochs", "1", "--cpu", "--set", "num_importance_samples=2", "--set", "fisher_samples=2"]
    few = [*quick, "--set", "eval_limit=20", "--output"]
    run_command(capsys, "train", "--data", "digits", "--model", "vae", *few, str(tmp_path / "image"))
    run_command(capsys, "sample", str(tmp_path / "image"), "--count", "9")
    assert (tmp_path / "image" / "samples.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "poem.txt").write_text("abc\ncab\n" * 60)
    text = ["--data", f"text:{tmp_path / 'poem.txt'}", "--batch-size", "54", "--model", "svae", "--latent-dim", "1"]
    run_command(capsys, "train", *text, *few, str(tmp_path / "text"), "--set", "data_options.length=4")
    lines = run_command(capsys, "sample", str(tmp_path / "text"), "--count", "3", "--noise").splitlines()
    assert len(lines) == 3
    poem = str(tmp_path / "samples.txt")
    run_command(capsys, "sample", str(tmp_path / "text"), "--count", "3", "--noise", "--output", poem)
    assert Path(poem).read_text().splitlines() == lines


def test_info_and_bench(capsys):
    assert "il-lidmvae" in run_command(capsys, "info")
    assert "native" in run_command(capsys, "bench", "--batch-size", "8", "--steps", "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--model", "il-lidva"], r"error: model: got 'il-lidva'"),
        (["train", "--set", "epoch=1"], "nearest: 'epochs'"),
        (["train", "--data", "mnist", "--data-root", "nowhere"], "/nowhere/mnist and "),
        (["eval", "nowhere"], "run: no finished run in 'nowhere'"),
        (["report", "nowhere"], "what: no metrics.json under 'nowhere'"),
        (["report", "toy", "--results", "nowhere"], "results: no runs.csv in nowhere"),
        (["sample", "nowhere"], "run: no finished run"),
    ],
)
def test_user_errors_are_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    printed = run_command(capsys, *arguments, status=2)
    assert message in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.rglob("*.json"))


def test_a_run_works_from_any_folder_and_its_data_may_move(tmp_path, capsys, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    x = np.random.default_rng(0).normal(size=(40, 2, 2)).astype(np.float32)
    np.savez(first / "x.npz", x_train=x)
    monkeypatch.chdir(first)
    run_command(capsys, "train", "--data", "npz:x.npz", *OF_A_FILE)
    folder = first / "runs" / "npz-x.npz-vae-seed0"
    config = TrainConfig.from_yaml(folder / "config.yaml")
    assert (config.data, config.output) == (f"npz:{first / 'x.npz'}", str(folder))
    measures = (folder / "metrics.json").read_text()

    monkeypatch.chdir(second)
    run_command(capsys, "eval", "../first/runs/npz-x.npz-vae-seed0", *FEW)
    again = ["train", "--config", str(folder / "config.yaml")]
    run_command(capsys, *again)
    (first / "x.npz").rename(second / "y.npz")
    run_command(capsys, "sample", str(folder))  # which needs no data
    assert f"no file '{first / 'x.npz'}'" in run_command(capsys, "eval", str(folder), *FEW, status=2)
    run_command(capsys, "eval", str(folder), "--data", "npz:y.npz", *FEW)
    assert "wanted npz:FILE, where the data of the run are now" in run_command(
        capsys, "eval", str(folder), "--data", "digits", *FEW, status=2
    )
    run_command(capsys, *again, "--data", "npz:y.npz")
    assert TrainConfig.from_yaml(folder / "config.yaml").data == f"npz:{second / 'y.npz'}"
    assert (folder / "metrics.json").read_text() == measures
    assert not (folder / "eval.json").exists()  # training is over, but all was checked and measured again

    (tmp_path / "third").mkdir()
    (second / "y.npz").rename(tmp_path / "third" / "y.npz")
    run_command(capsys, "eval", str(folder), "--data-root", "../third", *FEW)
    np.savez(tmp_path / "third" / "y.npz", x_train=x + 1)
    other = ["--data", "npz:../third/y.npz"]
    printed = run_command(capsys, "eval", str(folder), *other, *FEW, status=2)
    assert f"error: data: the training data in npz:{tmp_path / 'third' / 'y.npz'} have the checksum" in printed
    assert "data: got training data with the checksum" in run_command(capsys, *again, *other, status=2)
    assert (folder / "metrics.json").read_text() == measures


def test_a_text_is_sampled_without_its_file(tmp_path, capsys):
    (tmp_path / "poem.txt").write_text("abc\ncab\n" * 60)
    text = ["--data", f"text:{tmp_path / 'poem.txt'}", "--model", "svae", "--set", "data_options.length=4"]
    run_command(capsys, "train", *OF_A_FILE, *text, "--output", str(tmp_path / "run"), "--set", "eval_limit=9")
    lines = run_command(capsys, "sample", str(tmp_path / "run"), "--count", "3")
    (tmp_path / "poem.txt").unlink()
    assert run_command(capsys, "sample", str(tmp_path / "run"), "--count", "3") == lines
    (tmp_path / "run" / "data.json").unlink()  # as in a run of an earlier version
    assert "no file" in run_command(capsys, "sample", str(tmp_path / "run"), status=2)


def test_an_interrupted_run_goes_on_with_moved_data(tmp_path):
    np.savez(tmp_path / "x.npz", x_train=np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32))
    config = small(tmp_path / "run", data=f"npz:{tmp_path / 'x.npz'}", data_options={})
    with pytest.raises(KeyboardInterrupt):
        train(config, interrupt)
    (tmp_path / "x.npz").rename(tmp_path / "z.npz")
    steps = []
    train(replace(config, data=f"npz:{tmp_path / 'z.npz'}"), lambda step, *_: steps.append(step))
    assert steps[0] == 6  # after the checkpoint at the end of the first epoch
    with pytest.raises(ValueError, match=r"output: .* holds another run: data was "):
        train(replace(config, data="digits"))


def test_a_data_root_is_for_files_named_by_their_path_too(tmp_path, monkeypatch):
    for place in ("here", "root"):
        (tmp_path / place).mkdir()
        np.savez(tmp_path / place / "both.npz", x_train=np.ones((20, 2), np.float32) * (place == "root"))
    np.savez(tmp_path / "here" / "here.npz", x_train=np.ones((20, 2), np.float32))
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    assert load("npz:both.npz").train.sum() == 0
    assert load("npz:both.npz", "../root").train.sum() > 0
    assert load("npz:here.npz", "../root").train.sum() > 0
    assert load(f"npz:{tmp_path / 'here' / 'both.npz'}", "../root").train.sum() == 0
    monkeypatch.setenv("ILVAE_FAST_DATA_ROOT", "~/../root")
    assert load("npz:both.npz").train.sum() > 0
    assert load("npz:~/both.npz").train.sum() == 0
    with pytest.raises(FileNotFoundError, match=rf"no file '{tmp_path / 'root' / 'neither.npz'}'"):
        load("npz:neither.npz")
    config = TrainConfig(data="npz:both.npz", output="~/runs/one").located()
    assert (config.data, config.output) == (f"npz:{tmp_path / 'root' / 'both.npz'}", str(tmp_path / "here/runs/one"))
    assert TrainConfig(data="mnist").located().data_root == str(tmp_path / "root")
    assert TrainConfig(data="digits").located().data_root is None
    assert TrainConfig(data="digits", data_root="x").located().data_root == str(tmp_path / "here" / "x")


def test_report_shows_the_good_runs_and_lists_the_bad_ones(tmp_path, capsys):
    contents = {
        "good": '{"nll": 1.25}', "empty": "", "cut": '{"nll": 1', "list": "[1]", "words": '{"nll": "many"}',
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(content)
    for options in ([], ["--json"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(["report", str(tmp_path), *options])
        printed = capsys.readouterr()
        assert caught.value.code == 1
        assert "good" in printed.out
        assert "1.25" in printed.out
        named = [line.split(": ")[1] for line in printed.err.splitlines()]
        assert named == [str(tmp_path / name / "metrics.json") for name in ("cut", "empty", "list", "words")]
        assert all("remove it, and `ilvae-fast train --config`" in line for line in printed.err.splitlines())
    assert json.loads(printed.out) == [{"run": "good", "nll": 1.25}]
    assert "good" in run_command(capsys, "report", str(tmp_path / "good"))


@pytest.mark.parametrize("name", ["model/config.json", "model/model.safetensors", "config.yaml", "data.json"])
@pytest.mark.parametrize("size", [0, 50])
def test_a_damaged_file_of_a_run_is_one_line(tmp_path, capsys, finished, name, size):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:size])
    printed = run_command(capsys, "sample", str(folder), status=2)
    assert printed.startswith(f"error: {folder / name}: ")
    assert printed.count("\n") == 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.raises(SystemExit):
        cli.main(["train", *SMALL, "--output", str(folder)])
    return folder


@pytest.mark.parametrize("name", ["lr[/x]", "[bold]", "a [red] one", ":smile:"])
def test_names_are_no_markup(tmp_path, capsys, finished, name):
    folder = tmp_path / name.replace("/", os.sep)
    shutil.copytree(finished, folder)
    assert f"in {folder}" in run_command(capsys, "train", *SMALL, "--output", str(folder))
    shown = run_command(capsys, "report", str(tmp_path))
    assert name in shown
    assert folder.name in run_command(capsys, "eval", str(folder), *FEW)
    with cli.display.progress_bar(name) as progress:
        progress(1, 2, {})


def test_paths_may_begin_with_a_tilde_and_must_not_be_empty(tmp_path, capsys, monkeypatch, finished):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(finished.parent)
    shutil.copytree(finished, tmp_path / "run")
    run_command(capsys, "sample", "~/run")
    assert (tmp_path / "run" / "samples.npz").is_file()
    run_command(capsys, "report", "~/run")
    run_command(capsys, "train", "--config", "~/run/config.yaml", "--output=~/run")
    run_command(capsys, "eval", "~/run", *FEW, "--output=~/deep/eval.json")
    assert (tmp_path / "deep" / "eval.json").is_file()
    assert not (finished.parent / "~").exists()
    for command, *option in (
        ("train", "--output"), ("train", "--data-root"), ("train", "--config"), ("sweep", "--output"),
        ("advise", "--picture"), ("sample",), ("eval",),
    ):  # fmt: skip
        assert "got ''" in run_command(capsys, command, *option, "", status=2)
    assert "File name too long; choose a shorter name" in run_command(
        capsys, "train", *SMALL, "--output", "x" * 300, status=2
    )


def test_results_are_on_stdout_and_progress_on_stderr(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli.display, "_SECONDS", 0.0)
    with pytest.raises(SystemExit):
        cli.main(["train", *SMALL, "--set", "log_every=1", "--output", str(tmp_path / "run")])
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == f"in {tmp_path / 'run'}"
    assert printed.out.split()[:2] == ["run", "NLL"]
    lines = printed.err.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'run'}: 1 of 4, loss ")
    assert any(line.endswith("4 of 4, measuring, 100%") for line in lines)


def test_a_line_of_progress_comes_every_30_seconds(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with cli.display.progress_bar("a run") as progress:
        for step in range(1, 101):
            now[0] += 1
            progress(step, 100, {"loss": 2.5} if step % 10 == 0 else {})
    assert capsys.readouterr().err.splitlines() == [f"a run: {step} of 100, loss 2.50" for step in (30, 60, 90)]


def test_a_run_without_a_file_is_measured_on_its_own_data(capsys, finished):
    printed = run_command(capsys, "eval", str(finished), "--data", "digits", *FEW, status=2)
    assert printed == "error: data: got 'digits' for a run on toy, wanted none: it has no file\n"


def test_eval_prints_json(capsys, finished):
    measures = json.loads(run_command(capsys, "eval", str(finished), *FEW, "--json"))
    assert measures == json.loads((finished / "eval.json").read_text())


@pytest.mark.parametrize("shape", [(3, 2), (1, 3, 2), (3, 4, 5)])
def test_samples_have_the_shape_of_the_data(tmp_path, capsys, shape):
    path = tmp_path / "x.npz"
    np.savez(path, x_train=(np.random.default_rng(0).random((40, *shape)) * 255).astype(np.uint8))
    folder = tmp_path / "run"
    run_command(capsys, "train", *OF_A_FILE, "--data", f"npz:{path}", "--output", str(folder))
    assert run_command(capsys, "sample", str(folder), "--count", "9") == f"{folder / 'samples.png'}\n"
    drawn = plt.imread(folder / "samples.png")
    height, width = shape[-2:]
    zoom = 96 // height
    assert drawn.shape[:2] == (2 * height * zoom, 8 * width * zoom)
    arrays = tmp_path / "deep" / "samples.npz"
    run_command(capsys, "sample", str(folder), "--count", "9", "--output", str(arrays))
    samples = np.load(arrays)["samples"]
    assert samples.shape == (9, *shape)
    pixel = samples[0].reshape(-1, height, width)[:, 0, -1]
    np.testing.assert_allclose(drawn[0, width * zoom - 1, :3], np.broadcast_to(pixel, 3), atol=1 / 255)
    assert "wanted .npz or .png" in run_command(capsys, "sample", str(folder), "--output", "x.jpg", status=2)


def test_every_default_that_help_prints_can_be_given_back():
    """Those of fields, in the text of an option or below them, and those of other options."""
    walked = 0
    for name, command in typer.main.get_command(cli.app).commands.items():
        required = [p.name for p in command.params if p.param_type_name == "argument"]
        required += ["--output=x"] if name == "sweep" else []
        fields = {}
        for option in (p for p in command.params if p.param_type_name == "option"):
            printed = re.search(r"Default: (.*)\.$", option.help or "")
            default = printed[1] if printed else option.default if option.show_default else None
            if default is None or option.is_flag:
                continue
            context = command.make_context(name, [*required, option.opts[0], str(default)], resilient_parsing=False)
            given = context.params[option.name]
            walked += 1
            if printed:
                fields[{"constant": "L"}.get(option.name, option.name)] = given
            else:
                assert given == option.default, (name, option.name)
        assert replace(TrainConfig(), **fields) == TrainConfig(), name
        if (command.epilog or "").startswith("Fields"):
            assignments = command.epilog.partition("defaults: ")[2].split(", ")
            assert [a.partition("=")[0] for a in assignments] == list(TrainConfig().to_dict())
            for assignment in assignments:
                changed = replace(TrainConfig(), epochs=77, L=0.5, output="x").updated([assignment])
                field = assignment.partition("=")[0]
                assert getattr(changed, field) == getattr(TrainConfig(), field), assignment
    assert walked > 25


def test_a_text_and_a_model_of_sequences_work_with_the_defaults(tmp_path, capsys):
    poem = tmp_path / "poem.txt"
    poem.write_text("the quick brown fox jumps over the lazy dog\npack my box with five dozen liquor jugs\n" * 80)
    short = ["--epochs", "1", "--cpu", "--set", "num_importance_samples=2", "--set", "eval_limit=4"]
    text = ["--data", f"text:{poem}", "--model", "il-lidsvae"]
    run_command(capsys, "train", *text, *short, "--output", str(tmp_path / "run"))
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    tokens = config["likelihood_options"]["num_categories"]
    assert config["autoregressive_hidden"] + config["latent_dim"] == tokens < 100
    poem.write_text("abc\ncab\n" * 80)
    assert run_command(capsys, "train", *text, *short, "--output", str(tmp_path / "few"), status=2) == (
        "error: latent_dim: got 10 for 'il-lidsvae', wanted less than 5, the number of different tokens in "
        f"text:{poem}\n"
    )
    assert not (tmp_path / "few" / "config.yaml").exists()


def test_the_name_of_a_data_set_is_refused_as_such(capsys):
    for command in ("train", "advise", "bench"):
        assert "error: data: got 'digit', wanted one of " in run_command(capsys, command, "--data", "digit", status=2)


def start(*arguments: str, cwd: Path) -> subprocess.Popen:
    """``ilvae-fast ARGUMENTS`` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "ilvae_fast", *arguments], cwd=cwd, env=environment, **pipes)


def test_ctrl_c_saves_says_so_and_exits_130(tmp_path, capsys):
    command = ["train", *SMALL, "--epochs", "100000", "--output", str(tmp_path / "run")]
    process = start(*command, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 60
        while not (checkpoint := latest(tmp_path / "run" / "checkpoints")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=60)
    finally:
        process.kill()
    newest = latest(tmp_path / "run" / "checkpoints")
    assert process.returncode == 130
    assert newest.name > checkpoint.name
    assert printed.splitlines()[-1] == (
        f"interrupted: the run in {tmp_path / 'run'} goes on from step {int(newest.name[5:])} the next time"
    )
    assert "Traceback" not in printed


def test_ctrl_c_says_so_wherever_it_comes(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("ilvae_fast.operators.extension.build_info", interrupted)
    assert run_command(capsys, "info", status=130) == "\ninterrupted\n"


def test_a_bug_is_not_dressed_as_an_error_of_the_user(capsys, monkeypatch):
    def none_plus_one():
        return None + 1

    def read():
        raise EOFError("no more")

    for broken, words in ((none_plus_one, "unsupported operand"), (lambda: int("x"), "invalid literal")):
        monkeypatch.setattr("ilvae_fast.operators.extension.build_info", broken)
        with pytest.raises((TypeError, ValueError), match=words):
            cli.main(["info"])
    monkeypatch.setattr("ilvae_fast.operators.extension.build_info", read)
    printed = run_command(capsys, "info", status=1)
    assert "Aborted" not in printed
    assert printed.endswith("EOFError: no more\n")


@pytest.mark.parametrize("command", ["train", "advise", "eval", "sample", "sweep", "report", "bench", "info"])
def test_help_of_each_command_says_what_it_does(capsys, command):
    assert "Usage" in run_command(capsys, command, "--help")


def test_help_names_every_field_and_model(capsys):
    printed = run_command(capsys, "train", "--help")
    for name in (*TrainConfig().to_dict(), *CONFIGURATIONS):
        assert name in printed


@pytest.mark.slow
def test_the_module_is_a_command(tmp_path):
    process = start("train", *SMALL, "--L", "0.5", "--output", str(tmp_path / "run"), cwd=tmp_path)
    _, printed = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    assert (tmp_path / "run" / "metrics.json").is_file()
