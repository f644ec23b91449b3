"""Another Python process like this one: what it is called with, and what it imports first.

It is started by executing Python, never by forking, so it has nothing of this one's that
it was not given: no threads, no locks, no copy of a running trio. What makes it like this
one is the same executable with the same options, the same ``sys.path`` and ``sys.argv``,
and, where something of it is needed, the main module.

That one has to be run once more there, because what a script defines is pickled under the
name ``__main__``. As in `multiprocessing` it runs as ``__mp_main__``, so what is guarded by
``if __name__ == "__main__":`` does not run again. We do not take `multiprocessing` itself:
it would leave its resource tracker behind, a process and a descriptor.
"""

from __future__ import annotations

import dataclasses
import os
import runpy
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

MAIN_AGAIN: Final = "__mp_main__"

_START: Final = (
    "import signal, sys; "
    "[signal.signal(int(n), signal.SIG_IGN) for n in sys.argv.pop(1).split(',')]; "
    "from importlib import import_module; "
    "cut = sys.argv.index('--'); sys.path[:] = sys.argv[cut + 1 :]; del sys.argv[cut:]; "
    "import_module(sys.argv.pop(1)).main()"
)


def command(module: str, *arguments: str) -> list[str]:
    """Return the command that calls ``main()`` of *module* in a fresh interpreter.

    Args:
        module: the full name of an importable module.
        arguments: what it finds in ``sys.argv[1:]``; none of them is ``--``.
    """
    # What multiprocessing and CPython's own tests use; there is no public name for it.
    options: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    # Of these it knows only some; those it gives twice do no harm.
    for name, value in sys._xoptions.items():
        options.append(f"-X{name}" if value is True else f"-X{name}={value}")
    ignored = ",".join(str(int(number)) for number in _ignored_signals())
    call = [ignored, module, *arguments]
    return [sys.executable, *options, "-c", _START, *call, "--", *sys.path]


def _ignored_signals() -> Iterator[signal.Signals]:
    """Yield the signals that are for the program to hear, but are sent to its group."""
    yield signal.SIGINT  # Ctrl-C goes to the whole foreground.
    if callable(signal.getsignal(signal.SIGUSR1)):
        # The program hears it, as the command does for its statistics. A worker would end.
        yield signal.SIGUSR1


def is_of_main(pickled: bytes) -> bool:
    """Tell whether pickled data refers to the main module, by either of its names."""
    return b"__main__" in pickled or MAIN_AGAIN.encode() in pickled


@dataclasses.dataclass(frozen=True, slots=True)
class MainModule:
    """Where the main module came from: a module's name, or a path."""

    name: str | None
    path: str | None

    @classmethod
    def of_this_process(cls) -> MainModule | None:
        """Return the one that is running; None if it is not to be found again.

        That is so in an interactive session, with ``-c``, and for a script from stdin.
        """
        main: Any = sys.modules["__main__"]
        spec = getattr(main, "__spec__", None)
        path = getattr(main, "__file__", None)
        if spec is not None and spec.name != "__main__":
            return cls(spec.name, None)
        if spec is not None and path is not None:
            # What was run is the directory, or the archive, that it is in.
            path = os.path.dirname(path)
        if path is None or not os.path.exists(path):
            return None
        return cls(None, os.path.abspath(path))

    def run_again(self) -> None:
        """Run it, in another process, so that what was pickled by its name is found."""
        again: Any = types.ModuleType(MAIN_AGAIN)
        with _running_main():
            try:
                if self.name is not None:
                    found = runpy.run_module(self.name, run_name=MAIN_AGAIN, alter_sys=True)
                else:
                    assert self.path is not None
                    found = runpy.run_path(self.path, run_name=MAIN_AGAIN)
            except BaseException as error:
                error.add_note(
                    "The program's main module was run again here, in a process of its "
                    "own. What only the program itself is to do belongs under "
                    "\"if __name__ == '__main__':\"."
                )
                raise
        vars(again).update(found)
        sys.modules["__main__"] = sys.modules[MAIN_AGAIN] = again


_runs_main = False


@contextmanager
def _running_main() -> Iterator[None]:
    global _runs_main
    _runs_main = True
    try:
        yield
    finally:
        _runs_main = False


def is_running_main_again() -> bool:
    """Tell whether the caller is, at the moment, the main module in another process."""
    return _runs_main
