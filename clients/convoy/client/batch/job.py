"""A batch job from start to end: inputs through an engine into a table, each input once."""

import contextlib
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, TextIO

from convoy.client.batch.counts import Counts
from convoy.client.batch.errors import BatchError, InputError, OutputError
from convoy.client.batch.evaluation import (
    check_labels,
    draw_confusion,
    evaluate,
    folder_of,
)
from convoy.client.batch.inputs import Input
from convoy.client.batch.items import Row, Source
from convoy.client.batch.parts import PartFolder, State, open_parts, parts_path, remove_leftovers
from convoy.client.batch.store import TableStore
from convoy.client.batch.summary import (
    BatchSummary,
    InputCounts,
    read_summary,
    summary_path,
    write_summary,
)
from convoy.client.batch.tables import JsonLinesTable, Layout, table_for
from convoy.client.urls import describe_error, is_url

Clock = Callable[[], float]
Warn = Callable[[str], None]

_log = logging.getLogger(__name__)


class Engine(Protocol):
    """Turns the items of a source into rows."""

    @property
    def identity(self) -> Mapping[str, object]:
        """A JSON value that changes if a resumed job would get other predictions."""

    def labels(self) -> list[str]:
        """Return the model's classes, in the order of its outputs.

        Raises:
            BatchError: There is no such model.
            ServerError: The server cannot be asked.
        """

    def predict(self, source: Source, start: int, version: int = 0) -> Generator[list[Row]]:
        """Yield the rows of the items from number `start` on, in their order.

        An item that cannot be classified yields a row with its error. Items are taken as they are
        needed, a bounded number ahead.

        Args:
            source: The input.
            start: The number of the first item.
            version: The model's version that answered for the items before, 0 if there is none. An
                engine that is not bound to a version asks for this one as long as it is served.

        Raises:
            BatchError: The job cannot continue.
        """


@dataclass(frozen=True, slots=True)
class PartLimits:
    """When a part is written. A killed job repeats the images that are not in a part.

    Attributes:
        images: The most images in a part.
        age_s: A part that is older than this is written with the next rows.
    """

    images: int = 10_000
    age_s: float = 10.0


@dataclass(frozen=True, slots=True)
class BatchJob:
    """What to classify and where to write it.

    Attributes:
        input: What to read.
        out: The table, a path or the URL of an object store; its suffix chooses the format. A
            shard adds its number to the name.
        top_k: Classes of a row.
        evaluate: Compare the answers with the true labels.
        label_column: The column of true labels; empty for the name of the image's folder.
        columns: Columns of the input to pass through to the table.
        outputs: Outputs of the model to write to the table; the engine must return them.
        fail_fast: End at the first image that cannot be classified.
        overwrite: Replace a finished table, and discard another job's unfinished one.
    """

    input: Input
    out: Path | str
    top_k: int = 1
    evaluate: bool = False
    fail_fast: bool = False
    overwrite: bool = False
    parts: PartLimits = field(default_factory=PartLimits)
    label_column: str = ""
    columns: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The path or URL of the table that this shard writes."""
        folder, slash, name = str(self.out).rpartition("/")
        return f"{folder}{slash}{self.input.shard.name(Path(name))}"

    @property
    def table(self) -> Path:
        """The path of the table on this machine."""
        return Path(self.name)

    @property
    def layout(self) -> Layout:
        """The columns of the table."""
        return Layout(self.top_k, self.evaluate, self.columns, self.outputs)

    @property
    def confusion_plot(self) -> Path:
        """Where the confusion matrix is drawn."""
        return self.table.with_suffix(".confusion.png")

    def state(self, engine: Engine) -> State:
        """Return the properties that identify this job."""
        return {
            **self.input.state(),
            **engine.identity,
            "top_k": self.top_k,
            "evaluate": self.evaluate,
            "label_column": self.label_column,
            "columns": list(self.columns),
            "outputs": list(self.outputs),
        }


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a job.

    Attributes:
        images: Images done, including those of earlier runs.
        errors: How many of them failed.
        total: All images of the job.
    """

    images: int
    errors: int
    total: int


def run_batch(
    job: BatchJob,
    engine: Engine,
    progress: Callable[[Progress], None] = lambda _: None,
    clock: Clock = time.monotonic,
    *,
    warn: Warn = _log.warning,
) -> BatchSummary:
    """Classify every input once and write the table; resume where an earlier run stopped.

    A job that is killed leaves OUT.parts; the same job, run again, resumes from there. The table
    appears when it is complete, and OUT.summary.json beside it.

    Args:
        job: What to do.
        engine: What classifies.
        progress: Called now and then.
        clock: Monotonic seconds.
        warn: Called with what the operator should know while the job runs.

    Raises:
        BatchError: The job cannot start or continue.
        ServerError: A server rejects the job as a whole.
    """
    with staged(job) as (here, store):
        return run_staged(here, store, engine, progress=progress, clock=clock, warn=warn)


