"""Images in a column of a Parquet file."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convoy.client.batch.errors import InputError, needs_extra
from convoy.client.batch.items import Item, Shard
from convoy.client.urls import describe_error, open_binary

_ROWS_AT_ONCE = 256
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "bytes", "content")


@dataclass(frozen=True, slots=True)
class ParquetColumn:
    """Encoded images in a binary column, or in a struct with the field `bytes` (Hugging Face).

    Attributes:
        image: The column's name.
        key: The column whose values become keys; empty for row numbers.
        numbers: The rows of this shard.
    """

    path: str
    image: str
    key: str
    numbers: range

    @classmethod
    def open(cls, path: str, image: str, key: str, shard: Shard) -> "ParquetColumn":
        """Read the schema.

        Args:
            path: The file.
            image: The column with the images; empty if only one fits.
            key: The column with the keys; empty for row numbers.
            shard: The rows to take.

        Raises:
            InputError: The file is not a Parquet file, or a column is missing or has a wrong type.
        """
        with needs_extra("batch", "Parquet"):
            import pyarrow as pa
            import pyarrow.parquet as pq
        try:
            with open_binary(path) as content, pq.ParquetFile(content) as file:
                schema, count = file.schema_arrow, file.metadata.num_rows
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path}: {describe_error(error)}") from error
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
        """The number of rows in this shard."""
        return len(self.numbers)

    @property
    def left_out(self) -> Mapping[str, int]:
        """None."""
        return {}

    @property
    def failures(self) -> Mapping[str, str]:
        """None."""
        return {}

    def items(self, start: int) -> Iterator[Item]:
        """Yield the rows of the shard, from number `start`."""
        names = [self.image, self.key] if self.key else [self.image]
        for number, row in self._rows(start, names):
            image = row[self.image]
            if isinstance(image, dict):
                image = image["bytes"]
            # A row without an image has an error like any other that cannot be decoded.
            yield Item(str(row[self.key]) if self.key else str(number), image or b"")

    def keys(self, start: int) -> Iterator[str]:
        """Yield the values of the key column, or the row numbers."""
        if not self.key:
            return map(str, self.numbers[start:])
        return (str(row[self.key]) for _, row in self._rows(start, [self.key]))

    def columns(self, start: int, names: tuple[str, ...]) -> Iterator[Mapping[str, object]]:
        """Yield the values of other columns; the numbers of Hugging Face's classes as names.

        Raises:
            InputError: There is no such column.
        """
        import pyarrow.parquet as pq

        with open_binary(self.path) as content:
            schema = pq.read_schema(content)
        if missing := [name for name in names if name not in schema.names]:
            raise InputError(
                f"{self.path}: expected columns of {', '.join(schema.names)}, got {missing[0]!r}"
            )
        class_names = _class_names(schema.metadata or {}, names)
        for _, row in self._rows(start, names):
            for name, classes in class_names.items():
                number = row[name]
                if isinstance(number, int) and 0 <= number < len(classes):
                    row[name] = classes[number]
            yield row

    def _rows(self, start: int, names: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield numbers and values of the rows."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        wanted = self.numbers[start:]
        if not wanted:
            return
        try:
            # Row groups are read as they are needed, not ahead.
            with (
                open_binary(self.path) as content,
                pq.ParquetFile(content, pre_buffer=False) as file,
            ):
                groups, number = _row_groups(file.metadata, wanted)
                reading = file.iter_batches(_ROWS_AT_ONCE, groups, list(names), use_threads=False)
                for batch in reading:
                    first = max(wanted.start - number, 0)
                    rows = batch.slice(first, max(0, wanted.stop - number - first))
                    yield from enumerate(_values(rows, names), number + first)
                    number += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self.path}: {describe_error(error)}") from error


def _values(batch: Any, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    columns = [batch.column(name) for name in names]
    for position in range(batch.num_rows):
        # One value at a time: a list of a whole column would hold its images twice.
        yield {name: column[position].as_py() for name, column in zip(names, columns, strict=True)}


def _class_names(metadata: Mapping[bytes, bytes], names: Sequence[str]) -> dict[str, list[str]]:
    """Return the class names that Hugging Face's datasets write beside numbers, by column."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {n: features[n]["names"] for n in names if "names" in features.get(n, {})}
    except (KeyError, TypeError, ValueError):
        return {}


def _row_groups(metadata: Any, wanted: range) -> tuple[list[int], int]:
    """Return the row groups that hold any wanted row, and the number of their first row."""
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
