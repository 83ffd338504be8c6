"""What can be classified: folders, globs, lists of paths, archives, Parquet files, arrays."""

import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from pathlib import Path

from convoy.client import urls
from convoy.client.batch import files
from convoy.client.batch.archives import TAR_SUFFIXES, ZIP_SUFFIXES, TarArchive, ZipArchive
from convoy.client.batch.arrays import ArrayFile
from convoy.client.batch.errors import InputError
from convoy.client.batch.files import FileList, FrozenList
from convoy.client.batch.items import Item, Shard, Source
from convoy.client.batch.parquet import ParquetColumn
from convoy.client.errors import ImageError
from convoy.client.urls import UrlFolder, describe_error, is_url

_GLOB = frozenset("*?[")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class _Kind(Enum):
    FOLDER = auto()
    GLOB = auto()
    LIST = auto()
    TAR = auto()
    ZIP = auto()
    NPY = auto()
    PARQUET = auto()


_SUFFIXES = {
    **dict.fromkeys(TAR_SUFFIXES, _Kind.TAR),
    **dict.fromkeys(ZIP_SUFFIXES, _Kind.ZIP),
    ".npy": _Kind.NPY,
    ".parquet": _Kind.PARQUET,
}
# Files that hold many images: they are compared by size and time when a job is resumed.
_CONTAINERS = frozenset(_SUFFIXES.values())


