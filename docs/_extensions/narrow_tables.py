"""Tables for a narrow page: cells that know their column's title, names that may break.

On a phone, `_static/style.css` shows each row as a block, with the cells below each other.
Then the head of the table cannot say what a cell is, so each has it in ``data-label``.
On any page, a long name is wider than its column unless it may break between its words.
"""

from __future__ import annotations

import re
from html import escape

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

JOINT = re.compile(r"(?<=[A-Za-z])(_|::|\.)(?=[A-Za-z])")
"""Where a name may break: after what joins its words."""


def title_of(cell: nodes.entry) -> str:
    """Return the title of a cell's column, where it takes one to know what the cell is.

    A row's first cell is its heading. If there is only one other, that says what follows.
    """
    row = cell.parent
    place = row.index(cell)
    head = next(row.parent.parent.findall(nodes.thead), None)
    if head is None or row.parent is head or place == 0 or len(row) == 2:
        return ""
    return str(head[0][place].astext())


class Translator(HTML5Translator):
    """Writes HTML as Sphinx does, but for tables."""

    def visit_entry(self, node: nodes.entry) -> None:
        """Begin a cell."""
        super().visit_entry(node)
        if title := title_of(node):
            tag = self.body[-1]
            self.body[-1] = tag.replace("<td", f'<td data-label="{escape(title)}"', 1)

    def visit_Text(self, node: nodes.Text) -> None:  # noqa: N802
        """Write text."""
        begin = len(self.body)
        super().visit_Text(node)
        if any(isinstance(owner, nodes.entry) for owner in ancestors(node)):
            self.body[begin:] = [JOINT.sub(r"\1<wbr>", part) for part in self.body[begin:]]


def ancestors(node: nodes.Node) -> list[nodes.Element]:
    """Return what a node is inside of."""
    found = []
    while (node := node.parent) is not None:
        found.append(node)
    return found


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.set_translator("html", Translator)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
