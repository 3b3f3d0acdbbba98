"""What a data set is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor

_P = ParamSpec("_P")


class Dataset(NamedTuple):
    """Data split into training and test part, and a validation part if one was asked for.

    Attributes:
        train: (N, D), float32 values, or int64 tokens where ``num_categories`` is set (-1: no token, for sequences
            shorter than D).
        test: the same.
        train_labels: (N,) int64, or None.
        test_labels: the same.
        shape: of one datum before it was flattened to D values, such as (height, width).
        num_categories: how many tokens there are.
        vocabulary: the tokens as people read them, joined by ``separator``.
        separator: between tokens.
        validation: as ``train``, or None.
        validation_labels: as ``train_labels``.
        dynamic: the training data are probabilities, from which each batch draws its zeros and ones anew
            (:func:`drawn`).
    """

    train: Tensor
    test: Tensor
    train_labels: Tensor | None
    test_labels: Tensor | None
    shape: tuple[int, ...]
    num_categories: int | None = None
    vocabulary: tuple[str, ...] | None = None
    separator: str = " "
    validation: Tensor | None = None
    validation_labels: Tensor | None = None
    dynamic: bool = False

    def training_sample(self) -> Tensor:
        """The training data as a model meets them, once: (N, D), the same every time."""
        return drawn(self.train, 0) if self.dynamic else self.train

    @property
    def unit_range(self) -> bool:
        """Whether all values lie in [0, 1], as grey values do."""
        return all(bool(((x >= 0) & (x <= 1)).all()) for x in (self.train, self.test))

    def form(self) -> dict[str, Any]:
        """All but the data, as JSON can hold it: what it takes to show what a model makes."""
        names = ("shape", "num_categories", "vocabulary", "separator")
        return {name: list(v) if isinstance(v := getattr(self, name), tuple) else v for name in names}

    @classmethod
    def of_form(cls, form: Mapping[str, Any]) -> Dataset:
        """A data set of this form, without data."""
        vocabulary = form["vocabulary"]
        words = None if vocabulary is None else tuple(vocabulary)
        nothing = torch.empty(0, math.prod(form["shape"]), device="cpu")
        shape = tuple(form["shape"])
        return cls(nothing, nothing, None, None, shape, form["num_categories"], words, form["separator"])

    def to_text(self, tokens: Tensor) -> list[str]:
        """Sequences of tokens (n, D) as text, up to their first ``<eos>``; without a vocabulary as numbers."""
        return [self.separator.join(self._words(row)) for row in tokens.tolist()]

    def _words(self, row: list[int]) -> list[str]:
        words: list[str] = []
        for token in row:
            if token < 0 or (words and words[-1] == "<eos>"):
                break
            words.append(str(token) if self.vocabulary is None else self.vocabulary[token])
        return words


def on_cpu(build: Callable[_P, Dataset]) -> Callable[_P, Dataset]:
    """Let the function of a data set make tensors on the CPU, and values in float32, whatever torch's defaults are."""

    @wraps(build)
    def built(*args: _P.args, **kwargs: _P.kwargs) -> Dataset:
        before = torch.get_default_dtype()
        if before != torch.float32:
            torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"):
                return build(*args, **kwargs)
        finally:
            if before != torch.float32:
                torch.set_default_dtype(before)

    return built


def drawn(probabilities: Tensor, seed: int) -> Tensor:
    """Zeros and ones with these probabilities, on the CPU, the same for the same seed."""
    return torch.bernoulli(probabilities, generator=torch.Generator().manual_seed(seed))


def split(x: Tensor, labels: Tensor | None, fraction: float) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(train, test, train_labels, test_labels) of unsplit data: a random part, the same every time, is for tests."""
    count = int(len(x) * fraction)
    if not 0 < count < len(x):
        raise ValueError(
            f"test_fraction: got {fraction}, which leaves {len(x) - count} of {len(x)} data to train on and {count} to "
            "test, wanted at least one in each part"
        )
    test, train = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).tensor_split([count])
    return x[train], x[test], None if labels is None else labels[train], None if labels is None else labels[test]