@dataclass(frozen=True, slots=True)
class Input:
    """What a job reads.

    Attributes:
        name: A path or URL, a glob pattern, a name with braces ({0..9} or {a,b}), or several of
            these.
        shard: The part of the inputs.
        image_column: Of Parquet files; empty if only one column fits.
        key_column: Of Parquet files; empty for row numbers.
    """

    name: str | tuple[str, ...]
    shard: Shard = field(default_factory=Shard)
    image_column: str = ""
    key_column: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The names as given."""
        return (self.name,) if isinstance(self.name, str) else tuple(self.name)

    def state(self) -> dict[str, object]:
        """Return a value that changes if a resumed job would read other inputs.

        Raises:
            InputError: The only input is missing.
        """
        where = [urls.identity(files.whole_name(name)) for name in self.names]
        shard = f"{self.shard.index}/{self.shard.count}"
        state: dict[str, object] = {"input": where[0] if len(where) == 1 else where, "shard": shard}
        parts = self._parts()
        containers = [name for kind, name in parts if kind in _CONTAINERS]
        if containers:
            found = [_describe(name, must_exist=len(parts) == 1) for name in containers]
            state |= {"files": found, "image_column": self.image_column}
            state |= {"key_column": self.key_column}
        return state

    def check(self) -> None:
        """Check that the input exists; its content is checked when it is opened.

        Raises:
            InputError: Nothing has this name; patterns are not checked.
        """
        parts = self._parts()
        if len(parts) == 1 and parts[0][0] is not _Kind.GLOB:
            _describe(parts[0][1], must_exist=True)

    def open(self, folder: Path) -> Source:
        """Open it.

        If one of several inputs cannot be read, it becomes one item with its error.

        Args:
            folder: Where lists of files and indices of archives are kept, or were left by an
                earlier run.

        Raises:
            InputError: It is missing, empty, or its content does not fit its name.
        """
        parts = self._parts()
        if len(parts) == 1:
            (part,) = parts
            source = self._open(*part, folder / "inputs")
        else:
            sources = [
                self._try_to_open(kind, name, folder / f"inputs-{number}")
                for number, (kind, name) in enumerate(parts)
            ]
            source = Chain(tuple(sources))
            if len(source.failures) == len(sources):
                raise InputError("; ".join(source.failures.values()))
        may_be_empty = {_Kind.NPY, _Kind.PARQUET}
        if not source.total and self.shard.count == 1 and parts[0][0] not in may_be_empty:
            raise InputError(self._why_empty(parts[0][0], source))
        return source

    def _why_empty(self, kind: _Kind, source: Source) -> str:
        name = ", ".join(self.names)
        if kind in (_Kind.GLOB, _Kind.LIST):
            return f"{name}: expected a folder, a list or a pattern of images, found none"
        others = sum(source.left_out.values())
        suffixes = ", ".join(files.IMAGE_SUFFIXES)
        return f"{name}: holds no image ({suffixes})" + (f", {others} other files" * bool(others))

    def _parts(self) -> list[tuple[_Kind, str]]:
        """Return the inputs that the names stand for, in order."""
        expanded = itertools.chain.from_iterable(map(_expand_braces, self.names))
        return [part for name in expanded for part in _parts_of(name)]

    def _try_to_open(self, kind: _Kind, name: str, frozen: Path) -> tuple[str, Source]:
        """Open one of several; a failure is kept, so that a resumed job counts the same items.

        Returns:
            What its keys begin with, and the source.
        """
        failed = frozen.with_name(frozen.name + ".failed")
        if (record := FrozenList.read(failed)) is None:
            try:
                return _prefix(kind, name), self._open(kind, name, frozen)
            except InputError as error:
                facts = {"reason": str(error)}
                record = FrozenList.write(failed, (), Counter(), facts)
        is_mine = files.is_in(name, self.shard)
        return "", UnreadableInput(urls.shown(name), record.facts["reason"], is_mine)

    def _open(self, kind: _Kind, name: str, frozen: Path) -> Source:
        match kind:
            case _Kind.TAR:
                return TarArchive.open(name, frozen, self.shard)
            case _Kind.ZIP:
                return ZipArchive.open(name, frozen, self.shard)
            case _Kind.NPY:
                return ArrayFile.open(name, self.shard)
            case _Kind.PARQUET:
                return ParquetColumn.open(name, self.image_column, self.key_column, self.shard)
            case _Kind.FOLDER:
                find = (
                    partial(files.names_at_url, name)
                    if is_url(name)
                    else partial(files.names_in_folder, Path(name))
                )
                return FileList.open(frozen, self.shard, name, find)
            case _Kind.GLOB:
                find = partial(files.names_matching, name)
                return FileList.open(frozen, self.shard, "", find)
            case _Kind.LIST:
                return FileList.open(
                    frozen, self.shard, "", lambda _: files.names_in_file(name), ordered=True
                )


@dataclass(frozen=True, slots=True)
class Chain:
    """Several sources, one after the other.

    Attributes:
        parts: What their keys begin with, and the sources.
    """

    parts: tuple[tuple[str, Source], ...]

    @property
    def total(self) -> int:
        """The number of inputs of all sources."""
        return sum(source.total for _, source in self.parts)

    @property
    def left_out(self) -> Mapping[str, int]:
        """Entries of all sources that are not images."""
        counts: Counter[str] = Counter()
        for _, source in self.parts:
            counts.update(source.left_out)
        return counts

    @property
    def failures(self) -> Mapping[str, str]:
        """The sources that cannot be read."""
        return {name: why for _, source in self.parts for name, why in source.failures.items()}

    def items(self, start: int) -> Iterator[Item]:
        """Yield the items of all sources, from number `start`."""
        for prefix, source, inside in self._from(start):
            for item in source.items(inside):
                yield Item(prefix + item.key, item.image) if prefix else item

    def keys(self, start: int) -> Iterator[str]:
        """Yield the keys of all sources."""
        for prefix, source, inside in self._from(start):
            for key in source.keys(inside):
                yield prefix + key

    def columns(self, start: int, names: tuple[str, ...]) -> Iterator[Mapping[str, object]]:
        """Yield the columns of all sources."""
        for _, source, inside in self._from(start):
            yield from source.columns(inside, names)

    def _from(self, start: int) -> Iterator[tuple[str, Source, int]]:
        """Yield the sources that have items from number `start` on, each with its first number."""
        for prefix, source in self.parts:
            if start < source.total:
                yield prefix, source, start
            start = max(0, start - source.total)


@dataclass(frozen=True, slots=True)
class UnreadableInput:
    """One of several inputs that could not be read: an item with an error.

    Attributes:
        is_mine: Whether this shard contains the item.
    """

    name: str
    reason: str
    is_mine: bool

    @property
    def total(self) -> int:
        """1 in one of the shards, 0 in the others."""
        return int(self.is_mine)

    @property
    def left_out(self) -> Mapping[str, int]:
        """Not known."""
        return {}

    @property
    def failures(self) -> Mapping[str, str]:
        """This input."""
        return {self.name: self.reason}

    def items(self, start: int) -> Iterator[Item]:
        """Yield the item."""
        if self.is_mine and not start:
            yield Item(self.name, ImageError(self.reason))

    def keys(self, start: int) -> Iterator[str]:
        """Yield its key."""
        if self.is_mine and not start:
            yield self.name

    def columns(self, start: int, names: tuple[str, ...]) -> Iterator[Mapping[str, object]]:
        """Yield a row without values."""
        if self.is_mine and not start:
            yield dict.fromkeys(names)


def _expand_braces(name: str) -> Iterator[str]:
    """Yield the names that braces stand for: {a,b} and {000..123}; a file's own name as it is."""
    match = _BRACES.search(name)
    if not match or _exists(name):
        yield name
        return
    numbers = _RANGE.fullmatch(match[1])
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        step = 1 if last >= first else -1
        width = len(numbers[1])
        choices = [f"{number:0{width}}" for number in range(first, last + step, step)]
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from _expand_braces(name[: match.start()] + choice + name[match.end() :])


