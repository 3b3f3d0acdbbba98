"""Every block of code of the pages works: Python is run, commands are run with little work."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pages import PAGES, ROOT, blocks, commands, name
from training_cases import run_command

# Blocks that other tests run, because they need more than a namespace.
ELSEWHERE = {
    "docs/internals/add-a-likelihood.md": "tests/test_recipes.py",
    "docs/internals/add-an-activation.md": "tests/test_recipes.py",
    "docs/internals/cuda.md": "tests/test_housekeeping.py",
    "docs/cure.md": "tests/test_interop.py",  # its changes; its Python runs here
    "docs/drop-in.md": "tests/test_interop.py",
    "docs/transport.md": "tests/test_readme.py",
}
RUN_HERE = [p for p in PAGES if blocks(p, "python") and (name(p) not in ELSEWHERE or blocks(p, "diff"))]
# What makes the work of a command small: given last, it wins.
CHEAPER = {
    "train": "--cpu --epochs 1 --set num_importance_samples=2 --set fisher_samples=2 --set eval_limit=40",
    "sweep": "--cpu --epochs 1 --set num_importance_samples=2 --set fisher_samples=2 --set eval_limit=40",
    "eval": "--importance-samples 2 --fisher-samples 2 --limit 40",
    "bench": "--steps 1",
    "examples/plain_vae.py": "--epochs 1",
    "examples/transport.py": "--steps 3",
}


def _ids(page: Path) -> str:
    return name(page)


def test_every_block_names_its_language():
    known = {"python", "sh", "diff", "cpp", "text", "yaml", "json"}
    unknown = {(name(page), block.language) for page in PAGES for block in blocks(page) if block.language not in known}
    assert unknown == set()


@pytest.mark.parametrize("page", RUN_HERE, ids=_ids)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """All blocks of a page, one after the other, as a reader would run them."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        exec(compile(block.source, name(page), "exec"), names)


def test_blocks_that_are_not_run_here_are_tested_elsewhere():
    others = {name(page) for page in PAGES if blocks(page, "diff", "cpp", "yaml", "json")}
    assert others <= set(ELSEWHERE)
    for page, test in ELSEWHERE.items():
        assert Path(page).name in (ROOT / test).read_text(), page


def _ilvae_fast(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] == "study":  # tests/training runs small ones
        assert (ROOT / words[1]).is_file()
        return
    if words[0] == "report" and (ROOT / "studies" / f"{words[1]}.yaml").is_file():
        return
    words = [word.replace("mnist", "digits") for word in words]  # which need no files
    printed = run_command(capsys, *words, *CHEAPER.get(words[0], "").split())
    assert printed.strip()


def _options_exist(words: list[str], known: str) -> None:
    options = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    assert {option for option in options if option not in known.replace("_", "-")} == set()


def _launcher(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The launcher's options exist, and what it would launch works in one process; test_distributed.py takes two."""
    at = words.index("-m")
    assert words[at + 1] == "ilvae_fast"
    command = [str(Path(sys.executable).with_name(words[0])), *words[1:2] * (words[0] == "accelerate"), "--help"]
    _options_exist(words[:at], subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    _ilvae_fast(words[at + 2 :], capsys)


def _python(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] == "-c":
        exec(words[1], {})
    elif words[0].endswith(".py"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [*words, *CHEAPER.get(words[0], "").split()])
            patch.syspath_prepend(str(ROOT / "examples"))
            runpy.run_path(words[0], run_name="__main__")
    elif words[:2] == ["-m", "venv"]:
        pass  # that of the standard library
    elif words[:2] == ["-m", "pytest"]:
        _pytest(words[2:], capsys)
    else:
        assert words[0] == "-m"
        assert words[1].partition(".")[0] == "benchmarks", words
        file = ROOT / "benchmarks" / f"{words[1].partition('.')[2] or '__main__'}.py"
        _options_exist(words[2:], file.read_text())  # tests/test_benchmarks.py runs them


def _pytest(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert all((ROOT / word).exists() for word in words if word.startswith("tests/")), words


def _pip(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Installed into an environment of its own it is by the tests of the package; extras exist."""
    project = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert all(re.search(rf"^{e} = \[", project, re.MULTILINE) for e in extra.split(",")), words


def _make(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in words if "=" not in word} <= set(targets)


def _shell(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """``. .venv/bin/activate``."""
    assert words == [".venv/bin/activate"]


HANDLERS: dict[str, Callable[[list[str], pytest.CaptureFixture[str]], None]] = {
    "ilvae-fast": _ilvae_fast,
    "python": _python,
    ".venv/bin/python": _python,
    "pip": _pip,
    "make": _make,
    ".": _shell,
}


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "sh")], ids=_ids)
def test_commands_of_a_page_work(page, tmp_path, monkeypatch, capsys):
    """All commands of a page in one folder, one after the other."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "docs" / "images").mkdir(parents=True)
    for folder in ("examples", "benchmarks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for program, *words in commands(page):
        if program in ("torchrun", "accelerate"):
            _launcher([program, *words], capsys)
        else:
            assert program in HANDLERS, f"{name(page)}: tests/docs does not know how to run {program!r}"
            HANDLERS[program](words, capsys)
