"""Tar and zip archives of images: an index of the members, then the members by their positions.

The index is written to the job's folder when the job starts. So the number of images is known, a
damaged archive fails before the first image is classified, and a job resumes without reading the
archive from its start. An image is a member whose name has an image suffix: a file, or a link to a
file in the archive.
"""

import bz2
import gzip
import lzma
import posixpath
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from convoy.client.batch.errors import InputError
from convoy.client.batch.files import IMAGE_SUFFIXES, NO_IMAGE_NAME, FrozenList, is_in
from convoy.client.batch.items import Item, Shard
from convoy.client.errors import ImageError
from convoy.client.images import check_size
from convoy.client.urls import describe_error, open_binary

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
ZIP_SUFFIXES = (".zip",)

_LINKS_IN_A_ROW = 40
_COMPRESSED = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\x00", lzma.open))
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, zlib.error, lzma.LZMAError)
_AFTER_THE_END = "bytes after the end of the archive"

# A member's position: its offset in the uncompressed archive and its size.
Place = tuple[int, int]


@dataclass(frozen=True, slots=True)
class TarArchive:
    """The images in a tar, compressed or not, or in several concatenated ones.

    Attributes:
        index: One line per member: its name and position, or its name, None and an error.
    """

    path: str
    index: FrozenList

    @classmethod
    def open(cls, path: str, frozen: Path, shard: Shard) -> "TarArchive":
        """Open the index, or write it.

        Raises:
            InputError: The archive is damaged or cannot be read.
        """
        if (index := FrozenList.read(frozen)) is None:
            index = _Indexer(path, shard).write(frozen)
        return cls(path, index)

    @property
    def is_compressed(self) -> bool:
        """Whether it can only be read from its start."""
        with open_binary(self.path) as file:
            return _opener(file) is not None

    @property
    def total(self) -> int:
        """The number of images."""
        return self.index.total

    @property
    def left_out(self) -> Mapping[str, int]:
        """The other members."""
        return self.index.left_out

    @property
    def failures(self) -> Mapping[str, str]:
        """None: a damaged archive is an error when it is opened."""
        return {}

    def items(self, start: int) -> Iterator[Item]:
        """Yield the images from number `start` on.

        Raises:
            InputError: The archive was damaged after it was indexed.
        """
        try:
            with _open_stream(self.path) as stream, tempfile.TemporaryFile() as copies:
                copied = _copy(stream, copies, self.index.facts["linked"])
                for name, *place in self.index.lines(start):
                    if error := _why_unreadable(*place):
                        yield Item(name, error)
                        continue
                    offset, size = place
                    source, at = (copies, copied[offset]) if offset in copied else (stream, offset)
                    source.seek(at)
                    content = source.read(size)
                    if len(content) != size:
                        raise InputError(f"{self.path}: ends inside {name!r}")
                    yield Item(name, content)
        except _DAMAGE as error:
            raise InputError(f"{self.path}: {describe_error(error)}") from error

    def keys(self, start: int) -> Iterator[str]:
        """Yield the names."""
        return (name for name, *_ in self.index.lines(start))

    def columns(self, start: int, names: tuple[str, ...]) -> Iterator[Mapping[str, object]]:
        """Return no columns: an archive has none."""
        raise InputError(f"{self.path}: an archive has no columns: {', '.join(names)}")