@contextmanager
def staged(job: BatchJob) -> Iterator[tuple[BatchJob, TableStore | None]]:
    """Yield a job; if its table is at a URL, with a copy on this machine, and the store.

    Raises:
        OutputError: The format is unknown, or the store fails.
    """
    url, _, name = str(job.out).rpartition("/")
    if not is_url(url):
        yield job, None
        return
    table_for(Path(name), job.layout)
    with TemporaryDirectory(prefix="convoy-batch-") as folder:
        here = replace(job, out=Path(folder) / name)
        store = TableStore(url, here.table, parts_path(here.table))
        try:
            store.fetch([] if job.overwrite else [summary_path(here.table), here.table])
            yield here, store
        except OSError as error:
            raise OutputError(f"--out: {job.name}: {describe_error(error)}") from error
        except OutputError as error:
            # The user knows the table by its URL.
            raise OutputError(str(error).replace(folder, url)) from error


def run_staged(
    job: BatchJob,
    store: TableStore | None,
    engine: Engine,
    *,
    progress: Callable[[Progress], None],
    clock: Clock,
    warn: Warn,
) -> BatchSummary:
    """Run a job whose table is written on this machine, see `run_batch`."""
    table = table_for(job.table, job.layout)
    state = job.state(engine)
    classes = engine.labels()
    started_s = clock()
    remove_leftovers(job.table)
    if job.overwrite:
        # A mistyped name must not cost another job its parts.
        job.input.check()
    elif done := finished(job, state):
        if store:
            store.remove_leftovers()
        counts, inputs = done
        evaluation = evaluate(counts.confusion, classes) if job.evaluate else None
        return BatchSummary(counts, counts.images, 0, evaluation, inputs)
    with open_parts(job.table, table, state, overwrite=job.overwrite, store=store) as parts:
        earlier = parts.counts.images
        with parts.explaining_failures():
            source = job.input.open(parts.path)
        check_truths(job, source, classes, warn)
        classify_into(parts, job, engine, source, progress=progress, clock=clock)
        parts.merge()
        inputs = InputCounts(source.left_out, source.failures)
        evaluation = evaluate(parts.counts.confusion, classes) if job.evaluate else None
        seconds = clock() - started_s
        summary = BatchSummary(parts.counts, earlier, seconds, evaluation, inputs)
        write_result(summary, state, job, parts)
        parts.finish()
    return summary


def stream_batch(
    job: BatchJob,
    engine: Engine,
    out: TextIO,
    progress: Callable[[Progress], None] = lambda _: None,
    clock: Clock = time.monotonic,
    *,
    warn: Warn = _log.warning,
) -> BatchSummary:
    """Classify every input once and write JSON Lines as the answers come; nothing can be resumed.

    Args:
        job: What to do; its table is not written.
        engine: What classifies.
        out: Gets a line a row, flushed after each batch.
        progress: Called now and then.
        clock: Monotonic seconds.
        warn: Called with what the operator should know while the job runs.

    Raises:
        BatchError: The job cannot start or continue.
        ServerError: A server rejects the job as a whole.
    """
    table = JsonLinesTable(job.layout)
    classes = engine.labels()
    started_s = clock()
    counts = Counts()
    with TemporaryDirectory(prefix="convoy-batch-") as folder:
        source = job.input.open(Path(folder))
        check_truths(job, source, classes, warn)
        with closing(_labeled(job, source, 0, engine.predict(source, 0))) as answers:
            for rows in answers:
                counts.add(rows)
                out.writelines(map(table.line, rows))
                out.flush()
                progress(Progress(counts.images, counts.errors, source.total))
                if job.fail_fast and (bad := next((row for row in rows if row.error), None)):
                    raise BatchError(f"{bad.key}: {bad.error}")
        inputs = InputCounts(source.left_out, source.failures)
    evaluation = evaluate(counts.confusion, classes) if job.evaluate else None
    return BatchSummary(counts, 0, clock() - started_s, evaluation, inputs)


def finished(job: BatchJob, state: State) -> tuple[Counts, InputCounts] | None:
    """Return the summary of the table if this same job has already written it.

    Raises:
        OutputError: Another job has written it.
    """
    if not job.table.exists() or parts_path(job.table).exists():
        return None
    found = read_summary(job.table)
    if found is None or found[0] != state:
        raise OutputError(f"--out: {job.table} exists, written by another job; use --overwrite")
    return found[1:]


