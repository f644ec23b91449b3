"""A fresh interpreter: how it is called, and the main module that is run again in it."""

from __future__ import annotations

import contextlib
import runpy
import signal
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trio_socketserver._fresh_interpreter import (
    MAIN_AGAIN,
    MainModule,
    command,
    is_running_main_again,
)

# -- the command ---------------------------------------------------------------------------

CALLED = """
import sys

def main():
    flags = tuple(sys.flags), sys.warnoptions, sys._xoptions
    print(ascii((sys.argv, sys.path, flags)))
"""

CALLER = """
import subprocess, sys
from trio_socketserver._fresh_interpreter import command

sys.path.insert(0, "")
sys.path.append("/nowhere/--")
sys.path.append("--")
print(ascii((sys.path, (tuple(sys.flags), sys.warnoptions, sys._xoptions))), flush=True)
subprocess.run(command("called", "1", "-x", "ä"), check=True)
"""


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["-OO", "-b", "-s", "-W", "error::UserWarning", "-W", "ignore:x"],
        ["-X", "dev", "-X", "utf8=1", "-d", "-P"],
        ["-X", "utf8=0", "-X", "int_max_str_digits=5000"],
    ],
    ids=" ".join,
)
def test_it_is_like_this_one(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "called.py").write_text(CALLED)
    (tmp_path / "caller.py").write_text(CALLER)
    package = str(Path(sys.modules["trio_socketserver"].__file__ or "").parents[1])
    environment = {"PYTHONPATH": f"{tmp_path}:{package}", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        [sys.executable, *options, str(tmp_path / "caller.py")],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    caller, called = map(eval, done.stdout.splitlines())
    path, flags = caller
    assert called == (["-c", "1", "-x", "ä"], path, flags)


def test_the_command_is_this_python() -> None:
    made = command("some.module", "1")
    assert made[0] == sys.executable
    ignored, *rest = made[made.index("-c") + 2 :]
    assert ignored == str(int(signal.SIGINT))
    assert rest == ["some.module", "1", "--", *sys.path]


def test_options_are_given_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "_xoptions", {"dev": True, "int_max_str_digits": "5000"})
    made = command("some.module")
    assert "-Xdev" in made
    assert "-Xint_max_str_digits=5000" in made


TELLS_SIGNALS = """
import signal

def main():
    handlers = map(signal.getsignal, (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2))
    print(*map(int, handlers))
"""


@pytest.mark.parametrize("heard", [False, True])
def test_signals_that_are_for_the_program(
    heard: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tells_signals.py").write_text(TELLS_SIGNALS)
    monkeypatch.syspath_prepend(tmp_path)
    handler: Any = (lambda number, frame: None) if heard else signal.SIG_DFL
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        told = subprocess.check_output(command("tells_signals"), text=True)
    finally:
        signal.signal(signal.SIGUSR1, before)
    default, ignored = int(signal.SIG_DFL), int(signal.SIG_IGN)
    assert told == f"{ignored} {ignored if heard else default} {default}\n"


# -- the main module -----------------------------------------------------------------------

MAIN = """
import os, sys

class Thing:
    def module(self):
        return sys.modules["__main__"].__name__, __name__, value

value = [__name__, sys.argv[0]]
if __name__ == "__main__":
    value.append("guarded")
"""


@contextlib.contextmanager
def main_module(module: Any) -> Iterator[None]:
    """Have another main module for a block."""
    kept = {name: sys.modules.get(name) for name in ("__main__", MAIN_AGAIN)}
    sys.modules["__main__"] = module
    try:
        yield
    finally:
        for name, before in kept.items():
            if before is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = before


def make_script(folder: Path) -> Path:
    (folder / "script.py").write_text(MAIN)
    return folder / "script.py"


def make_directory(folder: Path) -> Path:
    (folder / "program").mkdir()
    (folder / "program" / "__main__.py").write_text(MAIN)
    return folder / "program"


def make_archive(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "program.pyz", "w") as archive:
        archive.writestr("__main__.py", MAIN)
    return folder / "program.pyz"


def run_as_main(path: Path) -> types.ModuleType:
    """Run what is at *path* as Python's command line does; return the main module."""
    found: list[types.ModuleType] = []
    program = types.ModuleType("__main__")
    with main_module(program):
        vars(program).update(runpy.run_path(str(path), run_name="__main__"))
        found.append(program)
    return found[0]


@pytest.mark.parametrize("make", [make_script, make_directory, make_archive])
def test_a_path_is_run_again(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path)
    program = run_as_main(path)
    if make is make_script:  # Where runpy and the command line differ.
        program.__spec__ = None
    monkeypatch.chdir(tmp_path)
    with main_module(program):
        found = MainModule.of_this_process()
        assert found == MainModule(None, str(path))
        found.run_again()
        again = sys.modules["__main__"]
        assert again is sys.modules[MAIN_AGAIN]
        assert again is not program
        main, own, value = again.Thing().module()
        assert main == own == again.__name__ == MAIN_AGAIN
        assert value == [MAIN_AGAIN, str(path)]
        assert again.Thing.__module__ == MAIN_AGAIN


def test_a_relative_path_is_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_script(tmp_path)
    monkeypatch.chdir(tmp_path)
    program = types.ModuleType("__main__")
    program.__file__ = "script.py"
    with main_module(program):
        assert MainModule.of_this_process() == MainModule(None, str(tmp_path / "script.py"))


@pytest.mark.parametrize("name", ["program.part", "program.__main__"])
def test_a_module_is_run_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_directory(tmp_path)
    (folder / "__init__.py").write_text("")
    (folder / "part.py").write_text(MAIN)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        program = types.ModuleType("__main__")
        with main_module(program):
            vars(program).update(
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            )
            found = MainModule.of_this_process()
            assert found == MainModule(name, None)
            found.run_again()
            assert sys.modules["__main__"].value[0] == MAIN_AGAIN
            assert sys.modules["__main__"].__package__ == "program"
    finally:
        for module in [name for name in sys.modules if name.startswith("program")]:
            del sys.modules[module]


@pytest.mark.parametrize("file", [None, "<stdin>", "/nowhere/script.py"])
def test_none_that_could_be_run_again(file: str | None) -> None:
    program = types.ModuleType("__main__")
    if file is not None:
        program.__file__ = file
    with main_module(program):
        assert MainModule.of_this_process() is None


def test_one_that_fails_says_why_it_ran(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('done')")
    before = sys.modules["__main__"]
    with pytest.raises(SystemExit, match="done") as caught:
        MainModule(None, str(script)).run_again()
    [note] = caught.value.__notes__
    assert "if __name__ == '__main__'" in note
    assert sys.modules["__main__"] is before
    assert not is_running_main_again()


def test_while_it_runs_it_is_known_to(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from trio_socketserver._fresh_interpreter import is_running_main_again\n"
        "seen = is_running_main_again()\n"
    )
    with main_module(types.ModuleType("__main__")):
        assert not is_running_main_again()
        MainModule(None, str(script)).run_again()
        assert sys.modules["__main__"].seen
    assert not is_running_main_again()
