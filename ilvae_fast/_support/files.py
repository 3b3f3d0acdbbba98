"""Files are written so that a reader never sees half of one, on file systems that can less, too."""

from __future__ import annotations

import errno
import json
import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# what file systems answer that have no such thing: some of networks, containers and FUSE
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK}


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write ``content`` (text as UTF-8) to ``path``. If the process dies meanwhile, ``path`` stays as it was.

    Raises:
        OSError: naming ``path``.
    """
    path = Path(path)
    with _beside(path, content.encode() if isinstance(content, str) else content) as written:
        os.replace(written, path)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Find out whether ``path`` could be written, before the work whose result it is to hold.

    Raises:
        OSError: naming ``path``; a folder that cannot be written, or a full disk.
    """
    with _beside(Path(path), bytes(2**14)):
        pass


def read_json(path: str | os.PathLike[str], cure: str) -> Any:
    """The mapping in a JSON file.

    Raises:
        ValueError: it is empty, cut off or something else; names the file and the ``cure``.
    """
    content = Path(path).read_bytes()
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        state = f"is damaged, not valid JSON ({error})" if content.strip() else "is empty"
        raise ValueError(f"{os.fspath(path)}: {state}; {cure}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{os.fspath(path)}: holds {type(found).__name__}, wanted names with values; {cure}")
    return found


@contextmanager
def _beside(path: Path, content: bytes) -> Iterator[Path]:
    """A new file with ``content`` in the folder of ``path``, on the disk; unless it has been moved, it goes at the end.

    It lies in the same folder, for a file is replaced by another at once only within a file system.
    """
    temporary = path.parent / f".{path.name[:40]}.{secrets.token_hex(4)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            _sync(file.fileno(), path)
        yield temporary
    except OSError as error:
        if error.errno is not None:  # one that says which file is meant
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk, or warn where a file system cannot say so."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor, path)
    finally:
        os.close(descriptor)


def _sync(descriptor: int, path: Path) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        warnings.warn(
            f"{path.parent}: its file system has no fsync ({error.strerror}): what is written last may be lost if the "
            "machine goes down",
            stacklevel=2,
        )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock on a file, which is made; it goes with the process, however that ends.

    Raises:
        BlockingIOError: another process holds it.
    """
    with open(path, "w") as file:
        try:
            import fcntl  # not on Windows

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (ImportError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _UNSUPPORTED:
                raise
            warnings.warn(
                f"{path.parent}: files cannot be locked there ({error}): make sure that only one process writes to it",
                stacklevel=2,
            )
        yield
