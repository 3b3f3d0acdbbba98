"""How commands end that do not end well."""

from __future__ import annotations

import dis
import errno
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._support.extras import require
from ..training.loop import Unsaved
from .display import show

if TYPE_CHECKING:
    from typer.core import TyperGroup
else:
    TyperGroup = require("typer.core", "train").TyperGroup

_PACKAGE = str(Path(__file__).resolve().parents[1])
_CURES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space there, and give the command again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change its permissions, or name another place"),
    errno.ENAMETOOLONG: "choose a shorter name",
}


class Group(TyperGroup):
    """Commands whose errors end in one line and status 2 where the user can mend them, and in a traceback and status 1
    where not. Ctrl-C ends in status 130. With ILVAE_FAST_TRACEBACK every error has its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            print(f"\n{str(interrupt) or 'interrupted'}", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # click ends quietly, for who read the output has gone
            if isinstance(error, Unsaved):
                show(list(error.measured.items()))  # whatever happens, for they may have taken hours
            words = _words(error)
            if words is not None and not os.environ.get("ILVAE_FAST_TRACEBACK"):
                print(f"error: {words}", file=sys.stderr)
                sys.exit(2)
            if isinstance(error, EOFError):  # click would take it for the end of what is typed
                traceback.print_exception(error)
                sys.exit(1)
            raise


def _words(error: Exception) -> str | None:
    """What the user can do about an error; None: nothing, it is a bug."""
    if isinstance(error, OSError) and error.strerror is not None:
        name = "" if error.filename is None else f"{os.fspath(error.filename)}: "
        cure = _CURES.get(error.errno or 0)
        return f"{name}{error.strerror}{'' if cure is None else f'; {cure}'}"
    return str(error) if isinstance(error, OSError) or _is_deliberate(error) else None


def _is_deliberate(error: Exception) -> bool:
    """Whether a ``raise`` in this package is where the error comes from, rather than an operation that failed."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    code = last.tb_frame.f_code
    here = os.path.realpath(code.co_filename).startswith(_PACKAGE + os.sep)
    return here and code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
