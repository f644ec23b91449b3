"""The directive ``module-map``: the parts of the package, and the modules in each.

Its content is a title for each part, from the top down, with the names of modules below it.
What is said of a module is the first line of its docstring.
"""

from __future__ import annotations

from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from import_map import complaints, read_modules, read_parts, tabulate
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import trio_socketserver

FOLDER = Path(trio_socketserver.__file__).parent


class ModuleMap(SphinxDirective):
    """``.. module-map::``."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        modules = read_modules(FOLDER)
        for path in FOLDER.rglob("*.py"):
            self.env.note_dependency(str(path))
        parts = read_parts(self.content)
        if said := complaints(parts, modules):
            raise self.error("; ".join(said))
        table = nodes.container()
        self.state.nested_parse(StringList(tabulate(parts, modules), "map"), 0, table)
        return list(table.children)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_directive("module-map", ModuleMap)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
