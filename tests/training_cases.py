"""Small runs."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ilvae_fast.training import TrainConfig
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


def state_of(model: VAE) -> dict[str, Tensor]:
    """What a model computes with: in the place of an embedding's raw matrix the orthonormal columns. Of what does not
    change these there is no gradient, but rounding, of which Adam makes steps."""
    state = model.state_dict()
    del state["decoder.raw_embedding"]
    return {**state, "decoder.embedding_matrix": model.decoder.embedding_matrix().detach()}
