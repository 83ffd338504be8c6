"""The model repository: NAME/VERSION/ folders that appear whole or not at all.

A version is built in a hidden sibling, NAME/.VERSION.RANDOM.partial, which no server loads, and
renamed when every byte is on disk. Versions are never changed afterwards. Exporters take turns by a
lock on the NAME folder, held for the numbering and the rename only; the lock on a sibling tells
whether its exporter lives, so that the next one can sweep what a killed one left.
"""

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from export.errors import InputError, PublishError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_READ_ONLY = 0o444
_FOLDER_MODE = 0o755

Seal = Callable[[Path, int], None]
"""Completes a staged folder for the version number given, that is, writes the manifest."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """The versions of one model in a repository.

    Raises:
        InputError: The name is not one that a repository can hold.
    """

    repository: Path
    name: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InputError(
                "name: expected 1 to 64 letters, digits, '_', '-' or '.', the first a letter or "
                f"digit, got {self.name!r}"
            )

    @property
    def path(self) -> Path:
        """REPOSITORY/NAME."""
        return self.repository / self.name

    def versions(self) -> list[int]:
        """Returns the numbers that are taken, in rising order."""
        if not self.path.is_dir():
            return []
        return sorted(
            int(entry.name) for entry in self.path.iterdir() if _VERSION.fullmatch(entry.name)
        )

    @contextmanager
    def stage(self) -> Iterator[Path]:
        """Gives a folder to build a version in; it is gone afterwards unless it was published.

        Raises:
            PublishError: The repository cannot be written to.
        """
        with _failures_reported(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            with self.locked():
                self._sweep()
                staged = Path(
                    tempfile.mkdtemp(
                        prefix=f".{self._next_version()}.", suffix=".partial", dir=self.path
                    )
                )
                owner = _lock(staged)
        try:
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)
            os.close(owner)
            # Succeeds only where this was the first export of the name, and it failed.
            with suppress(OSError):
                self.path.rmdir()

    def publish(self, staged: Path, seal: Seal) -> int:
        """Turns a staged folder into the next version and returns its number.

        Args:
            staged: From `stage`, with every file but what seal writes.
            seal: Called with the folder and the number when both are final.

        Raises:
            PublishError: The folder could not be completed or moved; nothing was published.
        """
        with self.locked(), _failures_reported(self.path):
            version = self._next_version()
            seal(staged, version)
            for file in staged.iterdir():
                file.chmod(_READ_ONLY)
                _sync(file)
            staged.chmod(_FOLDER_MODE)
            _sync(staged)
            staged.rename(self.path / str(version))
            for folder in (self.path, self.repository):
                _sync(folder)
        return version

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other exporters from numbering, publishing or promoting meanwhile.

        Raises:
            PublishError: The folder of the model is missing or cannot be locked.
        """
        with _failures_reported(self.path):
            descriptor = _lock(self.path, fcntl.LOCK_EX)
        try:
            yield
        finally:
            os.close(descriptor)

    def _next_version(self) -> int:
        return max(self.versions(), default=0) + 1

    def _sweep(self) -> None:
        """Removes the staged folders of exporters that are no more."""
        for folder in self.path.glob(".*.partial"):
            with suppress(BlockingIOError):
                os.close(_lock(folder))
                shutil.rmtree(folder)


def _lock(folder: Path, flags: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> int:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, flags)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _failures_reported(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PublishError(f"repository {folder}: {error.strerror or error}") from error