def _exists(name: str) -> bool:
    try:
        return urls.exists(name) if is_url(name) else os.path.exists(name)
    except OSError as error:
        raise InputError(f"{name}: {describe_error(error)}") from error


def _parts_of(name: str) -> list[tuple[_Kind, str]]:
    if is_url(name):
        return _parts_of_url(name)
    if os.path.isdir(name):
        return _parts_of_folder(Path(name))
    kind = _kind_by_suffix(name)
    if os.path.exists(name) or not _GLOB & set(name):
        return [(kind, name)]
    if kind is _Kind.LIST:
        return [(_Kind.GLOB, name)]
    found = sorted(path for path in glob.iglob(name, recursive=True) if not os.path.isdir(path))
    return [(kind, path) for path in found] or [(kind, name)]


def _parts_of_url(url: str) -> list[tuple[_Kind, str]]:
    kind = _kind_by_suffix(urls.without_query(url))
    if _GLOB & set(url) and not urls.is_web(url):
        if kind is _Kind.LIST:
            return [(_Kind.GLOB, url)]
        return [(kind, found) for found in files.urls_matching(url)] or [(kind, url)]
    try:
        if kind is not _Kind.LIST or urls.is_file(url):
            return [(kind, url)]
        names = UrlFolder(url).names()
    except OSError as error:
        raise InputError(f"{url}: {describe_error(error)}") from error
    if any(name.lower().endswith(files.IMAGE_SUFFIXES) for name in names):
        return [(_Kind.FOLDER, url)]
    tables = [(_Kind.PARQUET, f"{url.rstrip('/')}/{name}") for name in _tables(names)]
    return tables or [(_Kind.FOLDER, url)]


def _tables(names: Iterable[str]) -> list[str]:
    """Return the Parquet files except leftovers and metadata, sorted."""
    return sorted(
        name
        for name in names
        if name.endswith(".parquet")
        and not any(part.startswith(("_", ".")) for part in name.split("/"))
    )


def _parts_of_folder(folder: Path) -> list[tuple[_Kind, str]]:
    """Return the folder or, without images, its Parquet files (Spark, Hugging Face)."""
    if next(files.names_in_folder(folder, Counter()), None) is None:
        names = (str(path.relative_to(folder)) for path in folder.rglob("*.parquet"))
        if tables := _tables(names):
            return [(_Kind.PARQUET, str(folder / name)) for name in tables]
    return [(_Kind.FOLDER, str(folder))]


def _kind_by_suffix(name: str) -> _Kind:
    lower = name.lower()
    return next((k for suffix, k in _SUFFIXES.items() if lower.endswith(suffix)), _Kind.LIST)


def _prefix(kind: _Kind, name: str) -> str:
    """Return the prefix that distinguishes keys of several inputs; empty for lists and patterns."""
    return "" if kind in (_Kind.LIST, _Kind.GLOB) else os.path.join(urls.shown(name), "")


def _describe(name: str, *, must_exist: bool) -> Mapping[str, object] | None:
    try:
        return urls.describe(name)
    except OSError as error:
        if must_exist:
            raise InputError(f"{name}: {describe_error(error)}") from error
        return None
