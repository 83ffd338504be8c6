"""Environments with other packages than the tests' own, for client programs; kept in build/."""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

CACHE = Path(__file__).parents[3] / "build" / "interop"
_TIMEOUT_S = 180


def python_with(name: str, *packages: str) -> list[str]:
    """Return the command of a Python with these packages; skip where they cannot be installed."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    folder = CACHE / name
    python = str(folder / "bin" / "python")
    with _unless_made(folder, packages) as make:
        if make:
            _run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)])
            _run([uv, "pip", "install", "--quiet", "--python", python, *packages])
    return [python]


def node_with(name: str, *packages: str) -> Path:
    """Return a folder with these npm packages; skip where they cannot be installed."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs npm (Debian package npm)")
    folder = CACHE / name
    with _unless_made(folder, packages) as make:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
            options = ["--no-audit", "--no-fund", "--silent", "--prefix", "."]
            _run([npm, "install", *options, *packages], folder)
    return folder


@contextlib.contextmanager
def _unless_made(folder: Path, packages: tuple[str, ...]) -> Iterator[bool]:
    """Yield whether the caller has to install the packages; one process at a time."""
    content = "\n".join(packages)
    note = folder / "packages.txt"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        make = not note.is_file() or note.read_text() != content
        yield make
        if make:
            # Written last: an installation that was broken off is made again.
            note.write_text(content)


def _run(command: list[str], folder: Path | None = None) -> None:
    try:
        subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{command[0]} cannot install {command[-1]} here: {error.stderr[-300:]}")
    except subprocess.TimeoutExpired:
        pytest.skip(f"{command[0]} did not install {command[-1]} within {_TIMEOUT_S} s")
