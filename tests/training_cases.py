"""Small runs, and the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from ilvae_fast import cli
from ilvae_fast.training import TrainConfig, train
from ilvae_fast.training.state import latest
from ilvae_fast.vae import VAE

SMALL = {
    "data": "toy",
    "data_options": {"num_train": 300, "num_test": 60},
    "latent_dim": 2,
    "epochs": 2,
    "batch_size": 50,
    "cpu": True,
    "num_importance_samples": 3,
    "fisher_samples": 3,
}
OPTIONS = {"encoder_hidden": [6], "decoder_hidden": [[5], [6]]}


def small(folder: Path, **fields) -> TrainConfig:
    return TrainConfig.from_dict({**SMALL, "model_options": OPTIONS, "output": str(folder), **fields})


def interrupt(step: int, steps: int, values: dict[str, float]) -> None:
    """Progress that ends a run of :func:`small` after the eighth of its twelve steps, in the second epoch."""
    if step == 8:
        raise KeyboardInterrupt


def interrupted(config: TrainConfig) -> Path:
    """The newest checkpoint of a run that ended after the eighth step of twelve."""
    with pytest.raises(KeyboardInterrupt):
        train(config, interrupt)
    return latest(config.folder / "checkpoints")


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    """What ``ilvae-fast ARGUMENTS`` prints: the output, or the error where it ends with another status than 0."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    captured = capsys.readouterr()
    assert (caught.value.code or 0) == status, captured.err
    return captured.err if status else captured.out


def state_of(model: VAE) -> dict[str, Tensor]:
    """The tensors that a model computes with: the orthonormal columns instead of an embedding's raw matrix.

    In directions that do not change the columns the gradient is rounding error, of which Adam makes full steps.
    """
    state = model.state_dict()
    del state["decoder.raw_embedding"]
    return {**state, "decoder.embedding_matrix": model.decoder.embedding_matrix().detach()}
