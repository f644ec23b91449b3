"""Links that Sphinx cannot find alone: to inherited methods, to Python, to trio.

intersphinx would fetch inventories from the network. Both manuals have pages whose
addresses follow from the name, and whether the name exists can be asked of the installed
module. So a misspelled name is still a warning.
"""

from __future__ import annotations

import builtins
import importlib
import inspect
import sys

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

PYTHON = "https://docs.python.org/3/library"
TRIO = "https://trio.readthedocs.io/en/stable"

TRIO_PAGES = {
    "trio.abc": "reference-io",
    "trio.lowlevel": "reference-lowlevel",
    "trio.testing": "reference-testing",
    "trio.open_signal_receiver": "reference-io",
    "trio.open_tcp_stream": "reference-io",
    "trio.run_process": "reference-io",
    "trio.serve_tcp": "reference-io",
    "trio.SocketStream": "reference-io",
    "trio.SSLStream": "reference-io",
}
"""The page of a name, or of all names that begin with it; the rest is in the core."""

OWN_PAGE = {bytes, bytearray, memoryview, str, tuple, dict, set, list}
"""The built-in types that are described on the page of types, not that of functions."""


def module_of(name: str) -> str | None:
    """Return the module part of *name*, if module and name exist."""
    parts = name.split(".")
    module, found = "", None
    for end, part in enumerate(parts, 1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
            module = ".".join(parts[:end])
        except ImportError:
            found = getattr(found, part, None)
            if found is None:
                return None
    return module


def builtin_page(name: str) -> str | None:
    """Return the page of Python's manual that describes a built-in name."""
    found = getattr(builtins, name, None)
    if name == "None":
        return "constants"
    if inspect.isclass(found) and issubclass(found, BaseException):
        return "exceptions"
    if found in OWN_PAGE:
        return "stdtypes"
    return "functions" if found is not None else None


def address(name: str) -> str | None:
    """Return where *name* is documented outside, or None if it is not known."""
    name = name.removesuffix("()")
    if page := builtin_page(name):
        return f"{PYTHON}/{page}.html#{name}"
    if name.partition(".")[0] not in {*sys.stdlib_module_names, "trio"}:
        return None
    module = module_of(name)
    if module is None:
        return None
    if module.partition(".")[0] == "trio":
        page = next((TRIO_PAGES[p] for p in TRIO_PAGES if name.startswith(p)), None)
        where = f"{page or 'reference-core'}.html#{name}"
        return f"{TRIO}/{where if name != 'trio' else ''}"
    return f"{PYTHON}/{module}.html" + (f"#{name}" if name != module else "")


def inside(env: BuildEnvironment, node: pending_xref) -> str | None:
    """Return the full name of the documented object that a short name stands for.

    A method is looked for along the MRO of the class that is being described. Outside of a
    class the name must have one meaning only, or be that of a server's method.
    """
    target = node["reftarget"].removesuffix("()").lstrip(".")
    objects = env.domains["py"].objects  # type: ignore[attr-defined]
    known = [name for name, entry in objects.items() if not entry.aliased]
    package = importlib.import_module("trio_socketserver")
    first, *rest = (part for part in (node.get("py:class"), *target.split(".")) if part)
    owner = getattr(package, first, None)
    for base in inspect.getmro(owner) if inspect.isclass(owner) and rest else ():
        found = f"trio_socketserver.{base.__name__}.{rest[-1]}"
        if found in known:
            return found
    meanings = [name for name in known if name.endswith(f".{target}")]
    if len(meanings) > 1:
        meanings = [name for name in meanings if ".BaseServer." in name]
    return meanings[0] if len(meanings) == 1 else None


def show_public_bases(
    app: Sphinx, name: str, described: type, options: object, bases: list[type]
) -> None:
    """Leave the package's private classes out of "Bases:" (``autodoc-process-bases``)."""
    public = vars(importlib.import_module("trio_socketserver")).values()
    bases[:] = [
        base
        for base in bases
        if base in public or not base.__module__.startswith("trio_socketserver")
    ] or [object]


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.Node | None:
    """Make the reference that Sphinx has not found (``missing-reference``)."""
    if node.get("refdomain") != "py":
        return None
    if node["reftarget"].startswith("trio_socketserver._"):
        # The type of an argument that is not the user's to make: shown without a link.
        return content if module_of(node["reftarget"]) else None
    uri = address(node["reftarget"])
    if not (uri and "." in node["reftarget"]) and (name := inside(env, node)):
        return env.domains["py"].resolve_xref(  # type: ignore[no-any-return]
            env, node["refdoc"], app.builder, "obj", name, node, content
        )
    if uri is None:
        return None
    return nodes.reference("", "", content, internal=False, refuri=uri)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-bases", show_public_bases)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
