"""The server, as a blocking handler sees it.

A view is an instance of a generated subclass of the server's class. It shares the server's
attributes, so it reads and writes through, and `isinstance` holds; its coroutine methods
are plain calls that wait until trio has run them. In trio's own thread, where nothing may
wait, they are the coroutine methods they were, so a view can be passed there.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Mapping
from typing import Any

from ._colour import is_asynchronous
from ._generated import generated_class
from ._workers import CallTrio


class _BlockingMethod:
    """A coroutine method of the server's, as a blocking one of its view's."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, view: Any, owner: type) -> Any:
        if view is None:
            return getattr(super(owner, owner), self._name)
        method = getattr(view._trio_socketserver_viewed, self._name)

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            function = functools.partial(method, *args, **kwargs)
            if self._name == "handle_error" and (error := sys.exception()) is not None:
                function = functools.partial(_while_handling, error, function)
            return view._trio_socketserver_call(function)

        return call

    def __set__(self, view: Any, value: object) -> None:
        setattr(view._trio_socketserver_viewed, self._name, value)

    def __delete__(self, view: Any) -> None:
        delattr(view._trio_socketserver_viewed, self._name)


async def _while_handling(error: BaseException, function: Any) -> Any:
    """Await *function* with *error* as its `sys.exception()`, as its caller has it."""
    try:
        raise error
    except type(error):
        return await function()


def _is_method(attribute: object) -> bool:
    kinds = (types.FunctionType, staticmethod, classmethod, functools.partialmethod)
    return isinstance(attribute, kinds) and is_asynchronous(attribute)


def _slot(name: str) -> property:
    """What a class keeps in a slot is not in the attributes that are shared."""
    return property(
        lambda view: getattr(view._trio_socketserver_viewed, name),
        lambda view, value: setattr(view._trio_socketserver_viewed, name, value),
        lambda view: delattr(view._trio_socketserver_viewed, name),
    )


def stand_in(server: Any, namespace: Mapping[str, object], **slots: object) -> Any:
    """Return an object that passes for *server* and shares its attributes.

    Args:
        server: the server.
        namespace: what its class has instead of the server's class's.
        **slots: attributes of its own.
    """
    theirs = type(server)
    slots = {"_trio_socketserver_viewed": server, **slots}
    names: dict[str, object] = {
        name: _slot(name)
        for name in set(dir(theirs)).difference(slots)
        if isinstance(inspect.getattr_static(theirs, name), types.MemberDescriptorType)
    }
    names["__slots__"] = tuple(slots)
    names["__class__"] = property(lambda view: view._trio_socketserver_viewed.__class__)
    # Not by names that the user's class may have a meaning for, nor by its __setattr__.
    view = object.__new__(generated_class(theirs, names | dict(namespace)))
    for name, value in slots.items():
        object.__setattr__(view, name, value)
    object.__setattr__(view, "__dict__", server.__dict__)
    return view


def view_of(server: Any, call: CallTrio) -> Any:
    """Return a view of *server*.

    Args:
        server: the server.
        call: has its coroutine methods awaited.
    """
    theirs = type(server)
    methods = {
        name: _BlockingMethod(name)
        for name in dir(theirs)
        if not name.startswith("__") and _is_method(inspect.getattr_static(theirs, name))
    }
    return stand_in(server, methods, _trio_socketserver_call=call)
