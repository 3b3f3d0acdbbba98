"""The fingerprint of the sources that a compiled extension belongs to.

setup.py runs this file by its path, before there is a package to import. It imports the standard library alone.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def fingerprint(root: Path) -> str:
    """Return the SHA-256 of the C++ sources and the version under ``root``, the folder that holds ``csrc``.

    File names count as well as contents, so that a renamed file is a change.
    """
    files = [path for path in (root / "csrc").rglob("*") if path.is_file()]
    digest = hashlib.sha256()
    for path in sorted([*files, root / "ilvae_fast" / "_version.py"], key=lambda p: p.relative_to(root).as_posix()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
