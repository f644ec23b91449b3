"""The changelog, which is in Markdown for those who read the repository, as a page.

It has headings, lists, links and names in backticks, and no more; a parser of Markdown
would be a dependency for one page.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

RULES = [
    (r"^# .*\n", ""),
    (r"^## \[?([^]\n]+)\]?(.*)$", lambda match: underlined(match[1] + match[2], "-")),
    (r"^### (.*)$", lambda match: underlined(match[1], "~")),
    (r"`([^`]+)`", r"``\1``"),
    (r"\[([^]]+)\]\(([^)]+)\)", r"`\1 <\2>`__"),
]
"""Patterns of Markdown, and what stands for them in reStructuredText, in this order."""


def underlined(title: str, line: str) -> str:
    """Return a heading."""
    return f"{title}\n{line * len(title)}"


def convert(app: Sphinx, path: Path, docname: str, content: list[str]) -> None:
    """Turn an included file (``include-read``) into reStructuredText."""
    if path.suffix == ".md":
        for pattern, replacement in RULES:
            content[0] = re.sub(pattern, replacement, content[0], flags=re.MULTILINE)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("include-read", convert)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
