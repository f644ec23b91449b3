"""A callable is judged by what it wraps; hooks of the wrong colour are refused at once."""

from __future__ import annotations

import functools
import inspect
import itertools
import socketserver
import types
from collections.abc import Callable
from typing import Any

import pytest

from trio_socketserver import (
    BaseRequestHandler,
    BaseServer,
    DatagramRequestHandler,
    NurseryTCPServer,
    StreamRequestHandler,
    TCPServer,
    UDPServer,
)
from trio_socketserver._colour import check_colours, innermost, is_asynchronous, layers

# -- the colour of a callable -----------------------------------------------------------


def blocking(*arguments: Any) -> None:
    """Do nothing."""


async def asynchronous(*arguments: Any) -> None:
    """Do nothing."""


async def generating(*arguments: Any) -> Any:
    """Give what cannot be awaited."""
    yield


class Methods:
    """Every kind of method, in both colours."""

    def blocking(self, *arguments: Any) -> None:
        """Do nothing."""

    async def asynchronous(self, *arguments: Any) -> None:
        """Do nothing."""

    @staticmethod
    def blocking_static(*arguments: Any) -> None:
        """Do nothing."""

    @staticmethod
    async def asynchronous_static(*arguments: Any) -> None:
        """Do nothing."""

    @classmethod
    def blocking_class(cls, *arguments: Any) -> None:
        """Do nothing."""

    @classmethod
    async def asynchronous_class(cls, *arguments: Any) -> None:
        """Do nothing."""

    blocking_partial = functools.partialmethod(blocking, 1)
    asynchronous_partial = functools.partialmethod(asynchronous, 1)


class BlockingCallable:
    def __call__(self, *arguments: Any) -> None:
        """Do nothing."""


class AsynchronousCallable:
    async def __call__(self, *arguments: Any) -> None:
        """Do nothing."""


class StaticCallable:
    @staticmethod
    async def __call__(*arguments: Any) -> None:
        """Do nothing."""


