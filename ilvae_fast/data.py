"""Data sets by name. To add one, write a function that returns a :class:`Dataset` and put it into ``DATASETS``."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._errors import unknown_name
from ._extras import require


class Dataset(NamedTuple):
    """Data split into training and test part.

    train, test: (N, D) float32. train_labels, test_labels: (N,) int64. shape: of one datum before it was flattened to
    D values, such as (height, width).
    """

    train: Tensor
    test: Tensor
    train_labels: Tensor
    test_labels: Tensor
    shape: tuple[int, ...]


def digits() -> Dataset:
    """The 1797 handwritten digits of 8 x 8 pixels that scikit-learn carries, scaled to [0, 1]; no network.

    A fifth (359) is the test part, drawn once and for all.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.

    Raises:
        ImportError: scikit-learn is not installed; says how to install it.
    """
    bunch = require("sklearn.datasets", "train").load_digits()
    images = torch.from_numpy(bunch.data).float() / 16  # grey values 0 .. 16
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order.tensor_split([len(images) // 5])
    return Dataset(images[train], images[test], labels[train], labels[test], (8, 8))


DATASETS: dict[str, Callable[[], Dataset]] = {"digits": digits}


def load(name: str) -> Dataset:
    """The data set called ``name``, a key of ``DATASETS``.

    Raises:
        ValueError: unknown name (the nearest one is named).
        ImportError: a package that the data set needs is not installed; says how to install it.
    """
    if name not in DATASETS:
        raise unknown_name("name", name, DATASETS)
    return DATASETS[name]()
