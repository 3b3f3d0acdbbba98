"""The README keeps its promises: its examples run and do what they say."""

import re
from pathlib import Path

import pytest
import torch

from ilvae_fast.annealing import SCHEDULES
from ilvae_fast.data import DATASETS
from ilvae_fast.vae import CONFIGURATIONS, LIKELIHOODS

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def _run(source: str) -> dict:
    torch.manual_seed(0)
    names: dict = {}
    exec(source, names)
    return names


def test_the_decoder_example_is_certified():
    (source,) = (e for e in EXAMPLES if "MyVAE" in e)
    model = _run(source)["MyVAE"]()
    reconstruction, mean, _ = model(torch.rand(8, 784))
    assert reconstruction.shape == (8, 784)
    assert mean.shape == (8, 10)
    assert float(model.decoder.inverse_lipschitz_bound()) == pytest.approx(0.5)


def test_the_transport_example_transports():
    (source,) = (e for e in EXAMPLES if "transport" in e)
    names = _run(source)
    assert names["loss"] < 1e-3


def test_the_examples_of_the_models_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (README.parent / "docs" / "models.md").read_text()
    names = _run("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)))
    assert names["model"].decoder.latent_map.inverse_lipschitz.item() == pytest.approx(2.0 - 1.3 / 1000)
    assert (tmp_path / "runs" / "mine" / "config.json").is_file()


def test_the_tables_of_models_and_datasets_are_complete():
    page = (README.parent / "docs" / "models.md").read_text()
    for name in (*CONFIGURATIONS, *DATASETS, *LIKELIHOODS, *SCHEDULES):
        assert f"`{name}`" in page, name
