"""Colour: is a callable asynchronous or blocking?

The rules, for hooks and handlers alike:

* a callable is judged by what it wraps: partials, bound methods, static and class methods,
  callable objects and anything with ``__wrapped__`` are peeled layer by layer, and one
  coroutine function among the layers makes the whole asynchronous;
* a wrong colour is an error when the class is created, not when a request arrives: a
  forgotten ``async`` on ``verify_request`` would otherwise be found by an attacker.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterable, Iterator
from typing import Any

_ABSENT = object()


def layers(candidate: Any) -> Iterator[Any]:
    """Yield *candidate*, what it wraps, what that wraps, and so on."""
    seen: set[int] = set()
    while id(candidate) not in seen:
        seen.add(id(candidate))
        yield candidate
        wrapped = inspect.getattr_static(candidate, "__wrapped__", _ABSENT)
        if isinstance(candidate, (functools.partial, functools.partialmethod)):
            candidate = candidate.func
        elif isinstance(candidate, (staticmethod, classmethod, types.MethodType)):
            candidate = candidate.__func__
        elif inspect.isclass(candidate):
            return
        elif wrapped is not _ABSENT:
            candidate = wrapped
        elif not inspect.isroutine(candidate) and callable(candidate):
            candidate = type(candidate).__call__


def is_asynchronous(candidate: Any) -> bool:
    """Tell whether calling *candidate* gives something to await."""
    return any(
        inspect.iscoroutinefunction(layer)
        or (
            not inspect.isclass(layer)
            and inspect.iscoroutinefunction(
                inspect.getattr_static(type(layer), "__call__", None)
            )
        )
        for layer in layers(candidate)
    )


def innermost(candidate: Any) -> Any:
    """Return what is left of *candidate* when every wrapper is taken off."""
    *_, last = layers(candidate)
    return last


def check_colours(cls: type, coroutines: Iterable[str], plain: Iterable[str]) -> None:
    """Refuse a class in which a hook has the wrong colour.

    Args:
        cls: the class that is being created; each hook is looked up along its whole MRO,
            so a plain mix-in counts.
        coroutines: names that must be ``async def``.
        plain: names that must be plain methods.

    Raises:
        TypeError: naming the class that defines the hook, the hook and the fix.
    """
    for names, wants_async in ((coroutines, True), (plain, False)):
        for name in names:
            hook = inspect.getattr_static(cls, name, _ABSENT)
            if hook is _ABSENT or is_asynchronous(hook) is wants_async:
                continue
            owner = next(base for base in cls.__mro__ if name in base.__dict__)
            via = "" if owner is cls else f", which it inherits from {owner.__qualname__},"
            if not wants_async:
                fix = f"plain method here: write 'def {name}(…)' without 'async'"
            elif inspect.isasyncgenfunction(hook):
                fix = (
                    "coroutine function here, not an async generator: do not 'yield' in it"
                )
            else:
                fix = f"coroutine function here: write 'async def {name}(…)'"
            raise TypeError(f"{cls.__qualname__}.{name}{via} must be a {fix}")
