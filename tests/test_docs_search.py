"""The pages that Sphinx makes: what can be searched for, and tables that fit a phone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import trio_socketserver

pytest.importorskip("sphinx", reason="the docs extra is not installed")
pytest.importorskip("furo", reason="the docs extra is not installed")
pytest.importorskip("sphinxcontrib_trio", reason="the docs extra is not installed")

DOCS = Path(__file__).parent.parent / "docs"

LIMIT = 120
"""Seconds to wait for a build that hangs. It takes some five."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the pages, where a warning is an error; return their folder."""
    folder = tmp_path_factory.mktemp("docs")
    html = folder / "html"
    options = ["-q", "-W", "-n", "-d", str(folder / "doctrees")]
    subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(DOCS), str(html)],
        check=True,
        timeout=LIMIT,
    )
    return html


@pytest.fixture(scope="module")
def index(pages: Path) -> dict[str, Any]:
    """What the browser searches in."""
    text = (pages / "searchindex.js").read_text()
    found: dict[str, Any] = json.loads(text.removeprefix("Search.setIndex(")[:-1])
    return found


def pages_with(index: dict[str, Any], word: str) -> set[str]:
    """Return the pages that have a word in their text or in a title."""
    pages = set()
    for kind in ("terms", "titleterms"):
        found = index[kind].get(word, [])
        for number in found if isinstance(found, list) else [found]:
            pages.add(index["docnames"][number])
    return pages


def test_every_page_is_in_the_index_and_in_the_navigation(
    pages: Path, index: dict[str, Any]
) -> None:
    written = {path.stem for path in DOCS.glob("*.rst")}
    assert set(index["docnames"]) == written
    start = (pages / "index.html").read_text()
    navigation = start[start.index('class="sidebar-tree"') :]
    linked = re.findall(r'class="reference internal" href="(\w+)\.html"', navigation)
    assert set(linked) == written - {"index"}
    body = start[start.index("<article") : start.index("</article>")]
    assert set(re.findall(r'href="(\w+)\.html"', body)) >= written - {"index"}


def test_every_public_name_is_found(index: dict[str, Any]) -> None:
    found = {name for *_, name in index["objects"].get("trio_socketserver", []) if name}
    assert set(trio_socketserver.__all__) <= found


@pytest.mark.parametrize(
    ("word", "page"),
    [
        ("shutdown", "structured"),
        ("block_on_clos", "differences"),  # The stem, as the browser makes it.
        ("threadingmixin", "dispatchers"),
        ("deadlock", "porting"),
        ("certif", "tls"),
        ("systemd", "deploying"),
    ],
)
def test_words_that_people_look_for(index: dict[str, Any], word: str, page: str) -> None:
    assert page in pages_with(index, word)


def test_cells_know_their_column_and_names_may_break(pages: Path) -> None:
    faults = (pages / "faults.html").read_text()
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", faults, re.DOTALL)
    labels = [re.findall(r'data-label="([^"]*)"', row) for row in rows if "<td" in row]
    assert labels
    assert all(found == ["what happens then", "test"] for found in labels)
    assert "test_<wbr>faults_<wbr>accept::<wbr>test_" in faults
    handlers = (pages / "handlers.html").read_text()
    life, _, _ = handlers.partition('<section id="reading">')
    assert "<td" in life
    assert "data-label" not in life


def test_the_changelog_is_converted(pages: Path) -> None:
    text = (DOCS.parent / "CHANGELOG.md").read_text()
    page = (pages / "changelog.html").read_text()
    article = page[page.index("<article") : page.index("</article>")]
    for level, mark in ((2, "##"), (3, "###")):
        shown = re.findall(rf"<h{level}>(.*?)<a ", article)
        titles = re.findall(rf"^{mark} (.*)$", text, re.MULTILINE)
        assert shown == [re.sub(r"[][]", "", title) for title in titles] != []
    assert article.count("<li>") == len(re.findall(r"^- ", text, re.MULTILINE))
    assert "`" not in article
