"""Classes made at run time in the place of a user's.

An object of such a class passes for one of the user's: the name is the same, and
`isinstance` holds.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any


class _Unheard:
    """A first base, so that no ``__init_subclass__`` of the user's hears of the class."""

    def __init_subclass__(cls) -> None:
        """Do nothing, and tell no other base."""


def generated_class(
    theirs: type, namespace: Mapping[str, object], behind: tuple[type, ...] = ()
) -> Any:
    """Make a class derived from *theirs*.

    Args:
        theirs: the user's class.
        namespace: what the new class has instead.
        behind: further bases, which come after *theirs* in the method resolution order,
            and before their own bases, which *theirs* derives from too. (Those that derive
            from *theirs* itself have to come before it.)
    """
    before = [base for base in behind if issubclass(base, theirs)]
    behind = tuple(base for base in behind if base not in before)
    unheard = () if issubclass(theirs, _Unheard) else (_Unheard,)
    names = {"__module__": theirs.__module__, "__qualname__": theirs.__qualname__}
    return types.new_class(
        theirs.__name__,
        (*unheard, *before, theirs, *behind),
        exec_body=lambda body: body.update(names | dict(namespace)),
    )
