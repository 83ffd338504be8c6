"""Work on finished tables: classify failed images again, merge shards, evaluate."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from convoy.client.batch.counts import Counts
from convoy.client.batch.errors import InputError, OutputError
from convoy.client.batch.evaluation import Evaluation, evaluate, folder_of
from convoy.client.batch.files import FrozenList
from convoy.client.batch.items import Item, Row, Source, printable
from convoy.client.batch.job import (
    BatchJob,
    Clock,
    Engine,
    Progress,
    Warn,
    classify_into,
    finished,
    run_staged,
    staged,
    write_result,
)
from convoy.client.batch.parts import State, open_parts, parts_path, remove_leftovers, replacing
from convoy.client.batch.store import TableStore, fetch_existing
from convoy.client.batch.summary import (
    BatchSummary,
    InputCounts,
    read_summary,
    summary_path,
    write_summary,
)
from convoy.client.batch.tables import Table, layout_of, table_for, write_rows
from convoy.client.urls import UrlFolder, describe_error, is_url

T = TypeVar("T")

# An image is identified by its key and how many of the same key come before it.
_Place = tuple[str, int]


def retry_errors(
    job: BatchJob,
    engine: Engine,
    progress: Callable[[Progress], None],
    warn: Warn,
    clock: Clock = time.monotonic,
) -> BatchSummary:
    """Classify the images of a finished table that have errors again, and replace their rows.

    The table is replaced when all are done. A job that is killed meanwhile leaves the table as it
    was and OUT.parts; the same command resumes. If the table is not finished, its job is resumed
    first.

    Args:
        job: The job that wrote the table.
        engine: What classifies.
        progress: Called now and then.
        warn: Called with what the operator should know while the job runs.
        clock: Monotonic seconds.

    Raises:
        BatchError: The table was made by another job, or the input has changed.
        ServerError: A server rejects the job as a whole.
    """
    with staged(job) as (here, store):
        return _retry_errors(here, store, engine, progress=progress, warn=warn, clock=clock)


def _retry_errors(
    job: BatchJob,
    store: TableStore | None,
    engine: Engine,
    *,
    progress: Callable[[Progress], None],
    warn: Warn,
    clock: Clock,
) -> BatchSummary:
    state = job.state(engine)
    resumed = _is_retry(job)
    if not resumed and (not job.table.exists() or parts_path(job.table).exists()):
        run_staged(job, store, engine, progress=progress, clock=clock, warn=warn)
    table, classes = table_for(job.table, job.layout), engine.labels()
    version = 0
    if not resumed and (done := finished(job, state)):
        version = done[0].version
    started_s = clock()
    remove_leftovers(job.table)
    retry = {**state, "retry": True}
    with open_parts(job.table, table, retry, overwrite=False, store=store) as parts:
        with parts.explaining_failures():
            source = job.input.open(parts.path)
            chosen = _choose(source, table, job.table, parts.path / "retried")
        if missing := chosen.numbers.facts["missing"]:
            warn(f"--retry-errors: {missing} images with errors are no longer in the input")
        classify_into(parts, job, engine, chosen, progress=progress, clock=clock, version=version)
        # If this was interrupted after the table was replaced, it is replaced by the same again.
        places = set(chosen.places())
        counts = Counts()
        with parts.explaining_failures(), replacing(job.table) as temporary:
            rows = _replaced(table.read(job.table), places, parts.rows())
            write_rows(table, _counted(rows, counts), temporary, parts.path)
        evaluation = evaluate(counts.confusion, classes) if job.evaluate else None
        inputs = InputCounts(source.left_out, source.failures)
        earlier = counts.images - chosen.total
        summary = BatchSummary(counts, earlier, clock() - started_s, evaluation, inputs)
        write_result(summary, state, job, parts)
        parts.finish()
    return summary


def merge_tables(tables: Sequence[Path | str], out: Path | str, *, overwrite: bool) -> BatchSummary:
    """Join the tables of all shards of one job, in order, with one summary.

    Args:
        tables: Paths or URLs.
        out: A path or the URL of an object store.
        overwrite: Replace a table that is there.

    Raises:
        OutputError: A table is not finished, or the tables are not all shards of one job.
    """
    with _on_this_machine(tables) as copies, _published(out) as path:
        return _merge(copies, path, overwrite=overwrite)


def _merge(tables: Sequence[Path], out: Path, *, overwrite: bool) -> BatchSummary:
    if out.exists() and not overwrite:
        raise OutputError(f"--out: {out} exists; use --overwrite")
    shards = sorted((_read_shard(table) for table in tables), key=lambda shard: shard.index)
    _check_complete(shards)
    layout = layout_of(shards[0].table)
    if any(layout_of(shard.table) != layout for shard in shards):
        raise OutputError("merge: the tables have different columns")
    counts = Counts()
    rows = (row for s in shards for row in table_for(s.table, layout).read(s.table))
    with TemporaryDirectory(dir=out.parent, prefix=".merge-") as work, replacing(out) as temporary:
        write_rows(table_for(out, layout), _counted(rows, counts), temporary, Path(work))
    expected = sum(shard.counts.images for shard in shards)
    if counts.images != expected:
        raise OutputError(
            f"merge: expected {expected} rows as in the summaries, got {counts.images}"
        )
    left_out: Counter[str] = Counter()
    # Each shard of a folder or an archive sees the same files that are not images.
    for shard in shards:
        left_out |= Counter(shard.inputs.left_out)
    failures = {name: why for shard in shards for name, why in shard.inputs.failures.items()}
    summary = BatchSummary(counts, 0, 0, None, InputCounts(left_out, failures))
    write_summary(summary, {**shards[0].state, "shard": "0/1"}, out)
    return summary


def evaluate_table(
    table: Path | str, label_column: str, classes: Sequence[str]
) -> tuple[Evaluation, Counts]:
    """Compare a finished table with the true labels.

    Args:
        table: Of a batch job, a path or a URL.
        label_column: The column of true labels; empty for the job's own, or the folders.
        classes: The model's classes; if there are none, the labels in the table.

    Raises:
        BatchError: It is not such a table, or no image has a known label.
    """
    with _on_this_machine([table]) as (path,):
        return _evaluate(path, label_column, classes)


def _evaluate(table: Path, label_column: str, classes: Sequence[str]) -> tuple[Evaluation, Counts]:
    layout = layout_of(table)
    if label_column and label_column not in layout.extra:
        raise InputError(
            f"--label-column: expected one of {', '.join(layout.extra) or 'none'}, "
            f"got {label_column!r}"
        )

    def labeled() -> Iterator[Row]:
        for row in table_for(table, layout).read(table):
            truth = row.true_label if layout.evaluate else folder_of(row.key)
            if label_column and label_column in row.columns:
                truth = str(row.columns[label_column])
            yield replace(row, true_label=truth)

    counts = Counts()
    counts.add(labeled())
    known = list(classes) or sorted({*counts.classes, *(truth for truth, _ in counts.confusion)})
    found = evaluate(counts.confusion, known)
    if found is None:
        raise InputError(f"{table}: no image has a label that is a class of the model")
    return found, counts


@contextmanager
def _on_this_machine(tables: Sequence[Path | str]) -> Iterator[list[Path]]:
    """Yield paths as they are; tables at URLs are copied, with their summaries.

    Raises:
        InputError: One cannot be copied.
    """
    names = [str(table) for table in tables]
    with TemporaryDirectory(prefix="convoy-tables-") as folder:
        paths = [
            Path(folder) / str(number) / Path(name).name if is_url(name) else Path(name)
            for number, name in enumerate(names)
        ]
        for name, path in zip(names, paths, strict=True):
            if is_url(name):
                path.parent.mkdir()
                try:
                    fetch_existing(UrlFolder(name.rpartition("/")[0]), [path, summary_path(path)])
                except OSError as error:
                    raise InputError(f"{name}: {describe_error(error)}") from error
        try:
            yield paths
        except (InputError, OutputError) as error:
            # The user knows the tables by their URLs.
            text = str(error)
            for name, path in zip(names, paths, strict=True):
                text = text.replace(str(path), name)
            raise type(error)(text) from error


@contextmanager
def _published(out: Path | str) -> Iterator[Path]:
    """Yield a path; for a URL, yield a local path and store its file and summary at the end.

    Raises:
        OutputError: The store fails.
    """
    url, _, name = str(out).rpartition("/")
    if not is_url(url):
        yield Path(out)
        return
    store = UrlFolder(url)
    with TemporaryDirectory(prefix="convoy-tables-") as folder:
        path = Path(folder) / name
        try:
            fetch_existing(store, [path])
            yield path
            store.write([summary_path(path), path])
        except OSError as error:
            raise OutputError(f"--out: {out}: {describe_error(error)}") from error
        except OutputError as error:
            raise OutputError(str(error).replace(str(path), str(out))) from error


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Some items of a source.

    Attributes:
        numbers: One line per item: its number, its key and its position among items of that key.
    """

    source: Source
    numbers: FrozenList

    @property
    def total(self) -> int:
        return self.numbers.total

    @property
    def left_out(self) -> Mapping[str, int]:
        return self.source.left_out

    @property
    def failures(self) -> Mapping[str, str]:
        return self.source.failures

    def places(self) -> Iterator[_Place]:
        """Yield the places of the items."""
        return ((key, place) for _, key, place in self.numbers.lines(0))

    def items(self, start: int) -> Iterator[Item]:
        return self._pick(start, self.source.items)

    def keys(self, start: int) -> Iterator[str]:
        return self._pick(start, self.source.keys)

    def columns(self, start: int, names: tuple[str, ...]) -> Iterator[Mapping[str, object]]:
        return self._pick(start, lambda first: self.source.columns(first, names))

    def _pick(self, start: int, read: Callable[[int], Iterator[T]]) -> Iterator[T]:
        wanted = (number for number, *_ in self.numbers.lines(start))
        first = next(wanted, None)
        if first is None:
            return
        values = enumerate(read(first), first)
        for number in (first, *wanted):
            yield next(value for at, value in values if at == number)


