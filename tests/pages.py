"""The pages that people read, and the blocks of code in them."""

from __future__ import annotations

import re
import shlex
from itertools import dropwhile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


class Block(NamedTuple):
    """A fenced block: its language, what else its first line says, and its text without the fence's indentation."""

    language: str
    info: str
    source: str


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in these languages; of all, if none is given."""
    found = []
    for match in re.finditer(r"^( *)```(\w*) ?(.*)\n((?:.*\n)*?)\1```$", page.read_text(), re.MULTILINE):
        indent, language, info, source = match.groups()
        if not languages or language in languages:
            found.append(Block(language, info, re.sub(rf"^{indent}", "", source, flags=re.MULTILINE)))
    return found


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """The commands of a page's blocks for the shell as their words, without comments and with lines joined.

    Variables that are set for one command are left out.
    """
    lines = "".join(block.source for block in blocks(page, "sh")).replace("\\\n", " ").splitlines()
    parsed = (shlex.split(line, comments=True) for line in lines)
    return [list(dropwhile(re.compile(r"[A-Z_]+=").match, words)) for words in parsed if words]
