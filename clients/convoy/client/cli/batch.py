"""`batch`, `merge` and `evaluate`: many images to a table of classes, and work on such tables."""

import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from convoy.client.batch.calls import RemoteModel
from convoy.client.batch.errors import BatchError, needs_extra
from convoy.client.batch.evaluation import Evaluation, draw_confusion
from convoy.client.batch.finished import evaluate_table, merge_tables, retry_errors
from convoy.client.batch.inputs import Input
from convoy.client.batch.items import Shard
from convoy.client.batch.job import BatchJob, Engine, PartLimits, run_batch, stream_batch
from convoy.client.batch.local import LocalEngine, LocalModel, Predictor
from convoy.client.batch.remote import GrpcEngine
from convoy.client.batch.summary import BatchSummary, ErrorLimit
from convoy.client.cli.options import INTERRUPTED, TERMINATED, Model, TopK, complain
from convoy.client.cli.progress import show_progress
from convoy.client.urls import shown

TOO_MANY_ERRORS = 3
STDOUT = "-"
_SHOWN_CLASSES = 20


class EngineName(StrEnum):
    """What classifies."""

    GRPC = "grpc"
    LOCAL = "local"
    RAY = "ray"


def batch(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Paths or URLs (s3://, gs://, https://) of folders of images or of Parquet "
            "files, glob patterns in quotes, lists of paths, .tar (also compressed), .zip, "
            ".parquet with an image column, .npy uint8 [N, H, W, 3]. Braces as in "
            "'shard-{0000..0099}.tar' are expanded.",
        ),
    ],
    *,
    out: Annotated[
        str,
        typer.Option(
            help="Table to write, a path or a URL such as s3://BUCKET/OUT.parquet: .csv, .jsonl or "
            ".parquet; '-' for JSON Lines to stdout, which cannot be resumed.",
            show_default=False,
        ),
    ],
    engine: Annotated[
        EngineName,
        typer.Option(
            help="grpc: through a server. local: ONNX Runtime in this process. ray: on a cluster."
        ),
    ] = EngineName.GRPC,
    model: Model = "",
    version: Annotated[
        int,
        typer.Option(
            help="The model's version; 0 for the one in service when the job starts.", min=0
        ),
    ] = 0,
    top_k: TopK = 1,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate",
            help="Compare with the true label, which is the name of the image's folder: report "
            "accuracies, and draw a confusion matrix to OUT's name with .confusion.png.",
        ),
    ] = False,
    label_column: Annotated[
        str, typer.Option(help="With --evaluate: the Parquet column of true labels.")
    ] = "",
    pass_columns: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME", help="Columns of the Parquet input to copy to the table."
        ),
    ] = "",
    columns: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME",
            help="Outputs of the model to add as lists, for example logits; .jsonl or .parquet.",
        ),
    ] = "",
    shard: Annotated[
        str,
        typer.Option(
            metavar="I/N", help="Classify one of N disjoint parts of the inputs, I from 0 to N-1."
        ),
    ] = "0/1",
    max_errors: Annotated[
        str,
        typer.Option(
            metavar="N|SHARE",
            help="Exit with 3 if more images fail: a number, a share (0.1) or a percentage (10%).",
        ),
    ] = "10%",
    fail_fast: Annotated[
        bool, typer.Option("--fail-fast", help="Stop at the first image that fails.")
    ] = False,
    retry_errors: Annotated[
        bool,
        typer.Option(
            "--retry-errors",
            help="Classify those images of a finished table again that have errors.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a table that another job has written.")
    ] = False,
    image_column: Annotated[
        str, typer.Option(help="Parquet: the column of images, if more than one fits.")
    ] = "",
    key_column: Annotated[
        str, typer.Option(help="Parquet: the column for `path`; by default the row number.")
    ] = "",
    part_size: Annotated[
        int,
        typer.Option(help="Images that are saved together; a crash loses at most these.", min=1),
    ] = PartLimits().images,
    address: Annotated[
        str | None,
        typer.Option(
            envvar="CONVOY_ADDRESS",
            help="grpc: the server, HOST:PORT; HOST:PORT,HOST:PORT or dns:///NAME:PORT for "
            "several. ray: the cluster, else RAY_ADDRESS.",
            show_default=False,
        ),
    ] = None,
    in_flight: Annotated[
        int,
        typer.Option(
            help="grpc: largest number of images in flight; lowered while the server rejects some.",
            min=1,
        ),
    ] = 512,
    timeout_s: Annotated[
        float, typer.Option(help="grpc: the deadline of a request, in seconds.", min=0.001)
    ] = 30.0,
    patience_s: Annotated[
        float,
        typer.Option(help="grpc: seconds without any answer after which the job ends.", min=0),
    ] = 300.0,
    repository: Annotated[
        Path,
        typer.Option(help="local, ray: the model repository, or the folder of one version."),
    ] = Path("models"),
    device: Annotated[
        str,
        typer.Option(help="local, ray: cpu, cuda or cuda:INDEX; fails if it is unavailable."),
    ] = "cpu",
    batch_size: Annotated[
        int, typer.Option(help="local, ray: images in a run of the model.", min=1)
    ] = 64,
    decoders: Annotated[
        int, typer.Option(help="local: threads that decode; 0 for one per processor.", min=0)
    ] = 0,
) -> None:
    """Classify many images; one that fails becomes a row with its error.

    A job that was stopped or killed resumes when the same command is run again.
    """
    limit = ErrorLimit.parse(max_errors)
    outputs = _names(columns)
    job = BatchJob(
        Input(tuple(inputs), Shard.parse(shard), image_column, key_column),
        out,
        top_k=top_k,
        evaluate=evaluate,
        label_column=label_column,
        columns=_names(pass_columns),
        outputs=outputs,
        fail_fast=fail_fast,
        overwrite=overwrite,
        parts=PartLimits(images=part_size),
    )
    local = LocalModel(repository, model, version, device)
    chosen: Engine
    match engine:
        case EngineName.GRPC:
            remote = RemoteModel(
                address, model, version, top_k, timeout_s, in_flight, patience_s, outputs
            )
            chosen = GrpcEngine(remote)
        case EngineName.LOCAL:
            chosen = LocalEngine(Predictor(local, top_k, outputs), batch_size, decoders)
        case EngineName.RAY:
            with needs_extra("ray", "the ray engine"):
                from convoy.client.batch.cluster import Cluster, RayEngine
            cluster = Cluster(address or "auto")
            chosen = RayEngine(cluster, local, top_k, batch_size, outputs=outputs)
    _finish(job, _run(job, chosen, retry=retry_errors), limit)


