"""Optional packages are imported where they are used. The error for a missing one names the cure."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Return the module, or say which extra of this package installs it.

    Raises:
        ImportError: with the command that installs the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{package} is needed here and not installed: pip install 'ilvae_fast[{extra}]'") from error
