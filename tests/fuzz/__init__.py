"""Arbitrary inputs: what is asked of every function, and the inputs by number (``python -m tests.fuzz``).

An input is drawn from a ``random.Random``, that of a number or one of hypothesis, which shrinks what it finds. Its call
ends in a right result or in an error that a user can read; everything else is a :class:`Finding`. A crash of the
process or a call that does not end is seen by the process that started this one (``__main__.py``).
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# errors that Python raises itself when a bug of ours meets an input
MISLEADING = (AttributeError, IndexError, KeyError, NameError, AssertionError, RecursionError, UnboundLocalError)
INTERNAL = (
    "INTERNAL ASSERT",
    "please report a bug",
    "Expected self.dtype to be equal",
    "not implemented for 'undefined",
)


class Finding(AssertionError):
    """What no input may do."""


class Refused(Exception):
    """An error that the user can read; the input was bad."""


def numbered(kind: str, number: int) -> random.Random:
    """The source of input ``number`` of a kind."""
    return random.Random(f"{kind} {number}")


def call(function: Callable[..., T], *arguments: Any, clear: tuple[type[Exception], ...], **options: Any) -> T:
    """The result of a call.

    Raises:
        Refused: the call raised one of the errors that are ``clear``, with words.
        Finding: it raised another one.
    """
    try:
        return function(*arguments, **options)
    except clear as error:
        words = str(error)
        if not words.strip() or isinstance(error, MISLEADING) or any(part in words for part in INTERNAL):
            raise Finding(_told(error)) from error
        raise Refused(words) from error
    except Exception as error:
        raise Finding(_told(error)) from error


def _told(error: Exception) -> str:
    """The error and where it came from."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:300]} ({Path(last.filename).name}:{last.lineno})"
