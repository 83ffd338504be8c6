"""Tables of rows: CSV, JSON Lines or Parquet, by the suffix of the file.

JSON Lines and Parquet have the same columns: the most probable class in `label`, `index` and
`probability`, all requested classes in `labels`, `indices` and `probabilities`. CSV has no lists:
its further classes are in `label_2`, `index_2`, `probability_2` and so on.
"""

import csv
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from convoy.client.batch.errors import OutputError, needs_extra
from convoy.client.batch.items import Row, batched

TRUE_LABEL = "true_label"
_BEST = ("label", "index", "probability")
_LISTS = ("labels", "indices", "probabilities")
_REST = ("model", "version", "error")
RESERVED = frozenset(("path", *_BEST, *_LISTS, *_REST, TRUE_LABEL))
_GROUP_ROWS = 50_000
_READ_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns of a table.

    Attributes:
        top_k: Classes of a row.
        evaluate: Whether there is a column `true_label`.
        columns: Columns that the job passes through from its input.
        outputs: Outputs of the model, lists of float32.
    """

    top_k: int = 1
    evaluate: bool = False
    columns: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        taken = RESERVED.union(self.outputs)
        if found := sorted(taken.intersection(self.columns)):
            raise OutputError(f"--pass-columns: the table has a column {found[0]!r} of its own")
        if found := sorted(RESERVED.intersection(self.outputs)):
            raise OutputError(f"--columns: the table has a column {found[0]!r} of its own")

    @property
    def extra(self) -> tuple[str, ...]:
        """The columns after those that every table has."""
        return (*((TRUE_LABEL,) if self.evaluate else ()), *self.columns, *self.outputs)

    def extra_values(self, row: Row) -> dict[str, object]:
        """Return a row's values of these columns."""
        values = {name: row.columns.get(name) for name in (*self.columns, *self.outputs)}
        return {TRUE_LABEL: row.true_label, **values} if self.evaluate else values


class Table(Protocol):
    """A format of rows in a file, in parts and as a whole."""

    def write(self, rows: Sequence[Row], path: Path) -> None:
        """Write a part."""

    def merge(self, parts: Iterable[Path], path: Path) -> None:
        """Write the whole table from its parts, with a few of them in memory at a time."""

    def read(self, path: Path) -> Iterator[Row]:
        """Yield the rows of a whole table."""

    def read_part(self, path: Path) -> Iterator[Row]:
        """Yield the rows of a part."""


def table_for(out: Path, layout: Layout) -> Table:
    """Choose the format by the suffix.

    Raises:
        OutputError: The suffix is unknown.
        BatchError: The format is Parquet and pyarrow is missing.
    """
    match out.suffix:
        case ".csv":
            if layout.outputs:
                raise OutputError("--columns: CSV has no lists; use .jsonl or .parquet")
            return CsvTable(layout)
        case ".jsonl":
            return JsonLinesTable(layout)
        case ".parquet":
            with needs_extra("batch", "Parquet"):
                import pyarrow.parquet  # noqa: F401  tells now, not after the first part
            return ParquetTable(layout)
    raise OutputError(
        f"--out: expected a name ending in .csv, .jsonl or .parquet, got {out.name!r}"
    )


def layout_of(path: Path) -> Layout:
    """Return the columns of a finished table.

    Raises:
        OutputError: It cannot be read, or is not a table of a batch job.
    """
    try:
        names, top_k = _names(path)
    except (OSError, ValueError, StopIteration) as error:
        raise OutputError(f"{path}: cannot be read: {error}") from error
    if missing := {"path", *_BEST, "error"} - set(names):
        raise OutputError(
            f"{path}: expected a table of a batch job, but it has no {min(missing)!r}"
        )
    further = {f"{name}_{rank}" for rank in range(2, top_k + 1) for name in _BEST}
    columns = tuple(name for name in names if name not in RESERVED | further)
    return Layout(top_k, TRUE_LABEL in names, columns)


def write_rows(table: Table, rows: Iterable[Row], path: Path, work: Path) -> None:
    """Write a whole table from rows.

    Args:
        table: The format.
        rows: Consumed once, a part at a time.
        path: The table.
        work: A folder for its parts.
    """
    parts: list[Path] = []
    for number, part in enumerate(batched(rows, _GROUP_ROWS)):
        parts.append(work / f"whole-{number:08}{path.suffix}")
        table.write(part, parts[-1])
    table.merge(parts, path)


@dataclass(frozen=True, slots=True)
class CsvTable:
    """Comma-separated values with a header."""

    layout: Layout

    def write(self, rows: Sequence[Row], path: Path) -> None:
        """Write a part, without the header."""
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(map(self._values, rows))

    def merge(self, parts: Iterable[Path], path: Path) -> None:
        """Write the header and the parts."""
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow(self._header())
        _append(parts, path)

    def read(self, path: Path) -> Iterator[Row]:
        """Yield the rows after the header."""
        with path.open(encoding="utf-8", newline="") as file:
            yield from map(self._row, csv.DictReader(file))

    def read_part(self, path: Path) -> Iterator[Row]:
        """Yield the rows of a part."""
        with path.open(encoding="utf-8", newline="") as file:
            yield from map(self._row, csv.DictReader(file, self._header()))

    def _header(self) -> list[str]:
        more = (f"{name}_{rank}" for rank in range(2, self.layout.top_k + 1) for name in _BEST)
        return ["path", *_BEST, *more, *_REST, *self.layout.extra]

    def _values(self, row: Row) -> list[object]:
        values: list[object] = [row.key]
        for values_of_class in zip(row.labels, row.indices, row.probabilities, strict=True):
            values += values_of_class
        values += [None] * (1 + 3 * self.layout.top_k - len(values))
        values += (row.model, row.version, row.error)
        if self.layout.extra:
            values += self.layout.extra_values(row).values()
        return values

    def _row(self, record: Mapping[str, str]) -> Row:
        endings = ("", *(f"_{rank}" for rank in range(2, self.layout.top_k + 1)))
        found = [ending for ending in endings if record["index" + ending]]
        return Row(
            record["path"],
            tuple(record["label" + ending] for ending in found),
            tuple(int(record["index" + ending]) for ending in found),
            tuple(float(record["probability" + ending]) for ending in found),
            record["model"] or None,
            int(record["version"]) if record["version"] else None,
            record["error"] or None,
            record.get(TRUE_LABEL) if self.layout.evaluate else None,
            {name: record[name] for name in self.layout.columns},
        )


