"""The floors of the package: a module imports from its own floor and those below, and no imports go in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ilvae_fast"

# The names under ilvae_fast, folders and modules, from the ground up. Each may import from those before it.
FLOORS = (
    "_version",
    "_C",
    "_support",  # errors, checks, options, optional packages, files
    "operators",  # the compiled operators, their reference, and PyTorch's transformations
    "reference",
    "functional",
    "distributions",  # likelihoods, priors, posteriors
    "layers",  # the map and the decoder
    "convert",
    "export",
    "annealing",
    "vae",
    "data",
    "metrics",
    "training",
    "__init__",  # the public names
    "cli",
    "__main__",
)
# Neighbours that could import each other by that order, and have no business to.
APART = {("data", "vae"), ("data", "layers"), ("data", "operators"), ("data", "distributions"), ("metrics", "data")}


def modules(package: Path) -> dict[str, Path]:
    """All modules of a package by their full names; those with a stub alone, as the extension, too."""
    found = {}
    for path in sorted([*package.rglob("*.pyi"), *package.rglob("*.py")]):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows(package: Path) -> dict[str, set[str]]:
    """What each module imports of the package: anywhere in it, also inside functions and for type checkers alone."""
    known = modules(package)
    found: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        here = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = here[: len(here) + 1 - node.level] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                targets = [f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names]
            else:
                continue
            found[name].update(target for target in targets if target in known and target != name)
    return found


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that import each other, directly or by way of others."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for target in graph[waiting.pop()] - seen:
                seen.add(target)
                waiting.append(target)
        return seen

    reach = {name: reached(name) for name in graph}
    found = [{other for other in reach[name] if name in reach[other]} for name in graph]
    return [circle for k, circle in enumerate(found) if circle and circle not in found[:k]]


def floor(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Arrows to a higher floor, or between floors that are to stay apart."""
    height = {name: k for k, name in enumerate(FLOORS)}
    return [
        f"{name} -> {target}"
        for name, targets in graph.items()
        for target in targets
        if height[floor(target)] > height[floor(name)] or (floor(name), floor(target)) in APART
    ]


def test_every_module_has_a_floor():
    assert {floor(name) for name in modules(PACKAGE)} == set(FLOORS)


def test_no_module_imports_from_a_floor_above():
    assert upward(arrows(PACKAGE)) == []


def test_no_imports_go_in_a_circle():
    assert circles(arrows(PACKAGE)) == []


def posix_alone(path: Path) -> list[str]:
    """Modules that Windows lacks and that are imported with the module itself."""
    found, waiting = [], [*ast.parse(path.read_text()).body]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [node.module or ""]
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)
    return sorted(
        {"fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}.intersection(found)
    )


def test_windows_can_import_every_module(tmp_path):
    assert {name: found for name, path in modules(PACKAGE).items() if (found := posix_alone(path))} == {}
    (tmp_path / "module.py").write_text(
        "if True:\n    import fcntl\ndef f():\n    import pwd\nfrom resource import x\n"
    )
    assert posix_alone(tmp_path / "module.py") == ["fcntl", "resource"]


@pytest.mark.parametrize(
    ("module", "line", "target"),
    [
        ("operators/plan.py", "from ..layers import BrenierMap", "layers"),
        ("operators/plan.py", "def f():\n    from ..layers.brenier_map import BrenierMap", "layers.brenier_map"),
        ("layers/nonneg.py", "import ilvae_fast.vae.model", "vae.model"),
        ("data/files.py", "from .. import metrics", "metrics"),
        ("data/files.py", "from ..layers import BrenierMap", "layers"),
        ("vae/model.py", "if TYPE_CHECKING:\n    from .. import VAE", ""),
    ],
)
def test_an_upward_arrow_is_found(tmp_path, module, line, target):
    package = _copy(tmp_path)
    path = package / module
    path.write_text(f"{path.read_text()}\n{line}\n")
    name = "ilvae_fast." + module.removesuffix(".py").replace("/", ".")
    assert upward(arrows(package)) == [f"{name} -> {'.'.join(filter(None, ('ilvae_fast', target)))}"]


def test_a_circle_is_found(tmp_path):
    package = _copy(tmp_path)
    path = package / "operators" / "operands.py"
    path.write_text(f"{path.read_text()}\ndef f():\n    from . import dispatch\n")
    (circle,) = circles(arrows(package))
    assert {"ilvae_fast.operators.operands", "ilvae_fast.operators.dispatch"} <= circle
    assert upward(arrows(package)) == []


def _copy(folder: Path) -> Path:
    """The package with its Python sources alone, to be spoiled."""
    for path in modules(PACKAGE).values():
        copied = folder / path.relative_to(PACKAGE.parent)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_text(path.read_text())
    return folder / "ilvae_fast"
