"""Optional packages: imported where they are used, with the cure in the error."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, or say which extra of this package brings it.

    Raises:
        ImportError: with the command that installs the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{package} is needed here and not installed: pip install ilvae_fast[{extra}]") from error