def check_truths(job: BatchJob, source: Source, classes: list[str], warn: Warn) -> None:
    """Check true labels and passed columns before anything is classified.

    Raises:
        InputError: There is no such column, or no label is a class.
    """
    if job.columns and source.total:
        next(iter(source.columns(0, job.columns)))
    if not job.evaluate or not source.total:
        return
    unknown = check_labels(source, job.label_column, classes)
    if unknown:
        shown = ", ".join(f"{label or 'none'} ({count})" for label, count in unknown.items())
        warn(f"--evaluate: images whose label is not a class of the model are left out: {shown}")


def classify_into(
    parts: PartFolder,
    job: BatchJob,
    engine: Engine,
    source: Source,
    *,
    progress: Callable[[Progress], None],
    clock: Clock,
    version: int = 0,
) -> None:
    """Classify the images that are not in the parts; an interruption keeps the rows so far.

    The engine is asked for `version`, or else for the version of the rows in the parts.
    """
    part = _OpenPart(job, parts, clock)
    start = parts.counts.images
    predicted = engine.predict(source, start, version or parts.counts.version)
    try:
        with closing(_labeled(job, source, start, predicted)) as answers:
            for rows in answers:
                part.add(rows)
                progress(Progress(part.images, part.errors, source.total))
    except OutputError:
        raise
    except BaseException:  # also after an interrupt or a signal: the rows so far are kept
        with contextlib.suppress(OutputError):
            part.close(recount=True)
        raise
    part.close()
    if parts.counts.images != source.total:
        raise InputError(
            f"the input has {source.total} images, but {parts.counts.images} were classified"
        )


def write_result(summary: BatchSummary, state: State, job: BatchJob, parts: PartFolder) -> None:
    """Write the files beside the table."""
    with parts.explaining_failures():
        if summary.evaluation:
            draw_confusion(summary.evaluation, job.confusion_plot)
        write_summary(summary, state, job.table)


def _labeled(
    job: BatchJob, source: Source, start: int, answers: Generator[list[Row]]
) -> Generator[list[Row]]:
    """Add true labels and the input's columns to rows."""
    names = (*job.columns, *((job.label_column,) if job.evaluate and job.label_column else ()))
    columns = source.columns(start, names) if names else None
    keys = source.keys(start) if job.evaluate and not job.label_column else None
    with closing(answers):
        for rows in answers:
            if columns is not None or keys is not None:
                rows = [_with_columns(job, row, columns, keys) for row in rows]  # noqa: PLW2901
            yield rows


def _with_columns(
    job: BatchJob,
    row: Row,
    columns: Iterator[Mapping[str, object]] | None,
    keys: Iterator[str] | None,
) -> Row:
    values = next(columns) if columns is not None else {}
    truth = None
    if job.evaluate:
        truth = folder_of(next(keys)) if keys is not None else str(values.get(job.label_column))
    passed = {name: values.get(name) for name in job.columns}
    return replace(row, true_label=truth, columns={**row.columns, **passed})


class _OpenPart:
    """Rows that wait until their part is full."""

    def __init__(self, job: BatchJob, parts: PartFolder, clock: Clock) -> None:
        self._job = job
        self._parts = parts
        self._clock = clock
        self._rows: list[Row] = []
        self._counts = Counts()
        self._opened_s = clock()

    @property
    def images(self) -> int:
        """Rows so far, including those of written parts."""
        return self._parts.counts.images + self._counts.images

    @property
    def errors(self) -> int:
        """How many of the rows have errors."""
        return self._parts.counts.errors + self._counts.errors

    def add(self, rows: list[Row]) -> None:
        """Add rows; write the part if it is full or old.

        Raises:
            BatchError: A row has an error, and the job is to stop at the first one.
        """
        bad = next((row for row in rows if row.error), None) if self._job.fail_fast else None
        if bad:
            rows = rows[: rows.index(bad)]
        self._rows += rows
        self._counts.add(rows)
        limits = self._job.parts
        age_s = self._clock() - self._opened_s
        if bad or len(self._rows) >= limits.images or age_s >= limits.age_s:
            self.close()
        if bad:
            raise BatchError(f"{bad.key}: {bad.error}")

    def close(self, *, recount: bool = False) -> None:
        """Write the waiting rows.

        Args:
            recount: Count the rows again; an interrupt may have come while they were counted.
        """
        rows, counts = self._rows, self._counts
        if recount:
            counts = Counts()
            counts.add(rows)
        # An interrupt while the part is written must not make it be written twice.
        self._rows, self._counts = [], Counts()
        if rows:
            self._parts.append(rows, counts)
        self._opened_s = self._clock()
