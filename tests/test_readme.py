"""The README and the pages on transport and models keep their promises: their examples do what they say."""

import re

import pytest
import torch

from ilvae_fast.annealing import SCHEDULES
from ilvae_fast.cli import COLUMNS
from ilvae_fast.data import DATASETS
from ilvae_fast.vae import CONFIGURATIONS, LIKELIHOODS
from pages import ROOT, blocks

README, DOCS = ROOT / "README.md", ROOT / "docs"


def _run(source: str) -> dict:
    torch.manual_seed(0)
    names: dict = {}
    exec(source, names)
    return names


def test_the_readme_fits_one_screen():
    lines = README.read_text().splitlines()
    assert len(lines) <= 60
    assert sum(len(block.source.splitlines()) for block in blocks(README, "python")) <= 12
    assert sum(len(block.source.splitlines()) for block in blocks(README, "sh")) == 2
    assert len(re.findall(r"!\[", README.read_text())) == 1


def test_the_decoder_example_is_certified():
    """The example asserts the bound; here that of its constant."""
    (example,) = blocks(README, "python")
    names = _run(example.source)
    assert float(names["decoder"].inverse_lipschitz_bound()) == pytest.approx(names["advice"].L)
    assert names["decoder"].embedding == "orthogonal"


def _transport_residuals(**changes: str) -> tuple[float, float]:
    """Relative squared errors of the example's two maps where the target is N(0, A^2): the optimal map is A x."""
    (example,) = blocks(DOCS / "transport.md", "python")
    source = example.source
    matrix = torch.tensor([[1.5, 0.5], [0.5, 0.8]])
    changes["return .*"] = "return torch.randn(n, 2) @ torch.tensor([[1.5, 0.5], [0.5, 0.8]])"
    for pattern, replacement in changes.items():
        source, count = re.subn(pattern, lambda _, text=replacement: text, source)
        assert count == 1
    names = _run(source)
    x = torch.randn(4000, 2)
    with torch.no_grad():
        y = x @ matrix
        forward = (names["transport"](x) - y).square().sum() / y.square().sum()
        return forward.item(), ((names["back"](y) - x).square().sum() / x.square().sum()).item()


def test_the_transport_example_transports():
    forward, inverse = _transport_residuals()
    assert forward < 0.01
    assert inverse < 0.01


def test_the_transport_example_needs_its_dual():
    forward, _ = _transport_residuals(**{r"dual \+ 2 \* cycle": "2 * cycle", r"range\(1000\)": "range(200)"})
    assert forward > 0.1


def test_the_examples_of_the_models_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = _run("\n".join(block.source for block in blocks(DOCS / "models.md", "python")))
    assert names["model"].decoder.latent_map.inverse_lipschitz.item() == pytest.approx(2.0 - 1.3 / 1000)
    assert (tmp_path / "runs" / "mine" / "config.json").is_file()


def test_the_tables_of_models_and_datasets_are_complete():
    page = "\n".join((DOCS / f"{page}.md").read_text() for page in ("models", "likelihoods", "annealing"))
    for name in (*CONFIGURATIONS, *DATASETS, *LIKELIHOODS, *SCHEDULES):
        assert f"`{name}`" in page, name


def test_the_metrics_page_defines_the_columns_of_the_table():
    page = (DOCS / "metrics.md").read_text()
    assert re.findall(r"^\| ([\w -]+?) \| [^|]+ \| .+ \|$", page, re.MULTILINE)[1:] == [
        heading for heading, _ in COLUMNS
    ]
