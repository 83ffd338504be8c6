"""A batch job from start to end: inputs through an engine into a table, each input once."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from clients.batch.engine import Engine
from clients.batch.errors import BatchError, OutputError
from clients.batch.evaluation import draw_confusion, evaluate
from clients.batch.inputs import Input
from clients.batch.parts import PartFolder, State, open_parts, parts_path, remove_leftovers
from clients.batch.rows import Row
from clients.batch.summary import BatchSummary, read_counts, write_summary
from clients.batch.tables import table_for
from clients.batch.tally import Tally

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class PartLimits:
    """When a part is closed. What is not in a closed part is done again after a crash.

    Attributes:
        images: At most so many in a part.
        age_s: A part is closed at the first rows after so many seconds.
    """

    images: int = 10_000
    age_s: float = 10.0


@dataclass(frozen=True, slots=True)
class BatchJob:
    """What to classify and where to write it.

    Attributes:
        input: What to read.
        out: The table; its suffix says the format. A shard adds its number to the name.
        top_k: Classes a row has.
        evaluate: Take the folder an image lies in for its true class, and say how right the
            model is.
        fail_fast: End at the first image that cannot be classified.
        overwrite: Replace a finished table, and throw away another job's unfinished one.
    """

    input: Input
    out: Path
    top_k: int = 1
    evaluate: bool = False
    fail_fast: bool = False
    overwrite: bool = False
    parts: PartLimits = field(default_factory=PartLimits)

    @property
    def table(self) -> Path:
        """The file that this shard writes."""
        return self.input.shard.name(self.out)

    @property
    def confusion_picture(self) -> Path:
        """Where the confusion matrix is drawn."""
        return self.table.with_suffix(".confusion.png")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is.

    Attributes:
        images: Done, those of earlier runs included.
        errors: Among them.
        total: In all; None where that is not known.
    """

    images: int
    errors: int
    total: int | None


def run_batch(
    job: BatchJob,
    engine: Engine,
    progress: Callable[[Progress], None] = lambda _: None,
    clock: Clock = time.monotonic,
) -> BatchSummary:
    """Classifies every input once and writes the table, going on where an earlier run stopped.

    A job that is killed leaves OUT.parts; the same job, run again, goes on from there. The table
    appears when it is complete, and OUT.summary.json beside it.

    Args:
        job: What to do.
        engine: What classifies.
        progress: Called now and then.
        clock: Seconds that only grow.

    Raises:
        BatchError: The job cannot start or go on.
        ServerError: A server refuses the job as a whole.
    """
    table = table_for(job.table, job.top_k)
    inputs = job.input.state()
    classes = engine.labels()
    state: State = {
        **inputs,
        **engine.identity,
        "top_k": job.top_k,
        "evaluate": job.evaluate,
    }
    started_s = clock()
    remove_leftovers(job.table)
    if job.overwrite:
        # A mistyped name shall not cost another job its parts.
        job.input.check()
    elif counts := _finished(job.table, state):
        return BatchSummary(counts, counts.images, 0, evaluate(counts.confusion, classes))
    with open_parts(job.table, table, state, overwrite=job.overwrite) as parts:
        earlier = parts.tally.images
        _classify(job, engine, parts, progress, clock)
        parts.merge()
        evaluation = evaluate(parts.tally.confusion, classes) if job.evaluate else None
        summary = BatchSummary(parts.tally, earlier, clock() - started_s, evaluation)
        with parts.explaining_failures():
            if evaluation:
                draw_confusion(evaluation, job.confusion_picture)
            write_summary(summary, state, job.table)
        parts.remove()
    return summary


def _finished(table: Path, state: State) -> Tally | None:
    """The counts of a table that this same job has already written.

    Raises:
        OutputError: Another job has written it.
    """
    if not table.exists() or parts_path(table).exists():
        return None
    counts = read_counts(state, table)
    if counts is None:
        raise OutputError(f"--out: {table} is there, made by another job; give --overwrite")
    return counts


def _classify(
    job: BatchJob,
    engine: Engine,
    parts: PartFolder,
    progress: Callable[[Progress], None],
    clock: Clock,
) -> None:
    with parts.explaining_failures():
        source = job.input.open(parts.path)
    part = _OpenPart(job, parts, clock)
    with closing(engine.predict(source, parts.tally.images)) as answers:
        for rows in answers:
            part.add(rows)
            progress(Progress(part.images, part.errors, source.total))
    part.close()


class _OpenPart:
    """Rows that wait for their part to be full."""

    def __init__(self, job: BatchJob, parts: PartFolder, clock: Clock) -> None:
        self._job = job
        self._parts = parts
        self._clock = clock
        self._rows: list[Row] = []
        self._tally = Tally()
        self._opened_s = clock()

    @property
    def images(self) -> int:
        """Rows so far, closed parts included."""
        return self._parts.tally.images + self._tally.images

    @property
    def errors(self) -> int:
        """Errors among them."""
        return self._parts.tally.errors + self._tally.errors

    def add(self, rows: list[Row]) -> None:
        """Adds rows; closes the part if it is full or old.

        Raises:
            BatchError: A row has an error and the job is to end there.
        """
        bad = next((row for row in rows if row.error), None) if self._job.fail_fast else None
        if bad:
            rows = rows[: rows.index(bad)]
        self._rows += rows
        self._tally.add(rows, evaluate=self._job.evaluate)
        limits = self._job.parts
        age_s = self._clock() - self._opened_s
        if bad or len(self._rows) >= limits.images or age_s >= limits.age_s:
            self.close()
        if bad:
            raise BatchError(f"{bad.key}: {bad.error}")

    def close(self) -> None:
        """Writes what waits."""
        if self._rows:
            self._parts.append(self._rows, self._tally)
        self._rows, self._tally = [], Tally()
        self._opened_s = self._clock()
