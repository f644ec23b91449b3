"""Every public name says what it raises, what cancellation does, and who closes what.

The docstrings are the reference. Here they are held to what can be found out from the code:
which functions may wait, which exceptions they raise by name, what they are given to close.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import trio_socketserver
import trio_socketserver.testing
from trio_socketserver._files import StreamReader, StreamWriter
from trio_socketserver._tls import TLSSocket

PAGE = (Path(__file__).parent.parent / "docs" / "reference.rst").read_text()
PUBLIC = {name: getattr(trio_socketserver, name) for name in trio_socketserver.__all__}
DESCRIBED = {
    **PUBLIC,
    **{
        name: getattr(trio_socketserver.testing, name)
        for name in trio_socketserver.testing.__all__
    },
    "StreamReader": StreamReader,
    "StreamWriter": StreamWriter,
    "TLSSocket": TLSSocket,
}

NO_CHECKPOINT = re.compile(r"\b[Nn]o checkpoint[.:]|\bwithout a checkpoint\b")
CANCELLATION = re.compile(
    r"^Cancellation: |\b[Nn]o checkpoint\b|\bwithout a checkpoint\b"
    r"|and is cancelled, as\s+`",
    re.MULTILINE,
)
RAISES = re.compile(
    r"^Raises:$|\b[Rr]aises(?:, and is cancelled,)?\s+(?:as|what|nothing)\b"
    r"|[Ww]hat it raises\s+goes to `handle_error\(\)`",
    re.MULTILINE,
)
LIKE = re.compile(
    r"\bRaises(?:, and is cancelled,)?\s+(?:as|what)\s+`([\w.]+)`(?: and `([\w.]+)`)?"
)

LEFT_OUT = {"receive_idle"}
"""What is for the package's own modules, and not on the page."""

(MEMBERS_OF_TLS,) = re.findall(
    r"^\.\. autoclass:: TLSSocket\n   :members: (.*)$", PAGE, re.MULTILINE
)

RESOURCES = {"sock", "stream", "request", "server"}
"""Arguments that somebody has to close."""


@dataclass(frozen=True)
class Callee:
    """A public function or method.

    Attributes:
        name: with its class's.
        function: itself.
        owner: the class that defines it.
    """

    name: str
    function: Callable[..., Any]
    owner: type | None

    @property
    def text(self) -> str:
        """Its docstring."""
        return inspect.getdoc(self.function) if self.function.__doc__ else ""  # type: ignore[return-value]

    @property
    def context(self) -> str:
        """Its class's docstring."""
        return (self.owner and self.owner.__doc__ and inspect.getdoc(self.owner)) or ""


def callees() -> Iterator[Callee]:
    """Find every function that is public, and every method of what is described."""
    seen = set()
    for found in DESCRIBED.values():
        if not inspect.isclass(found):
            yield Callee(found.__name__, found, None)
            continue
        for owner in found.__mro__:
            ours = owner.__module__.startswith("trio_socketserver") and owner not in seen
            for name, member in vars(owner).items() if ours else ():
                function = inspect.unwrap(getattr(member, "__func__", member))
                described = owner is not TLSSocket or name in MEMBERS_OF_TLS.split(", ")
                if name.startswith("_") or name in LEFT_OUT or not described:
                    continue
                if inspect.isfunction(function):
                    yield Callee(f"{owner.__name__}.{name}", function, owner)
            seen.add(owner)


CALLEES = {callee.name: callee for callee in callees()}
WAITING = [
    name
    for name, callee in CALLEES.items()
    if inspect.iscoroutinefunction(callee.function)
    or inspect.isasyncgenfunction(callee.function)
]


def speaks_for_all(callee: Callee, pattern: re.Pattern[str]) -> bool:
    """Tell whether the class says it of all methods alike."""
    return "Every method" in callee.context and pattern.search(callee.context) is not None


def test_what_is_public_is_found() -> None:
    assert {
        "run",
        "serve_blocking",
        "StreamSocket.recv",
        "BaseServer.shutdown",
    } <= CALLEES.keys()
    assert {"StreamReader.readline", "TLSSocket.send", "serve_blocking"} <= set(WAITING)
    assert "run" not in WAITING


@pytest.mark.parametrize("name", CALLEES)
def test_it_has_a_docstring_of_its_own(name: str) -> None:
    assert CALLEES[name].text


@pytest.mark.parametrize("name", WAITING)
def test_what_can_wait_says_what_cancellation_does(name: str) -> None:
    callee = CALLEES[name]
    assert CANCELLATION.search(callee.text) or speaks_for_all(callee, CANCELLATION)


