"""How rows are written: CSV, JSON Lines or Parquet, by the table's suffix.

JSON Lines and Parquet have the same columns: the most probable class in `label`, `index` and
`probability`, all that were asked for in `labels`, `indices` and `probabilities`. CSV has no lists:
its further classes stand in `label_2`, `index_2`, `probability_2` and so on.
"""

import csv
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from clients.batch.errors import OutputError
from clients.batch.extras import needs_extra
from clients.batch.rows import Row

_BEST = ("label", "index", "probability")
_MERGED_ROWS = 50_000


class Table(Protocol):
    """A format of rows in a file, in parts and as a whole."""

    def write(self, rows: Sequence[Row], path: Path) -> None:
        """Writes a part."""

    def merge(self, parts: Iterable[Path], path: Path) -> None:
        """Writes the whole from its parts, holding a few of them at a time."""


def table_for(out: Path, top_k: int) -> Table:
    """Chooses the format by the suffix.

    Raises:
        OutputError: There is none for it.
        BatchError: Parquet is asked for and pyarrow is missing.
    """
    match out.suffix:
        case ".csv":
            return CsvTable(top_k)
        case ".jsonl":
            return JsonLinesTable()
        case ".parquet":
            with needs_extra("batch", "Parquet"):
                import pyarrow.parquet  # noqa: F401  tells now, not after the first part
            return ParquetTable()
    raise OutputError(
        f"--out: expected a name ending in .csv, .jsonl or .parquet, got {out.name!r}"
    )


@dataclass(frozen=True, slots=True)
class CsvTable:
    """Comma-separated values with a header."""

    top_k: int

    def write(self, rows: Sequence[Row], path: Path) -> None:
        """Writes a part, without the header."""
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(map(self._values, rows))

    def merge(self, parts: Iterable[Path], path: Path) -> None:
        """Writes the header and the parts."""
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow(self._header())
        _append(parts, path)

    def _header(self) -> list[str]:
        more = (f"{name}_{rank}" for rank in range(2, self.top_k + 1) for name in _BEST)
        return ["path", *_BEST, *more, "model", "version", "error"]

    def _values(self, row: Row) -> list[object]:
        values: list[object] = [row.key]
        for values_of_class in zip(row.labels, row.indices, row.probabilities, strict=True):
            values += values_of_class
        values += [None] * (1 + 3 * self.top_k - len(values))
        return [*values, row.model, row.version, row.error]


@dataclass(frozen=True, slots=True)
class JsonLinesTable:
    """One JSON object a line."""

    def write(self, rows: Sequence[Row], path: Path) -> None:
        """Writes a part."""
        encode = json.JSONEncoder(ensure_ascii=False).encode
        with path.open("w", encoding="utf-8", newline="") as file:
            file.writelines(encode(_record(row)) + "\n" for row in rows)

    def merge(self, parts: Iterable[Path], path: Path) -> None:
        """Writes the parts one after the other."""
        path.write_bytes(b"")
        _append(parts, path)


@dataclass(frozen=True, slots=True)
class ParquetTable:
    """Columns, compressed."""

    def write(self, rows: Sequence[Row], path: Path) -> None:
        """Writes a part."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = _schema()
        records = list(map(_record, rows))
        columns = [pa.array([r[f.name] for r in records], f.type) for f in schema]
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), path)

    def merge(self, parts: Iterable[Path], path: Path) -> None:
        """Writes the parts as row groups, small ones joined."""
        import pyarrow.parquet as pq

        with pq.ParquetWriter(path, _schema()) as writer:
            for group in _groups(parts):
                writer.write_table(group)


def _record(row: Row) -> dict[str, object]:
    best = (row.labels[0], row.indices[0], row.probabilities[0]) if row.labels else (None,) * 3
    return {
        "path": row.key,
        **dict(zip(_BEST, best, strict=True)),
        "labels": row.labels,
        "indices": row.indices,
        "probabilities": row.probabilities,
        "model": row.model,
        "version": row.version,
        "error": row.error,
    }


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            ("path", pa.string()),
            ("label", pa.string()),
            ("index", pa.int32()),
            ("probability", pa.float32()),
            ("labels", pa.list_(pa.string())),
            ("indices", pa.list_(pa.int32())),
            ("probabilities", pa.list_(pa.float32())),
            ("model", pa.string()),
            ("version", pa.int32()),
            ("error", pa.string()),
        ]
    )


def _groups(parts: Iterable[Path]) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    waiting: list[Any] = []
    for part in parts:
        waiting.append(pq.read_table(part))
        if sum(table.num_rows for table in waiting) >= _MERGED_ROWS:
            yield pa.concat_tables(waiting)
            waiting.clear()
    if waiting:
        yield pa.concat_tables(waiting)


def _append(parts: Iterable[Path], path: Path) -> None:
    with path.open("ab") as whole:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, whole)
