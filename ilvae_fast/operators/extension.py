"""Loads the compiled extension as ``ilvae_fast._C``, or says why that is impossible and what to do.

A build puts the extension beside the Python sources, with ``_build.json``, the record of that build. Python started in
a clone prefers the clone's sources to an installed package, and the clone may have no extension. It then borrows that
of the installed package, provided that both have the same C++ sources and version.

The reference backend needs no extension. Where ``ILVAE_FAST_BACKEND=reference`` asks for it, whatever stands in the way
of the extension is kept, as the error of those who ask for the compiled operators all the same.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._version import __version__
from . import backend
from .fingerprint import fingerprint

if TYPE_CHECKING:
    from .. import _C as _C

_PACKAGE = Path(__file__).parents[1]
_NAME = f"{__package__.partition('.')[0]}._C"


def locate(package: Path, search: Iterable[str]) -> Path:
    """Return the file of the extension for the sources in ``package``.

    Args:
        package: the folder of the package's Python sources.
        search: folders that may hold an installed copy of the package, as ``sys.path`` has them.

    Raises:
        ImportError: there is no extension that belongs to these sources. The message lists those that were found.
    """
    if (own := _extension_in(package)) is not None:
        return own
    others = []
    for entry in search:
        folder = Path(entry or ".").resolve() / package.name
        found = None if folder == package.resolve() else _extension_in(folder)
        if found is None:
            continue
        if _belongs(folder, package.parent):
            return found
        others.append(str(folder))
    reason = "and no installed copy of the package was found"
    if others:
        reason = f"and the one in {', '.join(others)} was built from other C++ sources or another version"
    raise ImportError(f"ilvae_fast has no compiled extension in {package}, {reason}. {cure(package)}")


def check_torch(extension: Path) -> None:
    """Refuse an extension that was built for another release of torch, whose binary interface may differ, or has
    kernels for another major version of CUDA.

    Raises:
        ImportError: naming both.
    """
    record = _record(extension.parent)
    built, cuda = record.get("torch", "an unknown version"), record.get("cuda")
    running = f"torch {torch.__version__}"
    if cuda is not None:
        built, running = f"{built} with CUDA {cuda}", f"{running} with CUDA {torch.version.cuda or 'missing'}"
    other_cuda = cuda is not None and cuda.split(".")[0] != str(torch.version.cuda).split(".")[0]
    if other_cuda or _release(built) != _release(str(torch.__version__)):
        raise ImportError(
            f"ilvae_fast's compiled extension {extension} was built for torch {built}, and {running} is running. "
            f"{cure(extension.parent)}"
        )


def load(extension: Path) -> Any:
    """Import the extension, wherever it lies, as ``ilvae_fast._C``.

    Raises:
        ImportError: the dynamic linker refuses it.
    """
    spec = importlib.util.spec_from_file_location(_NAME, extension)
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ImportError(
            f"ilvae_fast's compiled extension does not load with torch {torch.__version__}: {error}. "
            f"{cure(extension.parent)}"
        ) from error
    sys.modules[_NAME] = module
    vars(sys.modules[_NAME.partition(".")[0]])["_C"] = module  # where the import of a submodule leaves it
    return module


class Absent:
    """Stands for the extension where there is none: its functions raise the error that says why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def absent(*_: Any) -> Any:
            raise ImportError(self.reason)

        return absent


def warn_of_cpu_only(extension: Path) -> None:
    """Repeat, where there is a GPU, why a build for a torch with CUDA has no kernels for it. pip did not show that."""
    reason = _record(extension.parent).get("without_cuda")
    if reason and torch.cuda.device_count():
        warnings.warn(
            f"ilvae_fast was built for the CPU alone, so that maps go by plain autograd on this GPU: {reason}. "
            f"{cure(extension.parent)}, with ILVAE_FAST_CUDA=on in the environment, which shows what is missing, or "
            "with ILVAE_FAST_CUDA=off, which keeps it so without this warning",
            stacklevel=2,
        )


def without_operators(kind: str) -> str | None:
    """Return why calls on this kind of device go by plain autograd; None where there are compiled operators."""
    if kind in DEVICES:
        return None
    return f"{'this build of ' if kind == 'cuda' else ''}ilvae_fast has no kernels for {kind} devices"


def cure(package: Path) -> str:
    """Return the sentence that says how to build the extension for ``package``."""
    root = package.parent
    place, folder = ("", shlex.quote(str(root))) if (root / "csrc").is_dir() else (" in a clone of the repository", ".")
    return (
        f"To build it, run{place}: python -m pip install cmake ninja pybind11 'setuptools>=77' && "
        f"python -m pip install --no-build-isolation --no-deps --force-reinstall {folder}"
    )


def _extension_in(folder: Path) -> Path | None:
    candidates = (folder / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def _record(folder: Path) -> dict[str, str]:
    """Return what the build wrote down: ``torch``, its version, and ``sources``, their fingerprint."""
    path = folder / "_build.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _belongs(installed: Path, root: Path) -> bool:
    """Whether the extension in ``installed`` was built from the sources under ``root``."""
    return (root / "csrc").is_dir() and _record(installed).get("sources") == fingerprint(root)


def _release(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


def build_info() -> dict[str, Any]:
    """Say what the extension in use was built with and for.

    Keys: ``version``; ``torch`` and ``python`` of the build; ``compiler``; ``cpu``, the instruction set in use;
    ``cuda``, the toolkit version, or None where the extension was built for the CPU alone; ``cuda_architectures``.
    Without an extension, ``extension`` says why, and the rest is None.
    """
    if backend.absent is not None:
        keys = ("torch", "python", "compiler", "cpu", "cuda", "cuda_architectures")
        return {"version": __version__, **dict.fromkeys(keys), "extension": f"none: {backend.absent}"}
    return {"version": __version__, **_C.build_info()}


def _load() -> Any:
    try:
        path = locate(_PACKAGE, sys.path)
        check_torch(path)
        module = load(path)
    except ImportError as error:
        if backend.current_backend() != "reference":
            error.msg += ". Without it everything runs by plain autograd, slower: ILVAE_FAST_BACKEND=reference"
            raise
        backend.absent = str(error)
        return Absent(backend.absent)
    warn_of_cpu_only(path)
    return module


if not TYPE_CHECKING:
    _C = sys.modules.get(_NAME) or _load()  # loading twice would register the operators twice

# The kinds of devices with compiled operators; on "meta" they compute shapes.
DEVICES = frozenset(["cpu", "meta", *(["cuda"] if build_info()["cuda"] else [])])