@pytest.mark.parametrize("name", WAITING)
def test_what_can_wait_says_what_it_raises(name: str) -> None:
    callee = CALLEES[name]
    if NO_CHECKPOINT.search(callee.text):
        return  # It does not wait.
    assert RAISES.search(callee.text) or speaks_for_all(callee, RAISES)


def raised_by_name(function: Callable[..., Any]) -> set[str]:
    """Return the exceptions that the function's own text raises."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            called = ast.unparse(node.exc.func)
            # What a call on the connection meets, see StreamSocket._failure().
            broken = {"ConnectionBroken", "ClosedResourceError"}
            found |= broken if called == "self._failure" else {called.rpartition(".")[2]}
    return {name for name in found if name[0].isupper()} - {"NotImplementedError"}


def documented(text: str, owner: type | None) -> str:
    """Return a docstring, and those of what it says it is like."""
    like = [name for match in LIKE.finditer(text) for name in match.groups() if name]
    for name in like:
        candidates = [name, *(f"{base.__name__}.{name}" for base in (owner or int).__mro__)]
        callee = next(CALLEES[key] for key in candidates if key in CALLEES)
        if callee.text is not text and callee.text != text:
            text += documented(callee.text, callee.owner)
    return text


@pytest.mark.parametrize("name", CALLEES)
def test_what_is_raised_by_name_is_documented(name: str) -> None:
    callee = CALLEES[name]
    text = documented(callee.text, callee.owner)
    if "Every method" in callee.context:
        text += callee.context
    assert {
        error for error in raised_by_name(callee.function) if error not in text
    } == set()


@pytest.mark.parametrize("name", CALLEES)
def test_what_it_says_it_is_like_exists(name: str) -> None:
    callee = CALLEES[name]
    documented(callee.text, callee.owner)


CLASSES = [name for name, found in DESCRIBED.items() if inspect.isclass(found)]


@pytest.mark.parametrize("name", CLASSES)
def test_what_the_constructor_or_the_block_raises_is_documented(name: str) -> None:
    owner = DESCRIBED[name]
    raised = set()
    for method in ("__init__", "__aenter__"):
        function = vars(owner).get(method)
        # That of a dataclass has no text.
        if inspect.isfunction(function) and function.__code__.co_filename != "<string>":
            raised |= raised_by_name(function)
    assert {
        error for error in raised if error not in (inspect.getdoc(owner) or "")
    } == set()


@pytest.mark.parametrize("name", [*CALLEES, *CLASSES])
def test_who_closes_what_is_handed_over(name: str) -> None:
    if name in CALLEES:
        function, text = CALLEES[name].function, CALLEES[name].text
    else:
        owner = DESCRIBED[name]
        function, text = owner.__init__, inspect.getdoc(owner) or ""
        if "__init__" not in vars(owner):
            return
    if RESOURCES & inspect.signature(function).parameters.keys():
        assert re.search(r"\bclos|\bown", text, re.IGNORECASE)


# -- classes -------------------------------------------------------------------------------

SERVERS = [
    name for name in CLASSES if issubclass(DESCRIBED[name], trio_socketserver.BaseServer)
]


def on_the_page(name: str) -> str:
    """Return what the reference adds below a class's directive."""
    match = re.search(
        rf"^\.\. autoclass:: {name}\n(?P<text>(?:   .*\n|\n)+)", PAGE, re.MULTILINE
    )
    return match["text"] if match else ""


def says(name: str, pattern: str, seen: frozenset[str] = frozenset()) -> bool:
    """Tell whether a class says something, or the ones that its description names."""
    text = (inspect.getdoc(DESCRIBED[name]) or "") + on_the_page(name)
    if re.search(pattern, text):
        return True
    others = {other for other in re.findall(r"`(\w+)`", text) if other in SERVERS} - seen
    bases = {base.__name__ for base in DESCRIBED[name].__bases__} & set(SERVERS)
    return any(
        says(other, pattern, seen | {name}) for other in (others | bases) - {name} - seen
    )


@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize(
    "pattern", [r"\bRaises:|\braises?\b", r"\bCancellation: ", r"\bclose[sd]?\b"]
)
def test_servers_say_it_themselves_or_by_their_bases(name: str, pattern: str) -> None:
    assert says(name, pattern)


# -- this test itself ----------------------------------------------------------------------


def test_a_docstring_that_says_too_little_is_found() -> None:
    async def silent() -> None:
        """Wait for something."""
        raise ValueError("x")

    assert not CANCELLATION.search(silent.__doc__ or "")
    assert not RAISES.search(silent.__doc__ or "")
    assert raised_by_name(silent) == {"ValueError"}
    said = "Wait.\n\nRaises, and is cancelled, as `receive_some`."
    assert CANCELLATION.search(said)
    assert RAISES.search(said)
    assert "ConnectionBroken" in documented(said, trio_socketserver.StreamSocket)
