"""Data sets by name."""

from __future__ import annotations

import sys

import pytest
import torch

from ilvae_fast import data


def test_digits_are_scaled_and_split():
    digits = data.load("digits")
    assert digits.train.shape == (1438, 64)
    assert digits.test.shape == (359, 64)
    assert digits.shape == (8, 8)
    assert digits.train.dtype == digits.test.dtype == torch.float32
    assert digits.train_labels.shape == (1438,)
    assert digits.test_labels.dtype == torch.int64
    pixels = torch.cat([digits.train, digits.test])
    assert pixels.min() == 0
    assert pixels.max() == 1


def test_digits_are_all_of_scikit_learns_once_with_their_labels():
    from sklearn.datasets import load_digits

    bunch, digits = load_digits(), data.load("digits")
    ours = {
        (*image.tolist(), label)
        for images, labels in ((digits.train, digits.train_labels), (digits.test, digits.test_labels))
        for image, label in zip(images * 16, labels.tolist(), strict=True)
    }
    assert len(ours) == 1797
    assert ours == {(*image, label) for image, label in zip(bunch.data.tolist(), bunch.target.tolist(), strict=True)}


def test_the_split_is_always_the_same_and_mixes_the_classes():
    state = torch.get_rng_state()
    first, second = data.load("digits"), data.load("digits")
    assert torch.equal(first.test, second.test)
    assert torch.equal(torch.get_rng_state(), state)  # drawn from a generator of its own
    assert first.test_labels.bincount().min() >= 20


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"name: got 'digit', wanted one of .*nearest: 'digits'"):
        data.load("digit")


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"sklearn is needed.*pip install ilvae_fast\[train\]"):
        data.load("digits")