def _is_retry(job: BatchJob) -> bool:
    """Tell whether an interrupted retry of this table is to be resumed."""
    return job.table.exists() and (parts_path(job.table) / "retried.json").exists()


def _failed_places(first: Iterator[Row], again: Iterator[Row]) -> list[_Place]:
    """Return the places of rows with errors, in order; memory grows with the errors alone."""
    keys = {row.key for row in first if row.error is not None}
    seen: Counter[str] = Counter()
    places = []
    for row in again:
        if row.key in keys:
            if row.error is not None:
                places.append((row.key, seen[row.key]))
            seen[row.key] += 1
    return places


def _choose(source: Source, table: Table, path: Path, frozen: Path) -> _Chosen:
    """Find the items of rows with errors in the input.

    Args:
        source: The input.
        table: The format of the table.
        path: The table.
        frozen: The list of these items, which is written once.

    Raises:
        InputError: Their order differs from that of the table.
    """
    if (numbers := FrozenList.read(frozen)) is None:
        failed = _failed_places(table.read(path), table.read(path))
        order = {place: number for number, place in enumerate(failed)}
        keys = {key for key, _ in failed}
        seen: Counter[str] = Counter()
        found: list[tuple[int, str, int]] = []
        for number, raw_key in enumerate(source.keys(0)):
            if (key := printable(raw_key)) in keys:
                if (key, seen[key]) in order:
                    found.append((number, key, seen[key]))
                seen[key] += 1
        positions = [order[key, place] for _, key, place in found]
        if positions != sorted(positions):
            raise InputError("--retry-errors: the input's order has changed since the job")
        facts = {"missing": len(failed) - len(found)}
        numbers = FrozenList.write(frozen, found, Counter(), facts)
    return _Chosen(source, numbers)


