"""Batch inference: a folder of image files in, a table of classes out."""

import csv
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from clients.aio import AsyncClient
from clients.errors import ClientError
from clients.results import Classification

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"})
FIELDS = ("path", "label", "index", "probability", "model", "version", "error")

Row = dict[str, object]


class BatchError(ClientError):
    """The input or the output of a batch job cannot be used."""


@dataclass(frozen=True, slots=True)
class BatchJob:
    """What to classify.

    Attributes:
        folder: Searched for image files, sub-folders included.
        out: Table to write: .jsonl has a list of `classes` beside the first, .csv the first alone.
        in_flight: Requests under way at a time.
    """

    folder: Path
    out: Path
    model: str = ""
    top_k: int = 1
    in_flight: int = 32


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """What a job did; images and the errors among them."""

    images: int
    errors: int


def find_images(folder: Path) -> list[Path]:
    """Returns the image files below a folder, sorted.

    Raises:
        BatchError: There is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise BatchError(f"{folder}: expected a folder of images")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise BatchError(f"{folder}: holds no image ({', '.join(sorted(SUFFIXES))})")
    return found


async def run_batch(
    job: BatchJob, client: AsyncClient, progress: Callable[[int, int], None]
) -> BatchSummary:
    """Classifies every image of a job through a server.

    An image that cannot be classified becomes a row with its error. The table appears when it is
    complete; a job that is stopped leaves none.

    Args:
        job: What to do.
        client: Where to send it.
        progress: Called with the images done and the images in all.

    Raises:
        BatchError: The input or output cannot be used.
    """
    paths = find_images(job.folder)
    errors = 0
    with _table(job.out) as write:
        answers = client.classify_many(
            paths, model=job.model, top_k=job.top_k, in_flight=job.in_flight
        )
        done = 0
        async for answer in answers:
            write(_row(paths[done].relative_to(job.folder), answer))
            errors += isinstance(answer, ClientError)
            done += 1
            progress(done, len(paths))
    return BatchSummary(len(paths), errors)


def _row(path: Path, answer: Classification | ClientError) -> Row:
    if isinstance(answer, ClientError):
        return {**dict.fromkeys(FIELDS), "path": str(path), "error": str(answer), "classes": []}
    best = answer.best
    return {
        "path": str(path),
        "label": best.label,
        "index": best.index,
        "probability": best.probability,
        "model": answer.model,
        "version": answer.version,
        "error": None,
        "classes": [
            {"label": c.label, "index": c.index, "probability": c.probability}
            for c in answer.classes
        ],
    }


@contextmanager
def _table(out: Path) -> Iterator[Callable[[Row], None]]:
    """Gives a function that adds a row; the file takes its name when all rows are in it."""
    make_writer = _WRITERS.get(out.suffix)
    if make_writer is None:
        suffixes = " or ".join(_WRITERS)
        raise BatchError(f"--out: expected a name ending in {suffixes}, got {out.name!r}")
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
    except OSError as error:
        raise BatchError(f"--out: {out}: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            yield make_writer(file)
        os.replace(temporary, out)
    except BaseException:
        os.unlink(temporary)
        raise


def _jsonl_writer(file: TextIO) -> Callable[[Row], None]:
    def write(row: Row) -> None:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")

    return write


def _csv_writer(file: TextIO) -> Callable[[Row], None]:
    writer = csv.DictWriter(file, FIELDS, extrasaction="ignore")
    writer.writeheader()

    def write(row: Row) -> None:
        writer.writerow(row)

    return write


_WRITERS = {".jsonl": _jsonl_writer, ".csv": _csv_writer}
