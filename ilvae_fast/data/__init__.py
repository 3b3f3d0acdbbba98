"""Data sets by name. To add one, write a function that returns a :class:`Dataset`, ``@on_cpu``, and put it into
``DATASETS``."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable
from typing import Any

from .._support.errors import unknown_name
from .._support.options import check_names
from .dataset import Dataset as Dataset
from .files import npz as npz
from .files import text as text
from .images import digits as digits
from .images import fashion_mnist as fashion_mnist
from .images import mnist as mnist
from .images import omniglot as omniglot
from .parts import Parts as Parts
from .synthetic import pinwheel as pinwheel
from .synthetic import synthetic_text as synthetic_text
from .synthetic import toy as toy

DATASETS: dict[str, Callable[..., Dataset]] = {
    "digits": digits,
    "toy": toy,
    "pinwheel": pinwheel,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "omniglot": omniglot,
    "synthetic_text": synthetic_text,
    "text:FILE": text,
    "npz:FILE": npz,
}


def load(name: str, data_root: str | os.PathLike[str] | None = None, **options: Any) -> Dataset:
    """The data set called ``name``: a key of ``DATASETS``, with a path in the place of FILE.

    Args:
        data_root: folder of the data sets that live in files; None: the environment variable ILVAE_FAST_DATA_ROOT,
            else ``data``. A relative FILE is looked for there first, if either is given, and then in the current
            folder. The other data sets take no notice of it.
        options: of the data set, such as ``sigma=7.5`` for ``toy``; see its function. And of all: ``limit``,
            ``validation``, ``binarize``; see :class:`Parts`.

    Raises:
        ValueError: unknown name of a data set or option (the nearest one is named); a damaged file.
        FileNotFoundError: what was looked for, where, and how to get it.
        ImportError: a package that the data set needs is not installed; says how to install it.
    """
    key = _key("name", name)
    build = DATASETS[key]
    own = [p.name for p in inspect.signature(build).parameters.values() if p.kind is p.KEYWORD_ONLY]
    common = [field.name for field in dataclasses.fields(Parts)]
    check_names(f"option of {key}", options, [*own, *common])
    parts = Parts(**{option: options.pop(option) for option in common if option in options})
    path, root = located("name", name, data_root)
    if key != name:
        dataset = build(path.partition(":")[2], **options)
    elif "data_root" in inspect.signature(build).parameters:
        dataset = build(root, **options)
    else:
        dataset = build(**options)
    return parts.of(dataset)


def located(
    argument: str, name: str, data_root: str | os.PathLike[str] | None = None
) -> tuple[str, str | os.PathLike[str] | None]:
    """A name and a data root that mean in every folder what these mean in the current one.

    Raises:
        ValueError: unknown name of a data set, which ``argument`` was given; the nearest one is named.
    """
    key = _key(argument, name)
    given = data_root if data_root is not None else os.environ.get("ILVAE_FAST_DATA_ROOT")
    root = None if given is None else _absolute(given)
    if key != name:
        kind, _, path = name.partition(":")
        path = os.path.expanduser(path)
        below = path if root is None else os.path.join(root, path)
        here = os.path.isfile(path) and not os.path.isfile(below)
        return f"{kind}:{_absolute(path if here else below)}", None if data_root is None else root
    if "data_root" in inspect.signature(DATASETS[key]).parameters:
        return name, _absolute("data") if root is None else root
    return name, None if data_root is None else root


def is_file(name: str) -> bool:
    """Whether a data set is a file of the user's, named by its path."""
    return ":" in name


def _key(argument: str, name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{argument}: got {name!r}, wanted the name of a data set")
    kind, separator, path = name.partition(":")
    key = f"{kind}:FILE" if separator else name
    if key not in DATASETS or (separator and not path):
        raise unknown_name(argument, name, DATASETS)
    return key


def _absolute(path: str | os.PathLike[str]) -> str:
    return os.path.abspath(os.path.expanduser(path))