@dataclass(frozen=True, slots=True)
class ZipArchive:
    """The images in a zip archive.

    Attributes:
        index: One line per member: its name and its number in the archive's directory.
    """

    path: str
    index: FrozenList

    @classmethod
    def open(cls, path: str, frozen: Path, shard: Shard) -> "ZipArchive":
        """Open the index, or write it.

        Raises:
            InputError: The archive is damaged or cannot be read.
        """
        if (index := FrozenList.read(frozen)) is None:
            left_out: Counter[str] = Counter()
            try:
                with open_binary(path) as file, zipfile.ZipFile(file) as archive:
                    lines = _zip_lines(archive, shard, left_out)
                    index = FrozenList.write(frozen, lines, left_out)
            except _DAMAGE as error:
                raise InputError(f"{path}: {describe_error(error)}") from error
        return cls(path, index)

    @property
    def total(self) -> int:
        """The number of images."""
        return self.index.total

    @property
    def left_out(self) -> Mapping[str, int]:
        """The other members."""
        return self.index.left_out

    @property
    def failures(self) -> Mapping[str, str]:
        """None: a damaged archive is an error when it is opened."""
        return {}

    def items(self, start: int) -> Iterator[Item]:
        """Yield the images from number `start` on; a damaged member is an error of its own."""
        try:
            with open_binary(self.path) as file, zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                for name, number in self.index.lines(start):
                    yield Item(name, _zip_member(archive, members[number]))
        except _DAMAGE as error:
            raise InputError(f"{self.path}: {describe_error(error)}") from error

    def keys(self, start: int) -> Iterator[str]:
        """Yield the names."""
        return (name for name, _ in self.index.lines(start))

    def columns(self, start: int, names: tuple[str, ...]) -> Iterator[Mapping[str, object]]:
        """Return no columns: an archive has none."""
        raise InputError(f"{self.path}: an archive has no columns: {', '.join(names)}")


@dataclass(frozen=True, slots=True)
class _Link:
    """A link whose name is that of an image.

    Attributes:
        number: Of the member, counted over the whole file.
        target: The name of the member that it links to.
        is_hard: Whether it is a hard link, which means a member before it.
    """

    number: int
    target: str
    is_hard: bool


@dataclass(slots=True)
class _Indexer:
    """Write the index of a tar; holds the links in memory, not the members."""

    path: str
    shard: Shard
    images: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    links: dict[str, list[_Link]] = field(default_factory=lambda: defaultdict(list))

    def write(self, frozen: Path) -> FrozenList:
        """Write the index.

        Raises:
            InputError: The archive is damaged or cannot be read.
        """
        facts: dict[str, object] = {"linked": []}
        draft = frozen.with_name(frozen.name + ".draft")
        try:
            found = FrozenList.write(draft, self._lines(), self.left_out, facts)
            if not self.links:
                lines: Iterator[Any] = found.lines(0)
            else:
                places = self._places()
                facts["linked"] = sorted({place[1:] for each in places.values() for place in each})
                lines = (self._resolved(line, places) for line in found.lines(0))
            return FrozenList.write(frozen, lines, Counter(found.left_out), facts)
        except _DAMAGE as error:
            raise InputError(
                f"{self.path}: after {self.images} images: {describe_error(error)}"
            ) from error
        finally:
            for path in (draft, draft.with_name(draft.name + ".json")):
                path.unlink(missing_ok=True)

    def _lines(self) -> Iterator[object]:
        for number, member in enumerate(self._members()):
            if member.islnk() or member.issym():
                self.links[_plain(member.name)].append(_link(number, member))
            elif member.isdir():
                continue
            if not member.name.lower().endswith(IMAGE_SUFFIXES):
                self.left_out[NO_IMAGE_NAME] += 1
            elif not (member.isreg() or member.islnk() or member.issym()):
                self.left_out["a pipe, socket or device"] += 1
            elif is_in(member.name, self.shard):
                self.images += 1
                if member.isreg():
                    yield member.name, member.offset_data, member.size
                else:
                    yield member.name, number

    def _members(self) -> Iterator[tarfile.TarInfo]:
        """Yield the members of the archive and of those concatenated to it."""
        with _open_stream(self.path) as stream:
            start: int | None = 0
            while start is not None:
                stream.seek(start)
                archive = tarfile.TarFile(fileobj=stream)
                count = 0
                while (member := archive.next()) is not None:
                    # tarfile remembers every member that it has seen.
                    archive.members.clear()  # type: ignore[attr-defined]
                    count += 1
                    yield member
                end = archive.offset
                stream.seek(end)
                if any(stream.read(tarfile.BLOCKSIZE).ljust(1, b"\1")):
                    if start and not count:
                        self.left_out[_AFTER_THE_END] += 1
                        return
                    raise InputError(
                        f"{self.path}: after {self.images} images: the archive is incomplete"
                    )
                start = _next_archive(stream)

    def _places(self) -> dict[str, list[tuple[int, int, int]]]:
        """Find the files that links lead to: numbers, offsets and sizes, by their names."""
        wanted = {self._final(link.target) for links in self.links.values() for link in links}
        places: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
        left_out, self.left_out = self.left_out, Counter()
        for number, member in enumerate(self._members()):
            if member.isreg() and (name := _plain(member.name)) in wanted:
                places[name].append((number, member.offset_data, member.size))
        self.left_out = left_out
        return places

    def _final(self, name: str) -> str:
        """Follow links to links."""
        for _ in range(_LINKS_IN_A_ROW):
            if name not in self.links:
                return name
            name = self.links[name][-1].target
        return name

    def _resolved(
        self, line: list[Any], places: Mapping[str, list[tuple[int, int, int]]]
    ) -> object:
        if len(line) == 3:
            return line
        name, number = line
        link = next(each for each in self.links[_plain(name)] if each.number == number)
        found = places.get(self._final(link.target), [])
        if link.is_hard:
            # If several members have one name, a hard link refers to the last one before it.
            found = [place for place in found if place[0] < number] or found
        if not found:
            return name, None, f"image: a link to {link.target}, which is not in the archive"
        return name, *found[-1][1:]


