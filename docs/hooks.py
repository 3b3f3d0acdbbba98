"""What makes the documentation site out of the repository: hooks of MkDocs, and an extension of Griffe.

The site mirrors the repository. A page keeps its path, and what a page links to outside docs/ is on the site too, so
that one relative link holds here, on the site, and where the repository is browsed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_LINKS = re.compile(r"\]\((?!https?:|#)([^)#\s]+)|(?:src|href)=\"(?!https?:|#)([^\"#]+)\"")
_FENCES = re.compile(r"^( *)```.*?^\1```$", re.DOTALL | re.MULTILINE)


def linked(page: Path) -> list[Path]:
    """The files that a page of Markdown links to or shows."""
    targets = ((page.parent / (a or b)).resolve() for a, b in _LINKS.findall(_FENCES.sub("", page.read_text())))
    return [target for target in targets if target.is_file()]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of docs/ and README.md at their paths in the repository, and whatever is linked from them."""
    root = Path(str(config.config_file_path)).parent
    ours = [file for file in files if str(file.src_dir) == config.docs_dir]
    found = {Path(str(file.abs_src_path)): None for file in ours}  # in order, each once
    waiting = [root / "README.md", *(path for path in found if path.suffix == ".md")]
    while waiting:
        page = waiting.pop()
        found[page] = None
        new = [path for path in linked(page) if path not in found and path.is_relative_to(root)]
        found.update(dict.fromkeys(new))
        waiting += [path for path in new if path.suffix == ".md"]
    names = [path.relative_to(root).as_posix() for path in found]
    mirrored = [File(name, str(root), config.site_dir, config.use_directory_urls) for name in names]
    return Files([*(file for file in files if file not in ours), *mirrored])


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Where GitHub and Python-Markdown differ.

    What a fence says besides its language, such as the file of a change, becomes the title of the block. A bar in the
    code of a table needs a backslash there, and keeps it here.
    """
    markdown = re.sub(r"^( *```\w+) ([^\n\"=`]+)$", r'\1 title="\2"', markdown, flags=re.MULTILINE)
    rows = re.compile(r"^\|.*\|$", re.MULTILINE)
    return rows.sub(lambda row: re.sub(r"`[^`]+`", lambda code: code[0].replace(r"\|", "|"), row[0]), markdown)


def on_page_content(html: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Put the data of ``<script type="application/json" data-source="PATH">`` into the page; PATH is from the root."""
    root = Path(str(config.config_file_path)).parent
    pattern = r'(<script type="application/json"[^>]*data-source="([^"]+)"[^>]*>)\s*(</script>)'
    return re.sub(pattern, lambda match: match[1] + (root / match[2]).read_text() + match[3], html)


class Roles(griffe.Extension):
    """Turns ``:class:`name` `` of docstrings into links to what the reference has, and into code elsewhere."""

    _ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?\.?([\w.]+)`")

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        pages = (Path(__file__).parent / "api").glob("*.md")
        names = [name for page in pages for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)]
        documented = {pkg[name.partition(".")[2]].canonical_path for name in names}
        self._walk(pkg, documented)

    def _walk(self, obj: griffe.Object, documented: set[str]) -> None:
        if obj.docstring is not None:
            text = self._ROLE.sub(lambda m: self._link(obj, m[1], documented), obj.docstring.value)
            # outside of code (*S, n) is a shape, and no emphasis
            obj.docstring.value = re.sub(r"(`+[^`]+`+)|\(\*", lambda m: m[1] or r"(\*", text)
        for member in obj.members.values():
            if not member.is_alias:
                self._walk(member, documented)

    def _link(self, obj: griffe.Object, name: str, documented: set[str]) -> str:
        try:
            full = name if name.startswith("ilvae_fast.") else obj.resolve(name)
            path = obj.modules_collection[full].canonical_path
        except (griffe.NameResolutionError, KeyError):  # of another package, or private
            return f"`{name}`"
        owner, _, _ = path.rpartition(".")
        return f"[`{name}`][{path}]" if {path, owner} & documented else f"`{name}`"
