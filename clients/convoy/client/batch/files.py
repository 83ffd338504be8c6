"""Lists of inputs, kept on disk: memory does not grow with their number.

A list is written once, when the job starts, to the job's folder: one JSON value a line. A resumed
job reads that file, so files that appear or vanish meanwhile do not shift the others. Beside it,
NAME.json holds what is known of the whole list; the list counts once that file is there.
"""

import contextlib
import glob
import heapq
import io
import itertools
import json
import os
import stat
import tempfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convoy.client import urls
from convoy.client.batch.errors import InputError
from convoy.client.batch.items import Item, Shard, batched
from convoy.client.errors import ImageError
from convoy.client.images import download_image
from convoy.client.urls import UrlFolder, describe_error, is_url, open_binary, shown

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
NO_IMAGE_NAME = "not named like an image"
_NAMES_IN_MEMORY = 100_000
_LINES_AT_ONCE = 64
# Each waits for the network, hardly ever for a processor.
_DOWNLOADS = 32

Names = Callable[[Counter[str]], Iterable[str]]


@dataclass(frozen=True, slots=True)
class FrozenList:
    """A list on disk.

    Attributes:
        path: Its file.
        total: Its number of lines.
        left_out: Entries of the input that are not in it, by reason.
        facts: What else its writer noted.
    """

    path: Path
    total: int
    left_out: Mapping[str, int]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "FrozenList | None":
        """Open the list; None if it was not completed."""
        try:
            record = json.loads(_facts_path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return cls(path, record["total"], record["left_out"], record["facts"])

    @classmethod
    def write(
        cls,
        path: Path,
        lines: Iterable[object],
        left_out: Counter[str],
        facts: Mapping[str, Any] | None = None,
    ) -> "FrozenList":
        """Write the lines, then what is known of them.

        Args:
            path: The list's file.
            lines: Values of JSON; consumed once.
            left_out: Read after the last line.
            facts: As JSON's types; read after the last line.
        """
        total = 0
        with path.open("w", encoding="ascii") as file:
            for line in lines:
                file.write(json.dumps(line) + "\n")
                total += 1
            file.flush()
            os.fsync(file.fileno())
        found = cls(path, total, dict(left_out), dict(facts or {}))
        record = {"total": total, "left_out": found.left_out, "facts": found.facts}
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(record), encoding="utf-8")
        os.replace(temporary, _facts_path(path))
        return found

    def lines(self, start: int) -> Iterator[Any]:
        """Yield the lines from number `start` on."""
        with self.path.open(encoding="ascii") as lines:
            # As one array: a call for each line costs more than its content.
            for some in batched(itertools.islice(lines, start, None), _LINES_AT_ONCE):
                yield from json.loads(f"[{','.join(some)}]")


@dataclass(frozen=True, slots=True)
class FileList:
    """Image files by name.

    Attributes:
        names: Relative to `root`.
        root: An absolute path, or the URL of a folder.
    """

    names: FrozenList
    root: str

    @classmethod
    def open(
        cls, frozen: Path, shard: Shard, root: str, find: Names, *, ordered: bool = False
    ) -> "FileList":
        """Open the list, or write it.

        Args:
            frozen: Its file.
            shard: The names to keep.
            root: What the names are relative to; made absolute, so that a job may be resumed from
                another folder.
            find: Yields the names and counts what it leaves out.
            ordered: Keep the order of the names; otherwise they are sorted.
        """
        if (names := FrozenList.read(frozen)) is None:
            left_out: Counter[str] = Counter()
            mine = (name for name in find(left_out) if is_in(name, shard))
            with contextlib.ExitStack() as stack:
                in_order = mine if ordered else _sorted(mine, frozen.parent, stack)
                names = FrozenList.write(frozen, in_order, left_out, {"root": whole_name(root)})
        return cls(names, names.facts["root"])

    @property
    def total(self) -> int:
        """The number of files."""
        return self.names.total

    @property
    def left_out(self) -> Mapping[str, int]:
        """Entries that are not image files."""
        return self.names.left_out

    @property
    def failures(self) -> Mapping[str, str]:
        """None: a file that cannot be read is an error of that file."""
        return {}

    def items(self, start: int) -> Iterator[Item]:
        """Yield the files from number `start` on; of a URL its content, or why there is none."""
        join = _join_url if is_url(self.root) else os.path.join
        return _downloaded(
            Item(shown(name), name if is_url(name) else join(self.root, name))
            for name in self.names.lines(start)
        )

    def keys(self, start: int) -> Iterator[str]:
        """Yield their names, without secrets."""
        return map(shown, self.names.lines(start))

    def columns(self, start: int, names: tuple[str, ...]) -> Iterator[Mapping[str, object]]:
        """Files have no columns."""
        raise InputError(f"{self.root}: files have no columns: {', '.join(names)}")


def whole_name(name: str) -> str:
    """Return a path made absolute; a URL as it is."""
    return name if is_url(name) else os.path.abspath(name)


