"""The package's modules: what each is, in its own words, and what it imports.

The documentation puts modules into parts, from the top down. Here it is found out whether
that is true: each module stands in one part, and imports from its own and those below only.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

PACKAGE = "trio_socketserver"


class Module(NamedTuple):
    """A module, or a package inside of the package.

    Attributes:
        summary: the first line of its docstring.
        imports: the modules of the package that it imports, but not itself.
    """

    summary: str
    imports: frozenset[str]


def _imported(tree: ast.Module, names: set[str], depth: int) -> set[str]:
    """Return the modules, among *names*, that a file imports.

    Args:
        tree: the file.
        names: the modules that there are.
        depth: how many packages below the top one the file stands.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            path = (node.module or "").split(".") if node.module else []
            if node.level == depth + 1:
                path = [PACKAGE, *path]
            if path[:1] == [PACKAGE]:
                found |= {path[1]} if path[1:] else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            found |= {part[1] for part in parts if part[0] == PACKAGE and part[1:]}
    return found & names


def read_modules(package: Path) -> dict[str, Module]:
    """Read the modules of the package that stands in a folder, without importing it."""
    files = {
        path.stem if path.is_file() else path.name: (
            [path] if path.is_file() else sorted(path.glob("*.py"))
        )
        for path in sorted(package.iterdir())
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    modules = {}
    for name, paths in files.items():
        trees = {path.stem: ast.parse(path.read_text()) for path in paths}
        text = ast.get_docstring(trees.get("__init__", next(iter(trees.values()))))
        summary = text.splitlines()[0] if text else ""
        depth = 0 if package == paths[0].parent else 1
        imports: set[str] = set()
        for tree in trees.values():
            imports |= _imported(tree, set(files), depth)
        modules[name] = Module(summary, frozenset(imports - {name}))
    return modules


def read_parts(lines: Iterable[str]) -> dict[str, list[str]]:
    """Read parts as the page has them: a title, and the names below it, indented."""
    parts: dict[str, list[str]] = {}
    names: list[str] = []
    for line in lines:
        if line.startswith(" "):
            names += line.split()
        elif line:
            names = parts.setdefault(line, [])
    return parts


def complaints(parts: Mapping[str, list[str]], modules: Mapping[str, Module]) -> list[str]:
    """Say what of *parts*, given from the top down, is not so."""
    places: dict[str, int] = {}
    said = []
    for number, names in enumerate(parts.values()):
        for name in names:
            if name in places:
                said.append(f"{name} stands in two parts")
            if name not in modules:
                said.append(f"{name} is no module")
            places[name] = number
    for name, module in modules.items():
        if name not in places:
            said.append(f"{name} stands in no part")
        if not module.summary:
            said.append(f"{name} has no docstring")
        said += [
            f"{name} imports {other}, which stands above it"
            for other in sorted(module.imports & places.keys())
            if name in places and places[other] < places[name]
        ]
    try:
        TopologicalSorter(
            {name: module.imports for name, module in modules.items()}
        ).prepare()
    except CycleError as error:
        said.append(f"these import one another: {', '.join(error.args[1])}")
    return said


def tabulate(parts: Mapping[str, list[str]], modules: Mapping[str, Module]) -> list[str]:
    """Return the parts in reStructuredText: a row for each module, under its part's."""
    lines = [".. list-table::", "   :widths: 26 74", "   :class: module-map", ""]
    for title, names in parts.items():
        lines += [f"   * - **{title}**", "     -"]
        for name in names:
            # Not to be linked: most of what the docstrings name is private.
            summary = modules[name].summary.replace("``", "`").replace("`", "``")
            lines += [f"   * - ``{name}``", f"     - {summary}"]
    return lines
