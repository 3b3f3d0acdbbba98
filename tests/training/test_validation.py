"""Validation data, the best model on them, dynamic data, and aggressive training of a lagging encoder."""

from __future__ import annotations

import json

import pytest
import torch

from ilvae_fast import metrics
from ilvae_fast.data import load
from ilvae_fast.training import train
from ilvae_fast.training.state import Batches
from ilvae_fast.vae import VAE
from training_cases import SMALL, interrupted, small, state_of

DIGITS = {"data": "digits", "data_options": {"limit": 150, "validation": 60, "binarize": "dynamic"}, "batch_size": 25}
VALIDATED = {"data_options": {**SMALL["data_options"], "limit": 200, "validation": 40}}


def test_the_best_model_on_validation_data_is_kept_and_measured(tmp_path):
    config = small(tmp_path, **VALIDATED, epochs=4, learning_rate=0.3)  # so large that the last is not the best
    measures = train(config)
    history = [epoch["validation_loss"] for epoch in json.loads((tmp_path / "history.json").read_text())]
    best = measures["best"]
    assert len(history) == 4
    assert best["validation_loss"] == min(history)
    assert best["epoch"] == history.index(min(history)) + 1
    kept = VAE.from_pretrained(tmp_path / "best").eval()
    x = load("toy", **config.data_options).validation
    loss = -metrics.elbo(kept, x, generator=torch.Generator().manual_seed(config.seed))
    assert loss == pytest.approx(best["validation_loss"], rel=1e-6)
    if best["epoch"] == 4:
        assert best["nll"] == measures["nll"]
    else:
        assert best["nll"] != measures["nll"]
        assert "elbo_kl" in best


def test_validation_does_not_change_training(tmp_path):
    limit = {**SMALL["data_options"], "limit": 200}
    part = {**limit, "validation": 40}
    # the same 200 data in another order: a permutation of the batches alone, so compare two runs with the same part
    first = train(small(tmp_path / "first", data_options=part))
    second = train(small(tmp_path / "second", data_options=part))
    assert first == second
    assert "best" not in train(small(tmp_path / "none", data_options=limit))


@pytest.mark.parametrize("fields", [DIGITS, {**DIGITS, "lagging": 12}], ids=["dynamic", "lagging"])
def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path, fields):
    fields = {**fields, "checkpoint_every": 4, "latent_dim": 2}
    whole = train(small(tmp_path / "whole", **fields))
    config = small(tmp_path / "cut", **fields)
    assert interrupted(config) is not None
    assert train(config) == whole
    for name in ("model", "best"):
        ends = [state_of(VAE.from_pretrained(tmp_path / run / name)) for run in ("whole", "cut")]
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_batches_of_dynamic_data_are_drawn_anew():
    x = torch.full((20, 50), 0.5)
    drawn = Batches(x, 10, seed=0, dynamic=True)
    first, second = list(drawn.epoch(0)), list(drawn.epoch(1))
    assert set(torch.cat(first).unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])
    assert torch.equal(next(drawn.epoch(0, start=1)), first[1])  # whatever was drawn before
    assert not torch.equal(next(Batches(x, 10, seed=1, dynamic=True).epoch(0)), first[0])
    extra = list(drawn.more(0, 1, 3))
    assert len(extra) == 3
    assert not torch.equal(extra[0], extra[1])


def test_a_lagging_encoder_is_updated_more_often_than_the_decoder(tmp_path, monkeypatch):
    """Steps of Adam: those of the encoder grow by the updates before each step, the decoder's do not."""
    seen = {}
    import ilvae_fast.training.loop as loop

    original = loop._step

    def counted(accelerator, plain, model, optimizer, x, config, step, left=()):
        before = {name: p.detach().clone() for name, p in plain.named_parameters()}
        values = original(accelerator, plain, model, optimizer, x, config, step, left)
        moved = {name.partition(".")[0] for name, p in plain.named_parameters() if not torch.equal(before[name], p)}
        seen.setdefault(step, []).append(moved)
        return values

    monkeypatch.setattr(loop, "_step", counted)
    train(small(tmp_path, **VALIDATED, epochs=1, lagging=25))
    for moves in seen.values():
        *inner, last = moves
        assert 20 <= len(inner) <= 25  # ten and ten are compared
        assert all(moved == {"encoder"} for moved in inner)
        assert last == {"decoder"}


def test_aggressive_training_ends_when_the_information_does_not_grow(tmp_path, monkeypatch):
    values = iter([0.5, 0.4])
    monkeypatch.setattr(metrics, "mutual_information", lambda *_, **__: next(values, 0.1))
    counts = []
    import ilvae_fast.training.loop as loop

    original = loop._catch_up
    monkeypatch.setattr(loop, "_catch_up", lambda *a: (counts.append(a[-1].epoch), original(*a)))
    train(small(tmp_path, **VALIDATED, epochs=4, lagging=3))
    assert counts == [0] * 4 + [1] * 4


def test_lagging_wants_validation_data(tmp_path):
    with pytest.raises(ValueError, match=r"lagging: wants validation data.*data_options\.validation"):
        train(small(tmp_path, lagging=10))