def _replaced(rows: Iterator[Row], places: set[_Place], new: Iterator[Row]) -> Iterator[Row]:
    """Yield rows with those at the given places replaced, in order."""
    keys = {key for key, _ in places}
    seen: Counter[str] = Counter()
    for row in rows:
        if row.key not in keys:
            yield row
            continue
        place = (row.key, seen[row.key])
        seen[row.key] += 1
        yield next(new) if place in places else row


def _counted(rows: Iterator[Row], counts: Counts) -> Iterator[Row]:
    for row in rows:
        counts.add([row])
        yield row


@dataclass(frozen=True, slots=True)
class _ShardTable:
    table: Path
    state: State
    counts: Counts
    inputs: InputCounts

    @property
    def index(self) -> int:
        return int(str(self.state["shard"]).partition("/")[0])

    @property
    def count(self) -> int:
        return int(str(self.state["shard"]).partition("/")[2])


def _read_shard(table: Path) -> _ShardTable:
    found = read_summary(table)
    if found is None or not table.exists():
        raise OutputError(f"{table}: not finished: {summary_path(table).name} is missing")
    return _ShardTable(table, *found)


def _check_complete(shards: Sequence[_ShardTable]) -> None:
    first = shards[0]
    for shard in shards:
        for name in first.state.keys() | shard.state.keys():
            if name != "shard" and first.state.get(name) != shard.state.get(name):
                raise OutputError(f"merge: {shard.table} differs from {first.table} in {name}")
    expected, got = list(range(first.count)), [shard.index for shard in shards]
    if got != expected or any(shard.count != first.count for shard in shards):
        raise OutputError(f"merge: expected the shards 0 to {first.count - 1}, got {got}")