def _link(number: int, member: tarfile.TarInfo) -> _Link:
    if member.islnk():
        return _Link(number, _plain(member.linkname), True)
    target = posixpath.join(posixpath.dirname(member.name), member.linkname)
    return _Link(number, _plain(target), False)


def _plain(name: str) -> str:
    return posixpath.normpath(name).lstrip("/")


def _opener(stream: IO[bytes]) -> Callable[[IO[bytes]], IO[bytes]] | None:
    """Return the reader of a compressed stream; None if the stream is not compressed."""
    magic = stream.read(6)
    stream.seek(0)
    for start, opener in _COMPRESSED:
        if magic.startswith(start):
            return cast(Callable[[IO[bytes]], IO[bytes]], opener)
    return None


@contextmanager
def _open_stream(path: str) -> Iterator[IO[bytes]]:
    """Open an archive, and decompress it if it is compressed."""
    with open_binary(path) as file:
        opener = _opener(file)
        if opener is None:
            yield file
        else:
            with opener(file) as stream:
                yield stream


def _why_unreadable(offset: int | None, size_or_reason: Any) -> ImageError | None:
    """Return the error of a member of the index; None if it can be read."""
    if offset is None:
        return ImageError(size_or_reason)
    try:
        check_size(size_or_reason)
    except ImageError as error:
        return error
    return None


def _next_archive(stream: IO[bytes]) -> int | None:
    """Skip zeros from the stream's position; return the position of the first other byte."""
    while block := stream.read(tarfile.BLOCKSIZE):
        if any(block):
            return stream.tell() - len(block)
    return None


def _copy(stream: IO[bytes], copies: IO[bytes], places: list[list[int]]) -> dict[int, int]:
    """Copy members that links lead to, so that a compressed stream is never read backwards.

    Returns:
        Offsets in `copies` by offsets in `stream`.
    """
    if not isinstance(stream, gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile):
        return {}
    copied: dict[int, int] = {}
    for offset, size in places:
        if _why_unreadable(offset, size):
            continue
        stream.seek(offset)
        copied[offset] = copies.tell()
        copies.write(stream.read(size))
    stream.seek(0)
    return copied


def _zip_lines(
    archive: zipfile.ZipFile, shard: Shard, left_out: Counter[str]
) -> Iterator[tuple[str, int]]:
    for number, member in enumerate(archive.infolist()):
        if member.is_dir():
            continue
        if not member.filename.lower().endswith(IMAGE_SUFFIXES):
            left_out[NO_IMAGE_NAME] += 1
        elif is_in(member.filename, shard):
            yield member.filename, number


def _zip_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes | ImageError:
    try:
        check_size(member.file_size)
        with archive.open(member) as content:
            return content.read(member.file_size)  # decompresses no more than this at once
    except ImageError as error:
        return error
    # Encrypted, damaged, or with an unknown compression: zipfile raises many types.
    except Exception as error:
        return ImageError(f"image: cannot be read from the archive: {error}")
