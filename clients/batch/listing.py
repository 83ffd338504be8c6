"""Lists of image files, in memory that does not grow with them.

The names are written once, sorted, to a file in the job's folder. A job that is resumed reads that
file, so pictures that come or go meanwhile do not shift the others.
"""

import contextlib
import glob
import heapq
import itertools
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from clients.batch.errors import InputError
from clients.batch.rows import Item, batched
from clients.batch.shards import Shard

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
_NAMES_IN_MEMORY = 100_000


@dataclass(frozen=True, slots=True)
class FileList:
    """A frozen list of image files.

    Attributes:
        path: Of the list; each line is a name as a JSON string.
        total: Names in it.
        root: What the names are relative to.
    """

    path: Path
    total: int
    root: str

    def items(self, start: int) -> Iterator[Item]:
        """Yields the files from number `start` on."""
        with self.path.open(encoding="ascii") as lines:
            for line in itertools.islice(lines, start, None):
                name = json.loads(line)
                yield Item(_printable(name), os.path.join(self.root, name))


def names_in_folder(folder: Path) -> Iterator[str]:
    """Yields the image files below a folder, by their paths in it, in no order.

    Raises:
        InputError: A folder cannot be read.
    """
    pending = [""]
    while pending:
        inside = pending.pop()
        try:
            with os.scandir(folder / inside) as entries:
                for entry in entries:
                    name = os.path.join(inside, entry.name)
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(name)
                    elif name.lower().endswith(IMAGE_SUFFIXES):
                        yield name
        except OSError as error:
            raise InputError(f"{folder / inside}: {error.strerror}") from error


def names_matching(pattern: str) -> Iterator[str]:
    """Yields the files that a glob pattern names; `**` crosses folders."""
    return (name for name in glob.iglob(pattern, recursive=True) if not os.path.isdir(name))


def names_in_file(path: Path) -> Iterator[str]:
    """Yields the lines of a list of paths; empty ones do not count.

    Raises:
        InputError: It cannot be read as text.
    """
    try:
        with path.open(encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                if name := line.rstrip("\r\n"):
                    if "\0" in name:
                        raise InputError(f"{path}: expected a path a line, got other bytes")
                    yield name
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def freeze(names: Iterable[str], path: Path, shard: Shard, *, ordered: bool) -> int:
    """Writes the names of a shard to a list and returns their number.

    Args:
        names: Of all shards.
        path: Where the list shall be; it appears whole or not at all.
        shard: Those to keep.
        ordered: Keep the names' order; otherwise they are sorted.
    """
    mine = (name for name in names if zlib.crc32(os.fsencode(name)) % shard.count == shard.index)
    temporary = path.with_suffix(".tmp")
    with contextlib.ExitStack() as stack, temporary.open("w", encoding="ascii") as file:
        count = 0
        for name in mine if ordered else _sorted(mine, path.parent, stack):
            file.write(json.dumps(name) + "\n")
            count += 1
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return count


def _sorted(names: Iterable[str], folder: Path, stack: contextlib.ExitStack) -> Iterator[str]:
    """Sorts any number of names by merging sorted runs on disk."""
    runs: list[Iterable[str]] = []
    for run in batched(names, _NAMES_IN_MEMORY):
        run.sort()
        if not runs and len(run) < _NAMES_IN_MEMORY:
            return iter(run)
        file = tempfile.TemporaryFile("w+", encoding="ascii", dir=folder)  # noqa: SIM115
        stack.enter_context(file)
        file.writelines(json.dumps(name) + "\n" for name in run)
        file.seek(0)
        runs.append(map(json.loads, file))
    return heapq.merge(*runs)


def _printable(name: str) -> str:
    """A name as text that every format can hold, also where the file system's is not UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
