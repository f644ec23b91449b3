"""The page of faults names tests that exist, one at least in each row, and all of them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "faults.rst").read_text()
ROWS = [
    row for table in PAGE.split(".. list-table::")[1:] for row in table.split("\n   * - ")
]
NAMED = re.findall(r"``(test_\w+)::(test_\w+)``", PAGE)

# What these modules test is what the page is about.
MODULES_OF_FAULTS = sorted(
    path.stem
    for pattern in ("test_faults_*.py", "test_time_limits.py", "test_fuzz_files.py")
    for path in TESTS.glob(pattern)
    if path.stem != "test_faults_docs"
)


def names_of_tests(module: str) -> list[str]:
    """Return the names of a module's tests, without importing it."""
    tree = ast.parse((TESTS / f"{module}.py").read_text())
    return [
        node.name
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.name.startswith("test_")
    ]


@pytest.mark.parametrize("module", sorted({module for module, _ in NAMED}))
def test_each_test_that_is_named_exists(module: str) -> None:
    named = {name for owner, name in NAMED if owner == module}
    assert named <= set(names_of_tests(module))


@pytest.mark.parametrize("module", MODULES_OF_FAULTS)
def test_each_test_of_a_fault_is_named(module: str) -> None:
    named = {name for owner, name in NAMED if owner == module}
    of_the_tests_own = {"test_the_worlds_are_all_there"}
    assert set(names_of_tests(module)) - named <= of_the_tests_own


def test_each_row_names_a_test() -> None:
    rows = [row for row in ROWS if ":header-rows:" not in row]
    heads = [row for row in rows if row.startswith("what goes wrong")]
    assert len(heads) == PAGE.count(".. list-table::") >= 8
    for row in rows:
        if row not in heads:
            assert re.search(r"``test_\w+::test_\w+``", row), row


def test_nothing_that_looks_like_a_test_is_misspelt() -> None:
    assert len(re.findall(r"\btest_\w+", PAGE)) == 2 * len(NAMED)
