"""The user's own data: a text of one sentence a line, or arrays that NumPy saved."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .._support.checks import check_number, check_positive
from .._support.errors import unknown_name
from .dataset import Dataset, on_cpu, split

LEVELS = ("character", "word")
_CURE = "numpy.savez(path, x_train=array); of a table in text, array = numpy.loadtxt(file, delimiter=',')"
_RESERVED = ("<eos>", "<unk>")  # tokens 0 and 1


@on_cpu
def text(
    path: str | os.PathLike[str],
    *,
    level: str = "character",
    length: int = 40,
    vocabulary_size: int = 1000,
    test_fraction: float = 0.1,
) -> Dataset:
    """The lines of a UTF-8 file that are not empty, as sequences of tokens; -1 fills up those that are shorter.

    A line ends at a line feed, with or without a carriage return before it, and nowhere else. A byte order mark is no
    part of the text. Each line ends with the token ``<eos>``, unless it was cut. A random part, the same every time, is
    the test part. The tokens are those of the training part; others become ``<unk>``. The words ``<eos>`` and ``<unk>``
    in the text mean these two.

    Args:
        level: ``"character"``, or ``"word"``: what white space separates.
        length: D; longer lines are cut.
        vocabulary_size: at most so many tokens, the most frequent ones.
        test_fraction: of the lines.

    Raises:
        FileNotFoundError, ValueError: a missing file, one that is no UTF-8 or has no line; naming the option.
    """
    if level not in LEVELS:
        raise unknown_name("level", level, LEVELS)
    _check_file("text", path, "a text in UTF-8, one sentence a line")
    check_positive("length", length)
    if check_positive("vocabulary_size", vocabulary_size) < 3:
        raise ValueError(f"vocabulary_size: got {vocabulary_size}, wanted at least 3, two of which are <eos> and <unk>")
    try:
        content = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not text in UTF-8 ({error})") from error
    lines = [
        list(line) if level == "character" else line.split() for line in re.split("\r?\n", content) if line.strip()
    ]
    if not lines:
        raise ValueError(f"{path}: has no line with text in it")
    train, test, *_ = split(torch.arange(len(lines)), None, test_fraction)
    counts = Counter(token for k in train.tolist() for token in lines[k] if token not in _RESERVED)
    vocabulary = (*_RESERVED, *(token for token, _ in counts.most_common(vocabulary_size - len(_RESERVED))))
    number = {token: k for k, token in enumerate(vocabulary)}
    x = torch.full((len(lines), length), -1)
    for row, line in zip(x, lines, strict=True):
        ended = line if line[-1] == "<eos>" else [*line, "<eos>"]
        numbers = [number.get(token, 1) for token in ended[:length]]
        row[: len(numbers)] = torch.tensor(numbers)
    separator = "" if level == "character" else " "
    return Dataset(x[train], x[test], None, None, (length,), len(vocabulary), vocabulary, separator)


def _checked_range(value: Sequence[float]) -> tuple[float, float]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise TypeError(f"range: got {value!r}, wanted the lowest and the highest value, such as [0, 255]")
    low, high = value
    for bound in (low, high):
        check_number("range", bound, least=-math.inf)
    if not low < high:
        raise ValueError(f"range: got {list(value)}, wanted the lower value first")
    return float(low), float(high)


def _check_file(kind: str, path: str | os.PathLike[str], wanted: str) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{kind}:FILE: no file {os.path.abspath(path)!r}, wanted {wanted}")


def _what_it_is(path: Path, error: Exception) -> str:
    """A file that is not an archive of arrays, in words."""
    with open(path, "rb") as file:
        start = file.read(6)
    if not start:
        return "is empty"
    if start == b"\x93NUMPY":
        return "is a single array, as numpy.save writes it"
    if not start.startswith(b"PK"):
        return "is not an archive of arrays"
    return f"is damaged, or holds other things than arrays of numbers ({error})"


@on_cpu
def npz(path: str | os.PathLike[str], *, test_fraction: float = 0.1, range: Sequence[float] | None = None) -> Dataset:
    """Arrays ``x_train`` (N, ...), and if there ``x_test``, ``y_train``, ``y_test``, as ``numpy.savez`` writes them.

    Labels are whole numbers >= 0. Without ``x_test`` a random part, the same every time, is the test part.

    Args:
        test_fraction: of the data, where there is no ``x_test``.
        range: of the values, (lowest, highest), which becomes [0, 1], such as (0, 255) or (-1, 1). None: integers of
            eight bits are scaled from 0 .. 255, truth values are 0 and 1, and other numbers stay as they are, as counts
            should, so save those in another type.

    Raises:
        FileNotFoundError, TypeError, ValueError: a bad range, or values outside it; a missing or damaged file, or one
            without ``x_train``; arrays that do not fit, or of another type than ``x_train``; NaN and infinity, with
            their number; labels that are none.
    """
    low, high = (0.0, None) if range is None else _checked_range(range)
    _check_file("npz", path, "what numpy.savez(path, x_train=..) writes")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ("x_train", "y_train", "x_test", "y_test") if name in archive}
            names = archive.files
    except Exception as error:  # of damaged bytes NumPy and zipfile raise errors of a dozen kinds
        raise ValueError(f"{path}: {_what_it_is(Path(path), error)}; wanted an archive: {_CURE}") from error
    if "x_train" not in arrays:
        raise ValueError(f"{path}: holds {', '.join(names) or 'nothing'}, wanted x_train: {_CURE}")
    for part in ("train", "test"):
        x, y = arrays.get(f"x_{part}"), arrays.get(f"y_{part}")
        if y is not None and (x is None or y.shape != (len(x),)):
            raise ValueError(f"{path}: y_{part} has shape {y.shape}, wanted one label for each datum of x_{part}")
        if x is not None and len(x) == 0:
            raise ValueError(f"{path}: x_{part} has no rows, wanted at least one datum")
        if x is not None and (x.ndim < 2 or x.shape[1:] != arrays["x_train"].shape[1:] or x.dtype.kind not in "biuf"):
            shape = ("N", *arrays["x_train"].shape[1:])
            wanted = "(N, ...)" if part == "train" else f"({', '.join(map(str, shape))}) as in x_train"
            raise ValueError(f"{path}: x_{part} is {x.dtype} of shape {x.shape}, wanted numbers {wanted}")
        if x is not None and x.dtype != arrays["x_train"].dtype:  # which says how both are scaled
            raise ValueError(f"{path}: x_{part} is {x.dtype}, wanted the type of x_train, {arrays['x_train'].dtype}")

    def values(name: str) -> torch.Tensor:
        highest = high if high is not None else 255.0 if arrays[name].dtype == np.uint8 else 1.0
        with np.errstate(over="ignore"):  # what is too large for float32 becomes infinity
            x = torch.from_numpy(arrays[name].reshape(len(arrays[name]), -1).astype(np.float32))
        if high is not None and (bad := int(((x < low) | (x > high)).sum())):
            raise ValueError(
                f"range: got {[low, high]}, but {name} has {bad} values outside, from {x.min():g} to {x.max():g}"
            )
        x = x.sub_(low).div_(highest - low)
        if bad := int((~x.isfinite()).sum()):
            raise ValueError(f"{path}: {name} has {bad} values that are NaN or infinite in float32, wanted none")
        return x

    def labels(name: str) -> torch.Tensor | None:
        if name not in arrays:
            return None
        given = arrays[name]
        if given.dtype.kind not in "biuf":
            raise ValueError(f"{path}: {name} is {given.dtype}, wanted whole numbers >= 0")
        with np.errstate(invalid="ignore"):  # of what is no integer
            y = given.astype(np.int64)
        if (bad := (y != given) | (y < 0)).any():
            raise ValueError(f"{path}: {name} has {bad.sum()} labels like {given[bad][0]}, wanted whole numbers >= 0")
        return torch.from_numpy(y)

    shape = arrays["x_train"].shape[1:]
    if "x_test" not in arrays:
        return Dataset(*split(values("x_train"), labels("y_train"), test_fraction), shape)
    return Dataset(values("x_train"), values("x_test"), labels("y_train"), labels("y_test"), shape)