def passing_on(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of any colour in a plain one, as decorators do."""

    @functools.wraps(function)
    def wrapper(*arguments: Any) -> Any:
        return function(*arguments)

    return wrapper


def made_asynchronous(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function in a coroutine function."""

    @functools.wraps(function, updated=())
    async def wrapper(*arguments: Any) -> Any:
        return function(*arguments)

    return wrapper


class Decorator:
    """A decorator that is a class, and keeps the colour."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


class AsynchronousDecorator(Decorator):
    """One that makes any function asynchronous."""

    async def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


METHOD_NAMES = ("", "_static", "_class", "_partial")

CALLABLES: dict[str, tuple[Any, bool]] = {
    "function": (asynchronous, True),
    "blocking function": (blocking, False),
    "lambda": (lambda: asynchronous(), False),
    "builtin": (print, False),
    "callable object": (AsynchronousCallable(), True),
    "blocking callable object": (BlockingCallable(), False),
    "callable object with a static method": (StaticCallable(), True),
    "partial of a callable object": (functools.partial(AsynchronousCallable()), True),
    "partial of a partial": (functools.partial(functools.partial(asynchronous)), True),
    "blocking partial": (functools.partial(blocking), False),
    "wraps": (passing_on(asynchronous), True),
    "wraps twice": (passing_on(passing_on(asynchronous)), True),
    "blocking wraps": (passing_on(blocking), False),
    "wraps a bound method": (passing_on(Methods().asynchronous), True),
    "wraps a callable object": (passing_on(AsynchronousCallable()), True),
    "partial of wraps": (functools.partial(passing_on(asynchronous), 1), True),
    "coroutine function around a blocking one": (made_asynchronous(blocking), True),
    "class around an asynchronous function": (Decorator(asynchronous), True),
    "class around a blocking function": (Decorator(blocking), False),
    "class that makes a function asynchronous": (AsynchronousDecorator(blocking), True),
    "lru_cache": (functools.lru_cache(asynchronous), True),
    "class": (Methods, False),
    "class of callable objects": (AsynchronousCallable, False),
    "async generator function": (generating, False),
    "not callable": (42, False),
    "none": (None, False),
    **{
        f"{color}{kind} method of {of}": (getattr(where, color + kind), color != "blocking")
        for color, kind, (of, where) in itertools.product(
            ("blocking", "asynchronous"),
            METHOD_NAMES,
            {"an object": Methods()}.items(),
        )
    },
    **{
        f"{color}{kind} in the class": (vars(Methods)[color + kind], color != "blocking")
        for color, kind in itertools.product(("blocking", "asynchronous"), METHOD_NAMES)
    },
}


@pytest.mark.parametrize(("candidate", "expected"), CALLABLES.values(), ids=CALLABLES)
def test_a_callable_is_judged_by_what_it_wraps(candidate: Any, expected: bool) -> None:
    assert is_asynchronous(candidate) is expected


def test_what_the_standard_library_marks_is_asynchronous() -> None:
    mark = getattr(inspect, "markcoroutinefunction", None)
    if mark is None:
        pytest.skip("inspect.markcoroutinefunction is new in Python 3.12")
    assert is_asynchronous(mark(lambda: asynchronous()))


def test_layers_are_peeled_from_the_outside() -> None:
    bound = Methods().blocking
    wrapped = passing_on(bound)
    partial = functools.partial(wrapped, 1)
    assert list(layers(partial)) == [partial, wrapped, bound, Methods.blocking]
    assert innermost(partial) is Methods.blocking
    assert innermost(functools.partial(Methods)) is Methods
    assert innermost(blocking) is blocking
    assert innermost(42) == 42


def test_a_circle_of_wrappers_ends() -> None:
    first, second = passing_on(blocking), passing_on(blocking)
    first.__dict__["__wrapped__"] = second
    second.__dict__["__wrapped__"] = first
    assert list(layers(first)) == [first, second]
    assert not is_asynchronous(first)


# -- the colour of a handler's phases ---------------------------------------------------

PHASES = ("setup", "handle", "finish")
HANDLERS = (BaseRequestHandler, StreamRequestHandler, DatagramRequestHandler)


@pytest.mark.parametrize("base", HANDLERS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_forgotten_async_is_refused_with_the_handler(base: type, phase: str) -> None:
    def method(self: Any) -> None:
        """Do nothing."""

    with pytest.raises(TypeError) as caught:
        type("Mine", (base,), {phase: method})
    assert f"Mine.{phase} " in str(caught.value)
    assert f"'async def {phase}" in str(caught.value)
    assert "inherits" not in str(caught.value)


@pytest.mark.parametrize("base", HANDLERS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_forgotten_async_in_a_mix_in_is_refused_too(base: type, phase: str) -> None:
    mix_in = type("MixIn", (), {phase: lambda self: None})
    between = type("Between", (mix_in,), {})
    with pytest.raises(TypeError, match=rf"Mine\.{phase}, which it inherits from MixIn,"):
        type("Mine", (between, base), {})
    # Behind our class it is not what is called.
    type("Mine", (base, mix_in), {})


@pytest.mark.parametrize("wrap", [passing_on, staticmethod, classmethod, Decorator])
def test_wrappers_are_seen_through(wrap: Callable[[Any], Any]) -> None:
    type("Good", (BaseRequestHandler,), {"handle": wrap(asynchronous)})
    with pytest.raises(TypeError, match="async def handle"):
        type("Bad", (BaseRequestHandler,), {"handle": wrap(blocking)})


def test_partial_methods_and_partials_are_seen_through() -> None:
    for partial in (functools.partial, functools.partialmethod):
        type("Good", (BaseRequestHandler,), {"handle": partial(asynchronous, 1)})
        with pytest.raises(TypeError, match="async def handle"):
            type("Bad", (BaseRequestHandler,), {"handle": partial(blocking, 1)})


@pytest.mark.parametrize("value", [None, 42, property(blocking), AsynchronousCallable])
def test_what_is_no_coroutine_function_at_all_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"Mine\.handle"):
        type("Mine", (BaseRequestHandler,), {"handle": value})


def test_a_generator_is_told_apart_from_a_forgotten_async() -> None:
    with pytest.raises(TypeError, match="generator") as caught:

        class Mine(BaseRequestHandler):
            async def handle(self) -> Any:  # type: ignore[override]
                yield b""

    assert "write 'async def" not in str(caught.value)


def test_a_handler_of_the_standard_library_cannot_be_mixed_in() -> None:
    class Old(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            """Do nothing."""

    with pytest.raises(TypeError, match=r"Mixed\.\w+, which it inherits from"):
        type("Mixed", (Old, StreamRequestHandler), {})


@pytest.mark.parametrize("base", [BaseRequestHandler, BaseServer])
def test_other_classes_may_have_their_say_about_a_subclass(base: type) -> None:
    seen = []

    class Registered:
        def __init_subclass__(cls, *, name: str) -> None:
            super().__init_subclass__()
            seen.append(name)

    type("Mine", (base, Registered), {}, name="mine")
    assert seen == ["mine"]


# -- the colour of a server's hooks -----------------------------------------------------

PLAIN = ("fileno", "server_bind", "server_activate")
COROUTINES = (
    "serve_forever",
    "handle_request",
    "shutdown",
    "server_close",
    "get_request",
    "verify_request",
    "process_request",
    "finish_request",
    "shutdown_request",
    "close_request",
    "handle_error",
    "handle_timeout",
    "service_actions",
    "collect_children",
)
SERVERS = (BaseServer, TCPServer, UDPServer, NurseryTCPServer)


@pytest.mark.parametrize("base", SERVERS)
@pytest.mark.parametrize("hook", COROUTINES)
def test_a_hook_that_may_wait_must_be_a_coroutine_function(base: type, hook: str) -> None:
    type("Good", (base,), {hook: asynchronous})
    with pytest.raises(TypeError, match=rf"Mine\.{hook} .*'async def {hook}\("):
        type("Mine", (base,), {hook: blocking})
    with pytest.raises(TypeError, match=rf"Mine\.{hook}, which it inherits from MixIn,"):
        type("Mine", (type("MixIn", (), {hook: blocking}), base), {})


@pytest.mark.parametrize("base", SERVERS)
@pytest.mark.parametrize("hook", PLAIN)
def test_a_hook_that_cannot_wait_must_be_plain(base: type, hook: str) -> None:
    type("Good", (base,), {hook: blocking})
    with pytest.raises(TypeError, match=rf"Mine\.{hook} .*'def {hook}\("):
        type("Mine", (base,), {hook: asynchronous})
    with pytest.raises(TypeError, match=rf"Mine\.{hook} "):
        type("Mine", (base,), {hook: passing_on(asynchronous)})


def test_every_hook_of_the_standard_library_has_a_colour() -> None:
    theirs = {
        name
        for server in (socketserver.TCPServer, socketserver.ForkingMixIn)
        for base in server.__mro__[:-1]
        for name, value in vars(base).items()
        if isinstance(value, types.FunctionType) and not name.startswith("_")
    }
    assert theirs <= {*PLAIN, *COROUTINES}


def test_check_colours_passes_over_what_a_class_has_not() -> None:
    check_colours(Methods, ["asynchronous", "missing"], ["blocking", "missing"])
    with pytest.raises(TypeError):
        check_colours(Methods, ["blocking"], [])
