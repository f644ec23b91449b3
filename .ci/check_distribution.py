"""Build the sdist and the wheel, twice; and hold them to what they promise.

Usage: check_distribution.py TREE OUTPUT

TREE is a copy of the source tree. It is copied once more, into a folder of another name,
in another order, with other times and permissions, and with what a working tree collects.
The files that are built of both, at different times and under different circumstances, have
to be the same, byte for byte. They are left in OUTPUT.
"""

from __future__ import annotations

import email
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

SDIST = {
    "PKG-INFO",
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "pyproject.toml",
    ".gitignore",  # hatchling's doing: for who builds from the sdist, and works in it
}
"""What the sdist holds, if the tree does, beside all files of these folders."""

FOLDERS = ("trio_socketserver", "tests", "examples", "docs")

WHEEL = {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE"}
"""What the wheel holds in its dist-info, beside the package."""

LITTER = (
    "trio_socketserver/__pycache__/_run.cpython-313.pyc",
    "trio_socketserver/_fast.cpython-313-x86_64-linux-gnu.so",
    "tests/__pycache__/conftest.cpython-313-pytest-9.pyc",
    "tests/benchmarks/load",
    "tests/.hypothesis/example",
    "docs/_build/index.html",
    ".coverage",
    "dist/trio_socketserver-0.0.0.tar.gz",
)
"""Files that are there after work in the tree, and belong into nothing."""

DEPENDENCIES = {"trio", "outcome"}


def copy_otherwise(tree: Path, folder: Path) -> None:
    files = sorted((p for p in tree.rglob("*") if p.is_file()), reverse=True)
    for number, file in enumerate(files):
        copy = folder / file.relative_to(tree)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        copy.chmod(0o700 if os.access(file, os.X_OK) else 0o600)
        os.utime(copy, (number, 10**9 + number))
    for name in LITTER:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\x7fELF")


def build(tree: Path, output: Path, **environ: str) -> dict[str, str]:
    """Build both, the wheel from the sdist; return their hashes."""
    kept = {
        name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"
    }
    command = ["-m", "build", "--no-isolation", "--outdir", str(output), str(tree)]
    done = subprocess.run(
        [sys.executable, *command],
        env=kept | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stdout)
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in output.iterdir()
    }


def check_names(found: Iterable[str], expected: set[str]) -> None:
    if found := set(found) ^ expected:
        sys.exit(
            f"in one only, of what was built and what should be there: {sorted(found)}"
        )


def check_sdist(tree: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = [member for member in archive.getmembers() if not member.isdir()]
    assert all(member.isreg() for member in members)
    expected = {name for name in SDIST if (tree / name).exists()} | {"PKG-INFO"}
    for folder in FOLDERS:
        files = filter(Path.is_file, (tree / folder).rglob("*"))
        expected.update(str(file.relative_to(tree)) for file in files)
    check_names((member.name.partition("/")[2] for member in members), expected)


def check_wheel(tree: Path, wheel: Path) -> None:
    info = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    files = filter(Path.is_file, (tree / "trio_socketserver").rglob("*"))
    package = {str(path.relative_to(tree)) for path in files}
    with zipfile.ZipFile(wheel) as archive:
        check_names(archive.namelist(), package | {f"{info}/{name}" for name in WHEEL})
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
    required = metadata.get_all("Requires-Dist", [])
    always = {re.split(r"[^\w-]", line)[0] for line in required if "extra ==" not in line}
    assert always == DEPENDENCIES, always
    # There is no host for the project; an address that leads nowhere is worse than none.
    assert not metadata.get_all("Project-URL")
    assert not metadata["Home-page"]
    assert "trio_socketserver/py.typed" in package
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert metadata["License-Expression"] == "MIT"


def main() -> None:
    tree, output = map(Path, sys.argv[1:])
    first = build(tree, output)
    with tempfile.TemporaryDirectory() as folder:
        copy, again = Path(folder, "elsewhere"), Path(folder, "again")
        copy_otherwise(tree, copy)
        os.umask(0o077)
        second = build(copy, again, TZ="Pacific/Apia", PYTHONHASHSEED="1", LC_ALL="C")
    assert len(first) == 2, first
    assert first == second, f"not reproducible: {first} {second}"
    (sdist,), (wheel,) = output.glob("*.tar.gz"), output.glob("*.whl")
    check_sdist(tree, sdist)
    check_wheel(tree, wheel)
    paths = map(str, output.iterdir())
    check = [sys.executable, "-m", "twine", "--no-color", "check", "--strict", *paths]
    subprocess.run(check, check=True)
    for name, digest in first.items():
        print(f"{digest}  {name}")


if __name__ == "__main__":
    main()
