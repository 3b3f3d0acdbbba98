"""Loads the compiled extension, or says why it cannot be loaded and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import torch

_CURE = (
    "reinstall it against the torch you run: pip install --no-build-isolation --force-reinstall --no-deps ilvae_fast"
)


def _built_with() -> str:
    """The torch version that the build left beside the extension."""
    record = Path(__file__).with_name("_build.json")
    return json.loads(record.read_text())["torch"] if record.exists() else "an unknown version"


def _release(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


if _release(_built_with()) != _release(str(torch.__version__)):
    raise ImportError(f"ilvae_fast was built for torch {_built_with()} but runs with {torch.__version__}: {_CURE}")
try:
    from . import _C as _C
except ImportError as error:
    raise ImportError(
        f"ilvae_fast's compiled extension (built for torch {_built_with()}) does not load with torch "
        f"{torch.__version__}: {error}. Please {_CURE}"
    ) from error