def merge(
    tables: Annotated[
        list[str],
        typer.Argument(metavar="TABLE...", help="The tables of all shards of one job."),
    ],
    *,
    out: Annotated[
        str, typer.Option(help="Table to write: .csv, .jsonl or .parquet.", show_default=False)
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Join the tables of all shards of a batch job, with one summary."""
    _show_summary(out, merge_tables(tables, out, overwrite=overwrite))


def evaluate(
    table: Annotated[str, typer.Argument(metavar="TABLE", help="A table of a batch job.")],
    *,
    label_column: Annotated[
        str,
        typer.Option(
            help="The column of true labels; by default true_label, if the job evaluated, else the "
            "folder in path."
        ),
    ] = "",
    labels: Annotated[
        Path | None,
        typer.Option(
            help="File with the model's classes, one per line; by default the labels in the table.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Confusion matrix to draw, .png.", show_default=False),
    ] = None,
) -> None:
    """Compare a finished table with the true labels."""
    try:
        classes = labels.read_text(encoding="utf-8").splitlines() if labels else []
    except (OSError, UnicodeDecodeError) as error:
        raise BatchError(f"--labels: {labels}: {error}") from error
    found, counts = evaluate_table(table, label_column, classes)
    print(f"{shown(table)}: {counts.images} images, {counts.errors} errors")
    _show_classes(counts.classes, found)
    _show_accuracy(found, counts.failed)
    if plot:
        draw_confusion(found, plot)


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _run(job: BatchJob, engine: Engine, *, retry: bool) -> BatchSummary:
    with _sigterm_interrupts() as terminated:
        try:
            with show_progress(Console(stderr=True)) as show:
                if job.out == STDOUT:
                    if retry or job.input.shard.count > 1:
                        raise BatchError("--out -: expected neither --retry-errors nor --shard")
                    return stream_batch(job, engine, sys.stdout, show, warn=complain)
                if retry:
                    return retry_errors(job, engine, show, complain)
                return run_batch(job, engine, show, warn=complain)
        except KeyboardInterrupt:
            resume = "" if job.out == STDOUT else "; the same command resumes"
            complain(("terminated" if terminated else "interrupted") + resume)
            raise typer.Exit(TERMINATED if terminated else INTERRUPTED) from None


@dataclass(slots=True)
class _Terminated:
    """Whether SIGTERM came."""

    by_signal: bool = False

    def __bool__(self) -> bool:
        return self.by_signal


@contextmanager
def _sigterm_interrupts() -> Iterator[_Terminated]:
    """Make SIGTERM end the block as Ctrl-C does, so that the current part is written."""
    terminated = _Terminated()

    def interrupt(*_: object) -> None:
        terminated.by_signal = True
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, before)


def _finish(job: BatchJob, summary: BatchSummary, limit: ErrorLimit) -> None:
    """Report a finished job.

    Raises:
        Exit: Too many images failed, or a whole input.
    """
    to_stdout = job.out == STDOUT
    _show_summary(STDOUT if to_stdout else job.name, summary, quiet=to_stdout)
    counts, inputs = summary.counts, summary.inputs
    for name, reason in inputs.failures.items():
        complain(f"input {name} failed: {reason.removeprefix(f'{name}: ')}")
    if counts.errors:
        reason, times = counts.reasons.most_common(1)[0]
        complain(
            f"{counts.errors} of {counts.images} images failed; the most common reason, {times} "
            f"times: {reason}"
        )
    if len(counts.versions) > 1:
        shown = ", ".join(f"{name} ({count})" for name, count in counts.versions.most_common())
        complain(
            f"several model versions answered: {shown}; with --version N the job waits instead"
        )
    if limit.is_exceeded(counts) or inputs.failures:
        raise typer.Exit(TOO_MANY_ERRORS)


def _show_summary(name: str, summary: BatchSummary, *, quiet: bool = False) -> None:
    """Print a summary; to stderr and short if rows went to stdout."""
    counts, evaluation = summary.counts, summary.evaluation
    left_out = sum(summary.inputs.left_out.values())
    line = (
        f"{shown(name)}: {counts.images} images, {counts.errors} errors"
        + (f", {summary.earlier} from earlier runs" if summary.earlier else "")
        + (f", {summary.images_per_s:.0f} images/s" if summary.images_per_s else "")
    )
    if left_out:
        reasons = (f"{n} {reason}" for reason, n in sorted(summary.inputs.left_out.items()))
        line += f"; {left_out} left out: {', '.join(reasons)}"
    print(line, file=sys.stderr if quiet else sys.stdout)
    if quiet:
        return
    _show_classes(summary.classes, evaluation)
    if evaluation:
        _show_accuracy(evaluation, counts.failed)


def _show_classes(predicted: Mapping[str, int], evaluation: Evaluation | None) -> None:
    columns = ("class", "predicted", "true", "accuracy") if evaluation else ("class", "images")
    shown = Table(*columns)
    names = list(predicted)
    if evaluation:
        names += [name for name in evaluation.images_per_class if name not in predicted]
    for name in names[:_SHOWN_CLASSES]:
        cells = [name, str(predicted.get(name, 0))]
        if evaluation:
            accuracy = evaluation.per_class.get(name)
            cells.append(str(evaluation.images_per_class.get(name, 0)))
            cells.append("-" if accuracy is None else f"{accuracy:.2%}")
        shown.add_row(*cells)
    if names:
        Console().print(shown)
    if len(names) > _SHOWN_CLASSES:
        print(f"and {len(names) - _SHOWN_CLASSES} more classes")


def _show_accuracy(evaluation: Evaluation, failed: list[str]) -> None:
    line = f"accuracy {evaluation.accuracy:.4f} over {evaluation.images} images"
    if evaluation.errors:
        line += (
            f", {evaluation.accuracy_of_classified:.4f} without the {evaluation.errors} that failed"
        )
    if left_out := sum(evaluation.left_out.values()):
        line += f"; {left_out} with other labels left out"
    print(line)
    if evaluation.errors:
        more = ", …" if evaluation.errors > len(failed) else ""
        print(f"failed: {', '.join(failed)}{more}")
