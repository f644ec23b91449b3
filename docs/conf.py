"""How the documentation is built: ``python -m sphinx -W -n docs docs/_build/html``.

Needs no network: links to Python's and trio's documentation are computed, see
`_extensions/outside_names.py`, and the diagram is drawn from the package's own table, see
`_extensions/lifecycle.py`. Pages are for a desk and a phone: the tables need
`_extensions/narrow_tables.py` for that, and `_static/style.css`.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_extensions")]

_metadata = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]

project = "trio_socketserver"
author = project_copyright = "the authors of trio_socketserver"
release = version = _metadata["version"]

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinxcontrib_trio",
    "outside_names",
    "lifecycle",
    "module_map",
    "completeness",
    "narrow_tables",
    "changelog_page",
]
# sphinxcontrib-trio, which shows coroutine methods as they are called, extends autodoc's
# documenter classes. Sphinx 9 has others, and keeps these behind a switch.
autodoc_use_legacy_class_based = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
add_module_names = False
default_role = "py:obj"
nitpicky = True
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"trio_socketserver {release}"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["style.css"]
# Furo's own choice underlines the names of classes, as if they were links.
pygments_dark_style = "github-dark"
