"""Tar archives of images, as WebDataset and tar itself write them; compressed ones too."""

import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clients.batch.errors import InputError
from clients.batch.listing import IMAGE_SUFFIXES
from clients.batch.rows import Item
from clients.batch.shards import Shard

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


@dataclass(frozen=True, slots=True)
class TarArchive:
    """The image files in a tar, in its order. How many there are is known only at its end."""

    path: Path
    shard: Shard
    total: int | None = None

    def items(self, start: int) -> Iterator[Item]:
        """Yields the images from number `start` on.

        Raises:
            InputError: The archive is damaged or cannot be read.
        """
        number = 0
        try:
            with tarfile.open(self.path, "r:*") as archive:
                while (member := archive.next()) is not None:
                    # tarfile remembers every member that it has seen.
                    archive.members.clear()  # type: ignore[attr-defined]
                    if not self._is_wanted(member):
                        continue
                    number += 1
                    if number > start and (file := archive.extractfile(member)):
                        yield Item(member.name, file.read())
                if not _has_end(archive):
                    raise InputError(f"{self.path}: after {number} images: the archive is cut")
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise InputError(f"{self.path}: after {number} images: {error}") from error

    def _is_wanted(self, member: tarfile.TarInfo) -> bool:
        return (
            member.isreg()
            and member.name.lower().endswith(IMAGE_SUFFIXES)
            and zlib.crc32(member.name.encode("utf-8", "surrogateescape")) % self.shard.count
            == self.shard.index
        )


def _has_end(archive: tarfile.TarFile) -> bool:
    """Whether a block of zeros follows the last member; tarfile takes a cut header for the end."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    return archive.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
