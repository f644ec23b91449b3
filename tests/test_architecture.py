"""docs/architecture.rst is true: its parts are the package's, and what it names exists.

CONTRIBUTING.md too names only what there is."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest

import trio_socketserver

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.rst").read_text()
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
PACKAGE = Path(trio_socketserver.__file__).parent
PRIVATE = sorted(path.stem for path in PACKAGE.glob("_*.py") if path.stem[1] != "_")


def load_import_map() -> Any:
    path = ROOT / "docs" / "_extensions" / "import_map.py"
    spec = importlib.util.spec_from_file_location("import_map", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


import_map = load_import_map()


def parts_of_the_page() -> dict[str, list[str]]:
    _, _, rest = PAGE.partition(".. module-map::\n\n")
    content = re.match(r"(?:   .*\n|\n)+", rest)
    assert content is not None
    parts: dict[str, list[str]] = import_map.read_parts(
        textwrap.dedent(content[0]).splitlines()
    )
    return parts


def test_each_module_stands_in_its_part() -> None:
    modules = import_map.read_modules(PACKAGE)
    assert import_map.complaints(parts_of_the_page(), modules) == []


def test_the_modules_and_their_imports_are_found() -> None:
    modules = import_map.read_modules(PACKAGE)
    assert {*PRIVATE, "__init__", "__main__"} <= modules.keys()
    assert modules["_nursery"].imports == {"_handlers", "_server"}
    assert modules["__main__"].imports == {"_cli"}
    assert modules["_groups"].imports == set()
    assert modules["_nursery"].summary == "`NurseryMixIn`: a task for each request."


def module(*imports: str, summary: str = "Something.") -> Any:
    return import_map.Module(summary, frozenset(imports))


@pytest.mark.parametrize(
    ("parts", "modules", "said"),
    [
        ({"up": ["a"], "down": ["b"]}, {"a": module("b"), "b": module()}, None),
        ({"one": ["a", "b"]}, {"a": module("b"), "b": module()}, None),
        (
            {"up": ["b"], "down": ["a"]},
            {"a": module("b"), "b": module()},
            "a imports b, which stands above it",
        ),
        ({"one": ["a"]}, {"a": module(), "b": module()}, "b stands in no part"),
        ({"one": ["a"], "two": ["a"]}, {"a": module()}, "a stands in two parts"),
        ({"one": ["a", "b"]}, {"a": module()}, "b is no module"),
        ({"one": ["a"]}, {"a": module(summary="")}, "a has no docstring"),
        (
            {"one": ["a", "b"]},
            {"a": module("b"), "b": module("a")},
            "these import one another",
        ),
    ],
)
def test_what_is_not_so_is_said(
    parts: dict[str, list[str]], modules: dict[str, Any], said: str | None
) -> None:
    complaints = import_map.complaints(parts, modules)
    assert len(complaints) == (said is not None)
    assert said is None or complaints[0].startswith(said)


def test_imports_of_every_spelling_are_found(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "a.py").write_text(
        '"""A."""\nfrom . import b\nif b:\n    from .c import d\n'
    )
    (tmp_path / "b.py").write_text('"""B."""\nimport trio_socketserver.c\nimport os.a\n')
    (tmp_path / "c.py").write_text('"""C.\n\nMore."""\nfrom trio_socketserver import b\n')
    (inner / "__init__.py").write_text('"""Inner."""\nfrom .a import z\n')
    (inner / "a.py").write_text(
        '"""Not the other a."""\nfrom ..c import d\nfrom .. import b\n'
    )
    found = import_map.read_modules(tmp_path)
    assert {name: (entry.summary, set(entry.imports)) for name, entry in found.items()} == {
        "a": ("A.", {"b", "c"}),
        "b": ("B.", {"c"}),
        "c": ("C.", {"b"}),
        "inner": ("Inner.", {"b", "c"}),
    }


def test_every_summary_is_in_the_table() -> None:
    modules = import_map.read_modules(PACKAGE)
    lines = import_map.tabulate(parts_of_the_page(), modules)
    for name, entry in modules.items():
        row = lines.index(f"   * - ``{name}``")
        assert lines[row + 1].replace("`", "").endswith(entry.summary.replace("`", ""))


# -- names ---------------------------------------------------------------------------------


def names_of_the_package() -> dict[str, Any]:
    """Return what the modules define, by its name."""
    defined = (
        vars(importlib.import_module(f"trio_socketserver.{name}")) for name in PRIVATE
    )
    return {
        name: value
        for names in defined
        for name, value in names.items()
        if getattr(value, "__module__", "trio_socketserver").startswith("trio_socketserver")
    }


NAMES = names_of_the_package()
ATTRIBUTES = {
    attribute
    for owner in NAMES.values()
    if inspect.isclass(owner)
    for attribute in {*dir(owner), *getattr(owner, "__annotations__", ())}
}
ELSEWHERE = {
    "trio.run",
    "Cancelled",
    "KeyboardInterrupt",
    "SystemExit",
    "module-map",
    "DISPATCHERS",
}


@pytest.mark.parametrize(
    "literal",
    sorted({*re.findall(r"``([A-Za-z_][\w.-]*)(?:\([\w, ]*\))?``", PAGE)} - ELSEWHERE),
)
def test_what_the_page_names_exists(literal: str) -> None:
    if literal in {*PRIVATE, "__init__"}:
        return
    if literal.endswith(".py"):
        assert any((ROOT / folder / literal).exists() for folder in ("", "tests"))
        return
    first, *rest = literal.split(".")
    if not rest and first in ATTRIBUTES:
        return
    found = NAMES[first]
    for attribute in rest:
        found = getattr(found, attribute)


@pytest.mark.parametrize(
    "pattern", sorted(set(re.findall(r"``([\w/<>*]+\*?\.py)``", PAGE)))
)
def test_test_files_exist(pattern: str) -> None:
    found = pattern.replace("<module>", "*").removeprefix("tests/")
    assert list((ROOT / "tests").glob(found))


# -- CONTRIBUTING.md -----------------------------------------------------------------------

COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"^```sh\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
TEST_COMMANDS = [
    words[words.index("pytest") + 1 :] for words in COMMANDS if "pytest" in words[:5]
]


def test_each_extra_that_is_installed_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"\.\[([\w,]+)\]", GUIDE)
    assert len(extras) == 2
    named = {extra for group in extras for extra in group.split(",")}
    assert named == project["optional-dependencies"].keys()


def test_checks_are_those_of_ci() -> None:
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("not in the source distribution")
    section = GUIDE.partition("\n## Run the checks\n")[2].partition("```sh\n")[2]
    block = section.partition("```")[0]
    ours = [line.split() for line in block.splitlines()]
    theirs = script.read_text().split('say "lint"')[1].split('say "documentation"')[0]
    done = [
        [word for word in line.strip(" ()").split() if not word.startswith("--no-")]
        for line in theirs.replace('cd "$work" && ', "").splitlines()
        if line.strip() and "say " not in line
    ]
    assert ours == done


@pytest.mark.parametrize("words", TEST_COMMANDS, ids=" ".join)
def test_each_test_command_finds_tests(words: list[str]) -> None:
    if not words:
        return  # All of them; this is one.
    path, _, test = words[0].partition("::")
    tree = ast.parse((ROOT / path).read_text())
    tests = [getattr(node, "name", "") for node in tree.body]
    assert not test or test in tests
    if words[1:]:
        option, word = words[1:]
        assert option == "-k"
        assert 0 < sum(word in name for name in tests) < len(tests)


def test_paths_and_options_exist() -> None:
    for path in re.findall(r"`((?:docs|tests|examples|\.ci)/[\w./]+|[A-Z]+\.md)`", GUIDE):
        assert (ROOT / path).exists() or path.startswith(".ci/"), path
    for name in re.findall(r"`(_\w+)`", GUIDE):
        assert name in PRIVATE
    options = (ROOT / "tests" / "benchmarks" / "__main__.py").read_text()
    for option in re.findall(r"tests\.benchmarks (--\w+)", GUIDE):
        assert f'"{option}"' in options
    for variable in re.findall(r"\b(CHAOS_\w+)=", GUIDE):
        assert variable in (ROOT / "tests" / "test_chaos.py").read_text()
    assert all(key in GUIDE for key in ("-W -n --keep-going", "CHAOS_SEED"))
