"""Options of all data sets: how much of it, a validation part, images of zeros and ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ilvae_fast import data


def test_limit_and_validation_cut_the_training_data_alone():
    whole = data.load("digits")
    part = data.load("digits", limit=100, validation=30)
    assert part.train.shape == (100, 64)
    assert part.validation.shape == (30, 64)
    assert torch.equal(part.test, whole.test)
    rows = {tuple(x.tolist()): int(label) for x, label in zip(whole.train, whole.train_labels, strict=True)}
    for x, label in zip(
        torch.cat([part.train, part.validation]), torch.cat([part.train_labels, part.validation_labels]), strict=True
    ):
        assert rows[tuple(x.tolist())] == label  # of the training part, with its own label
    distinct = torch.cat([part.train, part.validation]).unique(dim=0)
    assert len(distinct) == 130  # no datum in both
    assert part.train_labels.bincount().min() > 0  # a random part, not the first
    again = data.load("digits", limit=100, validation=30)
    assert torch.equal(part.train, again.train)


def test_the_validation_part_stays_whatever_the_limit():
    few, many = (data.load("digits", limit=n, validation=30) for n in (50, 200))
    assert torch.equal(few.validation, many.validation)
    assert torch.equal(few.train, many.train[:50])


def test_sequences_have_parts_too():
    text = data.load("synthetic_text", num_sentences=100, vocabulary_size=20, limit=40, validation=10)
    assert len(text.train) == 40
    assert len(text.validation) == 10
    assert text.validation.dtype == torch.int64


def test_what_is_dynamic_is_drawn_for_each_batch():
    digits, plain = data.load("digits", binarize="dynamic", validation=20), data.load("digits", validation=20)
    assert digits.dynamic
    assert torch.equal(digits.train, plain.train)  # probabilities
    for part in (digits.test, digits.validation, digits.training_sample()):
        assert set(part.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(digits.test, data.load("digits", binarize="dynamic").test)
    assert torch.equal(digits.training_sample(), digits.training_sample())
    assert (digits.test.mean(0) - plain.test.mean(0)).abs().max() < 0.1  # of 359: three standard errors


def test_what_is_fixed_is_drawn_once():
    digits = data.load("digits", binarize="fixed")
    assert not digits.dynamic
    assert set(digits.train.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(digits.train, data.load("digits", binarize="fixed").train)
    assert torch.equal(digits.test, data.load("digits", binarize="dynamic").test)
    assert torch.equal(digits.training_sample(), digits.train)


def test_bad_parts_are_refused_before_a_file_is_read(tmp_path):
    for options, message in (
        ({"limit": 0}, "limit: got 0"),
        ({"validation": -1}, "validation: got -1"),
        ({"binarize": "dynamical"}, "binarize: got 'dynamical'.*'dynamic'"),
        ({"limits": 3}, "option of npz:FILE: got 'limits'.*'limit'"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load(f"npz:{tmp_path / 'missing.npz'}", **options)


def test_more_data_than_there_are_and_no_probabilities_are_refused(tmp_path):
    with pytest.raises(ValueError, match="limit, validation: got 1400 and 100, wanted at most 1438 together"):
        data.load("digits", limit=1400, validation=100)
    with pytest.raises(ValueError, match="limit, validation: got None and 1438"):
        data.load("digits", validation=1438)
    with pytest.raises(ValueError, match=r"binarize: got 'dynamic' for data that are not in \[0, 1\]"):
        data.load("toy", binarize="dynamic")
    with pytest.raises(ValueError, match="binarize: got 'fixed'"):
        data.load("synthetic_text", binarize="fixed")
    np.savez(tmp_path / "grey.npz", x_train=np.full((30, 2, 2), 0.5, np.float32))
    assert data.load(f"npz:{tmp_path / 'grey.npz'}", binarize="dynamic").dynamic
