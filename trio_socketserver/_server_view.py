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
        method = getattr(view._viewed, self._name)

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            function = functools.partial(method, *args, **kwargs)
            if self._name == "handle_error" and (error := sys.exception()) is not None:
                function = functools.partial(_while_handling, error, function)
            return view._call(function)

        return call

    def __set__(self, view: Any, value: object) -> None:
        setattr(view._viewed, self._name, value)

    def __delete__(self, view: Any) -> None:
        delattr(view._viewed, self._name)


async def _while_handling(error: BaseException, function: Any) -> Any:
    """Await *function* with *error* as its `sys.exception()`, as its caller has it."""
    try:
        raise error
    except type(error):
        return await function()


def _is_method(attribute: object) -> bool:
    kinds = (types.FunctionType, staticmethod, classmethod, functools.partialmethod)
    return isinstance(attribute, kinds) and is_asynchronous(attribute)


def _view_class(server_class: type) -> Any:
    namespace: dict[str, Any] = {
        "__slots__": ("_call", "_viewed"),
        "__class__": property(lambda view: view._viewed.__class__),
    }
    for name in dir(server_class):
        attribute = inspect.getattr_static(server_class, name)
        if isinstance(attribute, types.MemberDescriptorType):
            namespace[name] = _slot(name)
        elif not name.startswith("__") and _is_method(attribute):
            namespace[name] = _BlockingMethod(name)
    return generated_class(server_class, namespace)


def _slot(name: str) -> property:
    """What a class keeps in a slot is not in the attributes that are shared."""
    return property(
        lambda view: getattr(view._viewed, name),
        lambda view, value: setattr(view._viewed, name, value),
        lambda view: delattr(view._viewed, name),
    )


def view_of(server: Any, call: CallTrio) -> Any:
    """Return a view of *server*.

    Args:
        server: the server.
        call: has its coroutine methods awaited.
    """
    view = object.__new__(_view_class(type(server)))
    view._viewed = server
    view._call = call
    view.__dict__ = server.__dict__
    return view
