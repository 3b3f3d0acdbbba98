"""Options that every data set takes: how much of it, a validation part, and images of zeros and ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._support.checks import check_number, check_positive
from .._support.errors import unknown_name
from .dataset import Dataset, drawn, on_cpu

BINARIZATIONS = ("none", "fixed", "dynamic")
_TRAIN, _TEST, _VALIDATION = 1, 2, 3  # seeds of fixed draws


@dataclass(frozen=True)
class Parts:
    """Options of :func:`ilvae_fast.data.load` beside those of a single data set.

    Args:
        limit: how many training data to take; None: all.
        validation: how many training data to keep apart for validation. Both parts are random, and the same every time.
        binarize: ``"dynamic"``: grey values in [0, 1] are probabilities, from which every batch draws zeros and ones
            anew (Salakhutdinov & Murray, ICML 2008, and most work since); ``"fixed"``: the training data are drawn
            once; ``"none"``. The test and validation data are drawn once in both cases, so that a Bernoulli likelihood
            is one, and comparable between models.

    Raises:
        ValueError, TypeError: naming the option.
    """

    limit: int | None = None
    validation: int = 0
    binarize: str = "none"

    def __post_init__(self) -> None:
        if self.limit is not None:
            check_positive("limit", self.limit)
        check_number("validation", self.validation, whole=True)
        if self.binarize not in BINARIZATIONS:
            raise unknown_name("binarize", self.binarize, BINARIZATIONS)

    @on_cpu
    def of(self, dataset: Dataset) -> Dataset:
        """``dataset`` with these options.

        Raises:
            ValueError: more data asked for than there are; values that are no probabilities.
        """
        return self._binarized(self._taken(dataset))

    def _taken(self, dataset: Dataset) -> Dataset:
        if self.limit is None and not self.validation:
            return dataset
        count = len(dataset.train) - self.validation if self.limit is None else self.limit
        if count < 1 or self.validation + count > len(dataset.train):
            raise ValueError(
                f"limit, validation: got {self.limit} and {self.validation}, wanted at most {len(dataset.train)} "
                "together, the training data, with one left to train on"
            )
        order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(0))
        kept, train = order[: self.validation], order[self.validation : self.validation + count]

        def part(x: Tensor | None, rows: Tensor) -> Tensor | None:
            return None if x is None else x[rows]

        taken = dataset._replace(train=dataset.train[train], train_labels=part(dataset.train_labels, train))
        if not self.validation:
            return taken
        return taken._replace(validation=part(dataset.train, kept), validation_labels=part(dataset.train_labels, kept))

    def _binarized(self, dataset: Dataset) -> Dataset:
        if self.binarize == "none":
            return dataset
        if dataset.num_categories is not None or not dataset.unit_range:
            raise ValueError(
                f"binarize: got {self.binarize!r} for data that are not in [0, 1], wanted 'none', or grey values "
                "scaled to [0, 1]"
            )
        dynamic = self.binarize == "dynamic"
        return dataset._replace(
            train=dataset.train if dynamic else drawn(dataset.train, _TRAIN),
            test=drawn(dataset.test, _TEST),
            validation=None if dataset.validation is None else drawn(dataset.validation, _VALIDATION),
            dynamic=dynamic,
        )
