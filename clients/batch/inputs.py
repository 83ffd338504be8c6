"""What can be classified: a folder, a glob, a list of paths, a tar, a Parquet file, an array."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from clients.batch import archives, listing
from clients.batch.archives import TarArchive
from clients.batch.arrays import ArrayFile
from clients.batch.columns import ParquetColumn
from clients.batch.errors import InputError
from clients.batch.listing import FileList
from clients.batch.rows import Item
from clients.batch.shards import Shard

_GLOB = frozenset("*?[")


class Source(Protocol):
    """Numbered inputs, the same ones in the same order each time."""

    @property
    def total(self) -> int | None:
        """How many there are; None where only reading to the end would tell."""

    def items(self, start: int) -> Iterator[Item]:
        """Yields those from number `start` on, from 0."""


@dataclass(frozen=True, slots=True)
class Input:
    """What a job was asked to read.

    Attributes:
        name: A path or a glob pattern.
        shard: Which of the inputs.
        image_column: Of a Parquet file; empty for the only one.
        key_column: Of a Parquet file; empty for row numbers.
    """

    name: str
    shard: Shard = field(default_factory=Shard)
    image_column: str = ""
    key_column: str = ""

    def state(self) -> dict[str, object]:
        """What tells whether a resumed job reads the same inputs; a folder's list is frozen."""
        where = os.path.abspath(self.name)
        shard = f"{self.shard.index}/{self.shard.count}"
        state: dict[str, object] = {"input": where, "shard": shard}
        if self._kind() in ("tar", "npy", "parquet"):
            found = self._stat()
            state |= {"size_bytes": found.st_size, "modified_ns": found.st_mtime_ns}
            state |= {"image_column": self.image_column, "key_column": self.key_column}
        return state

    def check(self) -> None:
        """Looks whether it is there; what it holds shows when it is opened.

        Raises:
            InputError: Nothing has this name; a pattern is no name.
        """
        if self._kind() != "glob":
            self._stat()

    def open(self, folder: Path) -> Source:
        """Opens it.

        Args:
            folder: Where a list of files is kept, or was left by an earlier run.

        Raises:
            InputError: It is missing, empty, or not what its name says.
        """
        path = Path(self.name)
        match self._kind():
            case "tar":
                return TarArchive(path, self.shard)
            case "npy":
                return ArrayFile.open(path, self.shard)
            case "parquet":
                return ParquetColumn.open(path, self.image_column, self.key_column, self.shard)
            case _:
                return self._file_list(folder / "inputs")

    def _stat(self) -> os.stat_result:
        try:
            return os.stat(self.name)
        except OSError as error:
            raise InputError(f"{self.name}: {error.strerror}") from error

    def _kind(self) -> str:
        path = Path(self.name)
        if path.is_dir():
            return "folder"
        if not path.exists() and _GLOB & set(self.name):
            return "glob"
        if path.name.lower().endswith(archives.SUFFIXES):
            return "tar"
        return {".npy": "npy", ".parquet": "parquet"}.get(path.suffix.lower(), "list")

    def _file_list(self, frozen: Path) -> FileList:
        path, kind = Path(self.name), self._kind()
        root = self.name if kind == "folder" else ""
        if not frozen.exists():
            match kind:
                case "folder":
                    names = listing.names_in_folder(path)
                case "glob":
                    names = listing.names_matching(self.name)
                case _:
                    names = listing.names_in_file(path)
            listing.freeze(names, frozen, self.shard, ordered=kind == "list")
        with frozen.open("rb") as lines:
            total = sum(1 for _ in lines)
        if not total and self.shard.count == 1:
            raise InputError(
                f"{self.name}: holds no image ({', '.join(listing.IMAGE_SUFFIXES)})"
                if kind == "folder"
                else f"{self.name}: expected a folder, a list or a pattern of images, found none"
            )
        return FileList(frozen, total, root)
