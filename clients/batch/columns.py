"""Images in a column of a Parquet file."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.batch.errors import InputError
from clients.batch.extras import needs_extra
from clients.batch.rows import Item
from clients.batch.shards import Shard

_ROWS_AT_ONCE = 256
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "bytes", "content")


@dataclass(frozen=True, slots=True)
class ParquetColumn:
    """Encoded images in a binary column, or in a struct with the field `bytes` (Hugging Face).

    Attributes:
        image: The column's name.
        key: The column whose values become keys; the row's number where it is empty.
        numbers: Rows of this shard.
    """

    path: Path
    image: str
    key: str
    numbers: range

    @classmethod
    def open(cls, path: Path, image: str, key: str, shard: Shard) -> "ParquetColumn":
        """Reads the schema.

        Args:
            path: The file.
            image: The column with the images; empty to take the one that is there.
            key: The column with the keys; empty for row numbers.
            shard: Rows to take.

        Raises:
            InputError: The file or a column is not what it should be.
        """
        with needs_extra("batch", "Parquet"):
            import pyarrow as pa
            import pyarrow.parquet as pq
        try:
            with pq.ParquetFile(path) as file:
                schema, count = file.schema_arrow, file.metadata.num_rows
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path}: {error}") from error
        candidates = [field.name for field in schema if _holds_images(field.type)]
        chosen = image or _likely(candidates)
        if chosen not in candidates:
            raise InputError(
                f"{path}: expected --image-column to name a column of encoded images "
                f"({', '.join(candidates) or 'there is none'}), got {image!r}"
            )
        if key and key not in schema.names:
            raise InputError(
                f"{path}: --key-column: expected one of {', '.join(schema.names)}, got {key!r}"
            )
        return cls(path, chosen, key, shard.of(count))

    @property
    def total(self) -> int:
        """Rows in this shard."""
        return len(self.numbers)

    def items(self, start: int) -> Iterator[Item]:
        """Yields the rows from number `start` of the shard on."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        wanted = self.numbers[start:]
        if not wanted:
            return
        columns = [self.image, self.key] if self.key else [self.image]
        try:
            # Row groups are read as they are needed, not ahead.
            with pq.ParquetFile(self.path, pre_buffer=False) as file:
                groups, number = _row_groups(file.metadata, wanted)
                for batch in file.iter_batches(_ROWS_AT_ONCE, groups, columns, use_threads=False):
                    inside = range(max(wanted.start - number, 0), wanted.stop - number)
                    yield from self._items(batch, number, inside[: batch.num_rows])
                    number += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self.path}: {error}") from error

    def _items(self, batch: Any, first: int, inside: range) -> Iterator[Item]:
        images = batch.column(self.image)
        keys = batch.column(self.key) if self.key else None
        for position in inside:
            if position >= batch.num_rows:
                return
            image = images[position].as_py()
            if isinstance(image, dict):
                image = image["bytes"]
            key = first + position if keys is None else keys[position].as_py()
            # A row without an image has an error like any other that cannot be decoded.
            yield Item(str(key), image or b"")


def _row_groups(metadata: Any, wanted: range) -> tuple[list[int], int]:
    """The row groups that hold any wanted row, and the number of their first row."""
    groups: list[int] = []
    first_row = number = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if number < wanted.stop and number + rows > wanted.start:
            if not groups:
                first_row = number
            groups.append(group)
        number += rows
    return groups, first_row


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    return _is_binary(kind)


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _likely(candidates: list[str]) -> str:
    if len(candidates) == 1:
        return candidates[0]
    return next((name for name in _IMAGE_NAMES if name in candidates), "")
