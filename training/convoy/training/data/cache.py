"""What was found out about images once, kept on disk: decoded pixels, sums, unpacked archives.

An entry is a file whose name is a digest of everything that its content depends on: for each image
file its absolute path, size, times and inode, and the code and libraries that decode it. So an
entry is never wrong, only no longer used, and can be deleted at any time.
"""

import contextlib
import functools
import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import PIL
from PIL import features

from convoy.training.data import image_file
from convoy.training.data.images import ImageRef

_log = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 20 * 2**30
_ENTRY = re.compile(r"[0-9a-f]{32}\.(npz|pack)")
_LEFTOVER = re.compile(r"tmp.*\.tmp")
# A temporary file of this age belongs to a process that was killed.
_LEFTOVER_AGE_S = 24 * 3600
_DECODER_LIBRARIES = ("jpg", "zlib", "webp")

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the cache.

    Attributes:
        used_at: When it was read or written last, in seconds since 1970.
    """

    path: Path
    size_bytes: int
    used_at: float


class Cache:
    """A folder of entries.

    Args:
        folder: Made where it is missing.
        max_bytes: What the entries may take; those that were not used for longest go first.
    """

    def __init__(self, folder: Path, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    def entry(self, *parts: object, suffix: str) -> Path:
        """Return where the entry is kept whose content depends on these parts."""
        digest = hashlib.sha256(repr(parts).encode("utf-8", "backslashreplace")).hexdigest()
        return self.folder / f"{digest[:32]}.{suffix}"

    def load(self, entry: Path, read: Callable[[Path], _Value]) -> _Value | None:
        """Read an entry; return None where there is none, or a damaged one, which is deleted."""
        if not entry.is_file():
            return None
        try:
            value = read(entry)
            # The time of the last use; the modification time stays.
            os.utime(entry, ns=(time.time_ns(), entry.stat().st_mtime_ns))
        # What a cut file raises depends on where it was cut.
        except Exception as error:
            _log.warning("data: cache entry %s is damaged (%s): made anew", entry, error)
            with contextlib.suppress(OSError):
                entry.unlink(missing_ok=True)
            return None
        return value

    def store(self, entry: Path, write: Callable[[IO[bytes]], None]) -> bool:
        """Write an entry atomically and durably; where that fails, warn and leave none."""
        temporary = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".tmp", delete=False) as file:
                temporary = Path(file.name)
                write(file)
                file.flush()
                os.fsync(file.fileno())
                size_bytes = file.tell()
            if size_bytes > self.max_bytes:
                _log.warning(
                    "data: not cached: expected at most %d bytes (--cache-gib), got %d",
                    self.max_bytes,
                    size_bytes,
                )
                return False
            temporary.replace(entry)
            self.prune(keep=entry)
        except OSError as error:
            _log.warning("data: cannot cache decoded images in %s: %s", self.folder, error)
            return False
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
        return True

    def entries(self) -> list[Entry]:
        """Return all entries, that of the last use first."""
        found = []
        for path in self._files():
            if _ENTRY.fullmatch(path.name):
                # Another process may delete it meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    used_at = max(status.st_atime, status.st_mtime)
                    found.append(Entry(path, status.st_size, used_at))
        return sorted(found, key=lambda entry: entry.used_at, reverse=True)

    def prune(self, max_bytes: int | None = None, keep: Path | None = None) -> list[Entry]:
        """Delete what exceeds a limit, by default the cache's own; return what was deleted.

        Args:
            max_bytes: What may stay.
            keep: An entry that stays in any case.
        """
        room = self.max_bytes if max_bytes is None else max_bytes
        deleted = []
        entries = self.entries()
        for entry in sorted(entries, key=lambda entry: entry.path != keep):
            room -= entry.size_bytes
            if room < 0 and entry.path != keep:
                entry.path.unlink(missing_ok=True)
                deleted.append(entry)
        for path in self._files():
            if _LEFTOVER.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > _LEFTOVER_AGE_S:
                        path.unlink()
        return deleted

    def _files(self) -> list[Path]:
        return list(self.folder.iterdir()) if self.folder.is_dir() else []


def identity(refs: Iterable[ImageRef]) -> str:
    """Return a digest that changes with any of the images, or with how they are decoded.

    A file counts by its absolute path, size, modification and change time, device and inode.
    """
    digest = hashlib.sha256(decoder_version().encode())
    files: dict[Path, bytes] = {}
    for ref in refs:
        if ref.path not in files:
            files[ref.path] = file_identity(ref.path)
        digest.update(files[ref.path] + f"\0{ref.offset} {ref.size}\n".encode())
    return digest.hexdigest()


def file_identity(path: Path) -> bytes:
    """Return what tells one state of a file from all others."""
    try:
        status = path.stat()
    except OSError as error:
        return f"{error.errno}".encode()
    numbers = (
        *(status.st_size, status.st_mtime_ns, status.st_ctime_ns),
        *(status.st_dev, status.st_ino),
    )
    return os.fsencode(os.path.abspath(path)) + repr(numbers).encode()


@functools.cache
def decoder_version() -> str:
    """Return a text that changes with the image policy and the libraries that carry it out."""
    digest = hashlib.sha256(Path(image_file.__file__).read_bytes())
    libraries = [f"{name} {features.version(name)}" for name in _DECODER_LIBRARIES]
    return ", ".join(
        [digest.hexdigest(), f"pillow {PIL.__version__}", f"numpy {np.__version__}", *libraries]
    )