@dataclass(frozen=True, slots=True)
class JsonLinesTable:
    """One JSON object per line."""

    layout: Layout

    def write(self, rows: Sequence[Row], path: Path) -> None:
        """Write a part."""
        with path.open("w", encoding="utf-8", newline="") as file:
            file.writelines(map(self.line, rows))

    def merge(self, parts: Iterable[Path], path: Path) -> None:
        """Write the parts one after the other."""
        path.write_bytes(b"")
        _append(parts, path)

    def read(self, path: Path) -> Iterator[Row]:
        """Yield the rows."""
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield _row(json.loads(line), self.layout)

    read_part = read

    def line(self, row: Row) -> str:
        """Return a row as a line."""
        return json.dumps(_record(row, self.layout), ensure_ascii=False, default=_plain) + "\n"


@dataclass(frozen=True, slots=True)
class ParquetTable:
    """Columns, compressed."""

    layout: Layout

    def write(self, rows: Sequence[Row], path: Path) -> None:
        """Write a part."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = _schema()
        records = [_record(row, self.layout) for row in rows]
        columns = {f.name: pa.array([r[f.name] for r in records], f.type) for f in schema}
        for name in self.layout.extra:
            kind = pa.list_(pa.float32()) if name in self.layout.outputs else None
            columns[name] = pa.array([record[name] for record in records], kind)
        pq.write_table(pa.table(columns), path)

    def merge(self, parts: Iterable[Path], path: Path) -> None:
        """Write the parts as row groups with statistics, small ones joined."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        paths = list(parts)
        schemas = [pq.read_schema(part) for part in paths] or [self._empty_schema()]
        # A column of the input may be empty in one part and have numbers in the next.
        schema = pa.unify_schemas(schemas, promote_options="permissive")
        with pq.ParquetWriter(path, schema, write_statistics=True) as writer:
            for group in _groups(paths, schema):
                writer.write_table(group)

    def read(self, path: Path) -> Iterator[Row]:
        """Yield the rows."""
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_READ_ROWS):
                for record in batch.to_pylist():
                    yield _row(record, self.layout)

    read_part = read

    def _empty_schema(self) -> Any:
        import pyarrow as pa

        outputs = self.layout.outputs
        extra = [
            (name, pa.list_(pa.float32()) if name in outputs else pa.string())
            for name in self.layout.extra
        ]
        return pa.schema([*_schema(), *extra])


def columns_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Return all columns of rows except `path`, as Arrow arrays by name."""
    import pyarrow as pa

    records = [_record(row, Layout()) for row in rows]
    schema = [field for field in _schema() if field.name != "path"]
    return {f.name: pa.array([record[f.name] for record in records], f.type) for f in schema}


def _record(row: Row, layout: Layout) -> dict[str, object]:
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
        **layout.extra_values(row),
    }


def _row(record: Mapping[str, Any], layout: Layout) -> Row:
    return Row(
        record["path"],
        tuple(record["labels"]),
        tuple(record["indices"]),
        tuple(record["probabilities"]),
        record["model"],
        record["version"],
        record["error"],
        record.get(TRUE_LABEL) if layout.evaluate else None,
        {name: record[name] for name in (*layout.columns, *layout.outputs)},
    )


def _plain(value: object) -> object:
    """Return a value as JSON's types: an output of the model, or a date, bytes and the like."""
    return value.tolist() if isinstance(value, np.ndarray) else str(value)


def _names(path: Path) -> tuple[list[str], int]:
    """Return the names of a table's columns, and how many classes a row may have."""
    match path.suffix:
        case ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                names = next(csv.reader(file))
            return names, sum(name.startswith("index") for name in names)
        case ".jsonl":
            with path.open(encoding="utf-8") as file:
                return list(json.loads(next(file))), 1
        case ".parquet":
            with needs_extra("batch", "Parquet"):
                import pyarrow.parquet as pq
            return list(pq.read_schema(path).names), 1
    raise ValueError("expected a name ending in .csv, .jsonl or .parquet")


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


def _groups(parts: Iterable[Path], schema: Any) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    waiting: list[Any] = []
    for part in parts:
        waiting.append(pq.read_table(part))
        if sum(table.num_rows for table in waiting) >= _GROUP_ROWS:
            yield pa.concat_tables(waiting, promote_options="permissive").cast(schema)
            waiting.clear()
    if waiting:
        yield pa.concat_tables(waiting, promote_options="permissive").cast(schema)


def _append(parts: Iterable[Path], path: Path) -> None:
    with path.open("ab") as whole:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, whole)
