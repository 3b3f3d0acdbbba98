"""Training and measuring a VAE for the studies of defaults and of the advice: one setting, one loop."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ilvae_fast as il
from ilvae_fast import metrics
from ilvae_fast.vae import VAE, VAEConfig

BATCH = 128


@dataclass(frozen=True)
class Task:
    """One setting: data, likelihood, sizes and training, the same for all decoders.

    data: name of the data set, or ``"words"``; its first ``count`` training data are fitted, those after them,
    ``validation`` many, are for choosing. constant: certified L; ``"auto"``: by advice. cosine: the learning rate falls
    to 0. mlp: hidden widths of an MLP decoder with about as many parameters.
    """

    data: str
    count: int
    validation: int
    likelihood: str
    latent_dim: int
    epochs: int
    encoder_hidden: tuple[int, ...]
    mlp: tuple[int, ...]
    likelihood_options: Mapping[str, Any] = field(default_factory=dict)
    constant: float | str = "auto"
    rate: float = 1e-3
    cosine: bool = False
    model: str = "il-lidvae"
    importance_samples: int = 100

    @property
    def binary(self) -> bool:
        """Whether pixels are drawn anew in each step."""
        return self.likelihood == "bernoulli"


@dataclass(frozen=True)
class Parts:
    """Data of a task."""

    fit: Tensor
    validation: Tensor
    test: Tensor


def load(task: Task, data_root: str | None) -> Parts:
    """At most 1000 of the test data; pixels of validation and test part are drawn once."""
    if task.data == "words":
        x, test = _words(data_root)
    else:
        dataset = il.data.load(task.data, data_root)
        x, test = dataset.train, dataset.test
    held = [x[task.count : task.count + task.validation], test[:1000]]
    if task.binary:
        generator = torch.Generator().manual_seed(0)
        held = [torch.bernoulli(part, generator=generator) for part in held]
    return Parts(x[: task.count], *held)


def _words(data_root: str | None, lines: int = 10, vocabulary: int = 200) -> tuple[Tensor, Tensor]:
    """How often each of the most frequent words stands in passages of so many lines of tiny Shakespeare: train, test.

    The passages in their order, shuffled; the words are those of the training part.
    """
    text = (Path(data_root or "data") / "tinyshakespeare" / "input.txt").read_text().lower()
    kept = [re.findall(r"[a-z']+", line) for line in text.splitlines() if line.strip()]
    passages = [list(chain(*kept[i : i + lines])) for i in range(0, len(kept) - lines + 1, lines)]
    order = torch.randperm(len(passages), generator=torch.Generator().manual_seed(0)).tolist()
    passages = [passages[i] for i in order]
    held = len(passages) // 6
    counts = Counter(word for passage in passages[held:] for word in passage)
    index = {word: k for k, (word, _) in enumerate(counts.most_common(vocabulary))}
    x = torch.zeros(len(passages), vocabulary)
    for row, passage in zip(x, passages, strict=True):
        for word in passage:
            if word in index:
                row[index[word]] += 1
    return x[held:], x[:held]


def advised(task: Task, parts: Parts) -> float:
    """The certified constant of a task."""
    if not isinstance(task.constant, str):
        return task.constant
    likelihood = il.vae.LIKELIHOODS[task.likelihood](**task.likelihood_options)
    return float(f"{il.advise(parts.fit, task.latent_dim, likelihood).L:.3g}")


def configuration(task: Task, parts: Parts, constant: float, **fields: Any) -> VAEConfig:
    """Of the task's model, with ``fields`` set besides or instead."""
    model = task.model
    if fields.get("decoder") == "mlp":
        model = {"il-lidvae": "vae", "il-lidsvae": "svae"}[model]
        fields = {"decoder_hidden": task.mlp, **fields}
    common: dict[str, Any] = {
        "data_dim": parts.fit.shape[1], "latent_dim": task.latent_dim, "encoder_hidden": task.encoder_hidden,
        "likelihood": task.likelihood, "likelihood_options": task.likelihood_options,
        "inverse_lipschitz": math.sqrt(constant),
    }  # fmt: skip
    return VAEConfig.named(model, **{**common, **fields})


def fit(model: VAE, x: Tensor, task: Task, rate: float | None = None) -> float:
    """Train with Adam; milliseconds of a step. All data in each epoch, also where they do not fill a batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate or task.rate)
    steps = task.epochs * math.ceil(len(x) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if task.cosine else None
    start = time.perf_counter()
    for _ in range(task.epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            batch = x[rows]
            optimizer.zero_grad()
            model(torch.bernoulli(batch) if task.binary else batch).loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
    return 1e3 * (time.perf_counter() - start) / steps


def measure(model: VAE, x: Tensor, train: Tensor, importance_samples: int) -> dict[str, float]:
    """In nats, on x: bounds of the negative log-likelihood, the NLL of the best model that ignores z, and what the
    latents carry."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    elbo = metrics.elbo(model, x, 10, generator=generator)
    kl, information = metrics.kl_divergence(model, x).total, metrics.mutual_information(model, x, generator=generator)
    sequences = model.config.autoregressive_hidden is not None
    return {
        "negative_elbo": -elbo,
        "nll": metrics.negative_log_likelihood(model, x, importance_samples, generator=generator),
        **({} if sequences else {"ignoring": metrics.nll_without_latent(model, x, train)}),
        "kl": kl,
        "mutual_information": information,
        "kl_minus_mi": kl - information,
        "active_units": metrics.active_units(model, x).active,
        "active_directions": metrics.active_directions(model, x).active,
    }


def parameters(modules: Sequence[torch.nn.Module]) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for module in modules for p in module.parameters())