def is_in(name: str, shard: Shard) -> bool:
    """Tell whether a name belongs to a shard."""
    if shard.count == 1:
        return True
    return zlib.crc32(name.encode("utf-8", "surrogateescape")) % shard.count == shard.index


def names_in_folder(folder: Path, left_out: Counter[str]) -> Iterator[str]:
    """Yield the image files below a folder, by their paths in it, in no order.

    Symbolic links to folders are followed, except to a folder that they lie in.

    Args:
        folder: Where to look.
        left_out: Counts the other files.

    Raises:
        InputError: A folder cannot be read.
    """
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while pending:
        inside, above = pending.pop()
        path = folder / inside
        try:
            found = path.stat()
            above |= {(found.st_dev, found.st_ino)}
            with os.scandir(path) as entries:
                for entry in entries:
                    name = os.path.join(inside, entry.name)
                    if not _is_folder(entry):
                        if reason := _why_no_image(entry):
                            left_out[reason] += 1
                        else:
                            yield name
                        continue
                    if entry.is_symlink() and _identity(entry.path) in above:
                        left_out["a symbolic link to a folder that it lies in"] += 1
                    else:
                        pending.append((name, above))
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from error


def names_at_url(url: str, left_out: Counter[str]) -> Iterator[str]:
    """Yield the image files below a folder of an object store, by their paths in it.

    Args:
        url: Where to look.
        left_out: Counts the other files.

    Raises:
        InputError: It cannot be listed.
    """
    try:
        names = UrlFolder(url).names()
    except OSError as error:
        raise InputError(f"{url}: {describe_error(error)}") from error
    for name in names:
        if name.lower().endswith(IMAGE_SUFFIXES):
            yield name
        else:
            left_out[NO_IMAGE_NAME] += 1


def names_matching(pattern: str, left_out: Counter[str]) -> Iterator[str]:
    """Yield the files that a glob pattern matches; `**` crosses folders.

    Raises:
        InputError: The pattern is a URL that cannot be listed.
    """
    if is_url(pattern):
        yield from urls_matching(pattern)
        return
    for name in glob.iglob(pattern, recursive=True):
        if os.path.isdir(name):
            left_out["a folder that the pattern matches"] += 1
        else:
            yield name


def urls_matching(pattern: str) -> list[str]:
    """Return the files of an object store that a glob pattern matches, sorted.

    Raises:
        InputError: The store does not list them.
    """
    try:
        return urls.names_matching(pattern)
    except OSError as error:
        raise InputError(f"{pattern}: {describe_error(error)}") from error


def names_in_file(path: str) -> Iterator[str]:
    """Yield the lines of a list of paths; an empty line names nothing.

    Raises:
        InputError: It cannot be read as text.
    """
    try:
        with io.TextIOWrapper(open_binary(path), "utf-8", "surrogateescape") as lines:
            for line in lines:
                name = line.rstrip("\r\n")
                if "\0" in name:
                    raise InputError(f"{path}: expected a path a line, got other bytes")
                if name:
                    yield name
    except OSError as error:
        raise InputError(f"{path}: {describe_error(error)}") from error


def _join_url(root: str, name: str) -> str:
    return f"{root.rstrip('/')}/{name}"


def _downloaded(items: Iterator[Item]) -> Iterator[Item]:
    """Replace URLs by what is there, many at a time; the order stays."""
    pool = ThreadPoolExecutor(_DOWNLOADS, "convoy-download")
    ahead: deque[tuple[Item, Future[bytes | ImageError] | None]] = deque()
    try:
        for item in items:
            remote = isinstance(item.image, str) and is_url(item.image)
            if not remote and not ahead:
                yield item
                continue
            ahead.append((item, pool.submit(_download, str(item.image)) if remote else None))
            if len(ahead) > _DOWNLOADS:
                yield _arrived(*ahead.popleft())
        while ahead:
            yield _arrived(*ahead.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _arrived(item: Item, download: Future[bytes | ImageError] | None) -> Item:
    return Item(item.key, download.result()) if download else item


def _download(url: str) -> bytes | ImageError:
    try:
        return download_image(url)
    except ImageError as error:
        return error
    except OSError as error:
        return ImageError(f"{shown(url)}: {describe_error(error)}")


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symbolic link in a loop
        return False


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _why_no_image(entry: "os.DirEntry[str]") -> str:
    """Return why a file is left out; empty if it is an image, or a broken link to one."""
    if not entry.name.lower().endswith(IMAGE_SUFFIXES):
        return NO_IMAGE_NAME
    try:
        mode = entry.stat().st_mode
    except OSError:
        return ""  # its row has the error
    return "" if stat.S_ISREG(mode) else "a pipe, socket or device"


def _facts_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _sorted(names: Iterable[str], folder: Path, stack: contextlib.ExitStack) -> Iterator[str]:
    """Sort any number of names by merging sorted runs on disk."""
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
