"""The directive ``lifecycle``: the picture and the table of `loop_picture`."""

from __future__ import annotations

from docutils import nodes
from docutils.statemachine import StringList
from loop_picture import LAYOUTS, draw, tabulate
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Lifecycle(SphinxDirective):
    """``.. lifecycle::``."""

    def run(self) -> list[nodes.Node]:
        """Return the picture, once for each width of screen, and the table."""
        table = nodes.container()
        self.state.nested_parse(StringList(tabulate(), "lifecycle"), 0, table)
        pictures = "".join(draw(layout=layout) for layout in LAYOUTS)
        return [nodes.raw("", pictures, format="html"), *table.children]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_directive("lifecycle", Lifecycle)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
