"""What a stranger reads first agrees with the repository: files, versions, linters, links, names and figures."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
from pathlib import Path

import pytest
import yaml

import pages
from executor import COMPILER
from ilvae_fast import __version__

ROOT = Path(__file__).parent.parent
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
INTERNALS = sorted((ROOT / "docs" / "internals").glob("*.md"))
PAGES = [CONTRIBUTING, *INTERNALS]
RESULTS = ROOT / "benchmarks" / "results"
SOURCES = [ROOT / "csrc", ROOT / "ilvae_fast", ROOT / "tests", ROOT / "benchmarks", ROOT / "docs", ROOT / "examples"]
SKIPPED = {"__pycache__", "build", ".venv"}


def _text(path: str | Path) -> str:
    return (ROOT / path).read_text()


def _files() -> list[Path]:
    """The files of the source tree, without what was built."""
    below = [file for folder in SOURCES for file in folder.rglob("*") if not SKIPPED & set(file.parts)]
    return [file for file in [*below, *ROOT.iterdir()] if file.is_file()]


def _rows(page: str, first: str) -> list[list[str]]:
    """Cells of the table whose heading starts with ``first``, without heading and rule."""
    return _table(page, f" {first} |")


def _table(page: str, heading: str) -> list[list[str]]:
    """The same for the table whose heading starts with ``heading``, behind the first bar."""
    table = page[page.index(f"\n|{heading}") :].strip().split("\n\n")[0]
    return [[c.strip() for c in re.split(r"(?<!\\)\|", line.strip("|"))] for line in table.splitlines()[2:]]


# Versions and metadata


def test_the_citation_is_of_this_version_and_names_the_paper():
    citation = yaml.safe_load(_text("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)  # what the format requires
    assert citation["version"] == __version__
    assert f'license = "{citation["license"]}"' in _text("pyproject.toml")
    holder = re.search(r"Copyright \(c\) \d+, (.*)", _text("LICENSE"))
    assert holder
    assert [author["name"].lower() for author in citation["authors"]] == [holder[1].lower()]
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]][:1] == ["Kinoshita"]
    assert paper["identifiers"][0]["value"].removeprefix("arXiv:") in _text("README.md")


def test_the_changelog_has_this_version_on_top_and_is_of_its_form():
    text = _text("CHANGELOG.md")
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    for version in versions:
        assert re.fullmatch(r"\[(Unreleased|\d+\.\d+\.\d+)\](?(1).*)", version)
    newest = next(version for version in versions if version != "[Unreleased]")
    assert re.fullmatch(rf"\[{re.escape(__version__)}\] - (Unreleased|\d{{4}}-\d\d-\d\d)", newest)
    kinds = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert kinds
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_editors_wrap_where_the_linters_do():
    columns = {
        re.search(pattern, _text(file))[1]
        for file, pattern in [
            (".editorconfig", r"max_line_length = (\d+)"),
            ("pyproject.toml", r"line-length = (\d+)"),
            (".clang-format", r"ColumnLimit: (\d+)"),
        ]
    }
    assert len(columns) == 1


# Linters


def _make_lint() -> list[list[str]]:
    """The commands of `make lint`."""
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", _text("Makefile"), re.MULTILINE)
    assert recipe
    return [line.strip().removeprefix("$(BIN)/").split() for line in recipe[1].splitlines()]


def test_pre_commit_runs_the_linters_of_make_lint_in_their_versions():
    (local,) = yaml.safe_load(_text(".pre-commit-config.yaml"))["repos"]
    hooks = [hook["entry"].split() for hook in local["hooks"]]
    modes = {"check", "format", "--check", "--dry-run", "--Werror"}

    def essence(command: list[str]) -> tuple[str, ...]:
        return command[0], *sorted(modes & set(command))

    assert sorted(map(essence, hooks)) == sorted(map(essence, _make_lint()))
    pins = {pin for hook in local["hooks"] for pin in hook["additional_dependencies"]}
    assert {pin.split("==")[0] for pin in pins} == {command[0] for command in _make_lint()}
    for pin in pins:
        assert f'"{pin}"' in _text("pyproject.toml")


def test_pre_commit_formats_the_files_that_make_lint_formats():
    (command,) = (command for command in _make_lint() if command[0] == "clang-format")
    suffixes = re.findall(r"'\*(\.\w+)'", " ".join(command))
    folders = command[command.index("$$(find") + 1 : command.index("-name")]
    files = [str(f.relative_to(ROOT)) for folder in folders for f in (ROOT / folder).rglob("*") if f.is_file()]
    hooks = yaml.safe_load(_text(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    (pattern,) = (hook["files"] for hook in hooks if hook["id"] == "clang-format")
    assert len(files) > 50
    assert [f for f in files if re.search(pattern, f)] == [f for f in files if Path(f).suffix in suffixes]


# CI and issues


def test_ci_runs_the_gate_and_the_ends_of_what_is_supported():
    workflow = yaml.safe_load(_text(".github/workflows/ci.yml"))
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert ".ci/run" in commands
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    assert any(command.startswith("make test") for command in commands)
    matrix = workflow["jobs"]["versions"]["strategy"]["matrix"]
    project = _text("pyproject.toml")
    assert f'requires-python = ">={matrix["python"][0]}"' in project
    oldest, newest = matrix["torch"]
    allowed = re.search(r"^TORCH \?= (.*)$", _text("Makefile"), re.MULTILINE)
    assert allowed
    assert newest == allowed[1]
    assert f'"{oldest.replace("==", ">=").removesuffix(".*")}"]' in project  # to build
    assert f'OLDEST_TORCH = "{oldest.removeprefix("torch==").removesuffix(".*")}"' in _text("setup.py")  # to run
    assert newest.startswith(oldest.replace("==", ">=").removesuffix(".*"))


def test_a_bug_report_asks_for_build_torch_and_code():
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    forms = {file.name: yaml.safe_load(file.read_text()) for file in folder.glob("*.yml")}
    body = forms["bug_report.yml"]["body"]
    required = {f["id"]: f["attributes"] for f in body if f.get("validations", {}).get("required")}
    assert {"build", "torch", "code"} <= set(required)
    assert "il.build_info()" in required["build"]["description"]
    assert "torch.__version__" in required["torch"]["description"]
    for name, form in forms.items():
        if name != "config.yml":
            assert {"name", "description", "body"} <= set(form)
            assert all({"type", "attributes"} <= set(field) for field in form["body"])


# Names


def test_the_map_of_the_code_is_that_of_the_tree():
    listed = re.search(r"<!-- paths:.*?-->(.*)<!-- end of paths -->", _text(CONTRIBUTING), re.DOTALL)
    assert listed
    paths = re.findall(r"^\| `(.*?)` \|", listed[1], re.MULTILINE)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    folders = {
        f"{file.parent.relative_to(ROOT)}/" for root in ("csrc", "ilvae_fast") for file in ROOT.glob(f"{root}/*/*.*")
    }
    assert {f for f in folders if "__pycache__" not in f} <= set(paths)


@pytest.mark.parametrize("page", [pytest.param(p, id=p.name) for p in PAGES])
def test_files_that_a_page_names_exist(page):
    known = _files()
    names, paths = {file.name for file in known}, {str(file.relative_to(ROOT)) for file in known}
    spans = re.findall(r"`([\w./-]+\.(?:h|cpp|cuh|cu|py|pyi|md|json|sh|in))`", pages.prose(page))
    made = {"_build.json"}
    wrong = [span for span in spans if span not in (paths if "/" in span else names | made)]
    assert [span for span in wrong if not (page.parent / span).exists()] == []


@pytest.mark.parametrize("page", [CONTRIBUTING, ROOT / "README.md"], ids=lambda page: page.name)
def test_make_targets_that_a_page_names_exist(page):
    targets = set(re.findall(r"^([a-z]+):", _text("Makefile"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)\b", page.read_text(), re.MULTILINE))
    assert named
    assert named <= targets


def test_tests_and_benchmarks_that_contributing_names_exist():
    text = _text(CONTRIBUTING)
    modules = set(re.findall(r"-m benchmarks\.(\w+)", text))
    assert modules
    assert [name for name in modules if not (ROOT / "benchmarks" / f"{name}.py").exists()] == []
    assert [name for name in re.findall(r"tests/\w+\.py", text) if not (ROOT / name).exists()] == []


def _anchor(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _anchors(page: Path) -> set[str]:
    return {_anchor(h) for h in re.findall(r"^#+ (.*)$", pages.prose(page), re.MULTILINE)}


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", pages.prose(page)):
        file, _, anchor = target.partition("#")
        destination = page.parent / file if file else page
        assert destination.exists(), target
        assert not anchor or anchor in _anchors(destination), target


def test_every_derivative_of_the_matrix_has_its_tests():
    page = _text("docs/derivatives.md")
    matrix = _table(page, " | eager")  # an empty first cell
    assert len(matrix) > 10
    for row in matrix:
        assert all(re.search(r"\[\d+(, \d+)*\]$", cell) for cell in row[1:] if cell), row
    tests = {number: re.findall("`([^`]+)`", cell) for number, cell in _table(page, " | test")}
    cited = re.findall(r"\[(\d+(?:, \d+)*)\]", page)
    assert {number for numbers in cited for number in numbers.split(", ")} == set(tests)
    for file, name in tests.values():
        assert f"\ndef {name}(" in _text(file), name


def test_sections_that_code_cites_exist():
    pages = r"((?:docs/internals|benchmarks)/[\w-]+\.md)#([\w-]+)"
    for file in _files():
        if file.suffix in (".py", ".h", ".cpp", ".cuh", ".cu"):
            for page, anchor in re.findall(pages, file.read_text()):
                assert anchor in _anchors(ROOT / page), f"{file.name}: {page}#{anchor}"


def test_the_glossary_has_names_of_the_cuda_kernels():
    code = "\n".join(file.read_text() for file in (ROOT / "csrc" / "cuda").rglob("*.*"))
    names = [
        name for cell, _ in _rows(_text("docs/internals/cuda.md"), "name") for name in re.findall(r"`(\w+)`", cell)
    ]
    assert len(names) > 40
    assert [name for name in names if not re.search(rf"\b{name}\b", code)] == []


def test_the_figure_of_the_warps_is_what_compiles(tmp_path):
    (facts,) = re.findall(r"```cpp\n(.*?)```", _text("docs/internals/cuda.md"), re.DOTALL)
    source = tmp_path / "figure.cpp"
    source.write_text(f'#include "cuda/fused.h"\nusing namespace ilvae::cuda;\n{facts}')
    command = [COMPILER, "-std=c++20", "-fsyntax-only", f"-I{ROOT / 'csrc'}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Figures


def _result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _by_row(page: str, before: str) -> dict[str, list[str]]:
    """The columns of the first table after the words ``before``, by their heading."""
    table = page[page.index(before) :].split("\n|", 1)[1].split("\n\n")[0]
    heading, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    return {name: [row[i] for row in rows] for i, name in enumerate(heading) if name}


def test_figures_of_the_cpu_are_in_the_results():
    page = _text("docs/internals/cpu.md")
    ceiling = {row["row"]: row["fraction_of_matmul_ceiling"] for row in _result("cpu-small")["rows"]}
    for row, cells in _by_row(page, "`cpu-small.json`").items():
        assert cells == [f"{100 * ceiling[row]:.0f} %"], row

    suites = [{r["row"]: r["ratio"] for r in _result(f"cpu-{isa}-full")["rows"]} for isa in ("avx512", "avx2")]
    for row, cells in _by_row(page, "`cpu-avx512-full.json`").items():
        assert cells == [f"{ratios[row]:.2f}" for ratios in suites], row

    kept = {row["row"]: row["bytes"] for row in _result("memory")["rows"]}
    for row, cells in _by_row(page, "`memory.json`").items():
        ours, eager = (kept[row][name]["kept"] / 1000 for name in ("ours", "eager double backward"))
        assert cells == [f"{ours:.0f}, {eager:.0f}"], row

    errors = _result("accuracy")["errors"]["float32"]["map"]
    assert f"(`accuracy.json`): {errors['ours']:.1e} for ours, {errors['eager']:.1e} for eager autograd" in page


def test_figures_of_performance_are_in_the_results():
    page = _text("docs/performance.md").replace("→", "->")
    rows = {}
    for row in _result("cpu-avx512-full")["rows"]:
        ours, eager, peer = (row["milliseconds"][k] for k in ("ours", "eager double backward", row["best_peer"]))
        rows[row["row"]] = [f"{ours:.2f}", f"{eager:.2f}", f"{peer:.2f}", f"{eager / ours:.1f}", f"{row['ratio']:.2f}"]
    assert {size: cells for size, *cells in _table(page, " size | ours | eager | best peer")} == rows

    names = ("ours", "ours, recompute", "eager double backward")
    kept = {row["row"]: [f"{row['bytes'][n]['kept'] / 1000:.0f}" for n in names] for row in _result("memory")["rows"]}
    assert {size: cells for size, *cells in _table(page, " size | ours | ours, `recompute")} == kept

    errors = _result("accuracy")["errors"]
    for dtype, *cells in _table(page, " dtype | ours"):
        assert cells == [f"{errors[dtype]['map'][who]:.1e}" for who in ("ours", "eager")]

    names = ("by the map", "by autograd", "plain torch")
    penalty = {
        r["row"]: [f"{r['milliseconds'][n]:.2f}" for n in names] for r in _result("cpu-avx512-second-order")["penalty"]
    }
    assert {size: cells for size, *cells in _table(page, " size | by the map")} == penalty


def test_figures_of_the_cure_are_in_the_results():
    runs = json.loads(_text("results/cure/digits.json"))["runs"]
    table = _table(_text("docs/cure.md"), " decoder | directions")
    for kind, (_, *cells) in zip(("mlp", "brenier"), table, strict=True):
        those = [run for run in runs if run["decoder"] == kind]

        def mean(value, those=those):
            return statistics.mean(map(value, those))

        assert cells == [
            f"{mean(lambda run: run['active_directions']):.1f} of 10",
            f"{mean(lambda run: sum(run['kl_per_dimension'])):.2f}",
            *(f"{mean(lambda run, name=name: run[name]):.2f}" for name in ("mutual_information", "gain", "nll")),
        ]


def test_figures_of_the_operators_are_in_the_results():
    page = " ".join(_text("docs/internals/autograd.md").split())
    (row,) = (row for row in _result("cpu-avx512-full")["rows"] if row["row"] == "2, 32x2, 128")
    times = row["milliseconds"]
    assert f"(`cpu-avx512-full.json`): {times['ours']:.3f} through autograd, {times['ours, stateless']:.3f} for" in page


def test_figures_of_cuda_are_in_the_results():
    kernels = _result("kernels")["kernels"]
    assert {kernel["architecture"] for kernel in kernels} == {80, 90}
    rows = _rows(_text("docs/internals/cuda.md"), "kernel")
    assert len(rows) == 2
    for name, *cells in rows:
        those = [kernel for kernel in kernels if kernel["name"].split("<")[0] == name.strip("`")]
        registers = [kernel["registers"] for kernel in those]
        local = sum(kernel["local"] + kernel["stack"] for kernel in those)
        assert cells == [str(len(those)), f"{min(registers)} to {max(registers)}", str(local)], name
