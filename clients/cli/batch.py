"""`batch`: many images to a table of classes."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from clients.batch.calls import RemoteModel
from clients.batch.engine import Engine
from clients.batch.extras import needs_extra
from clients.batch.inputs import Input
from clients.batch.job import BatchJob, PartLimits, run_batch
from clients.batch.local import LocalEngine
from clients.batch.predictor import LocalModel, Predictor
from clients.batch.remote import GrpcEngine
from clients.batch.shards import Shard
from clients.batch.summary import BatchSummary
from clients.cli.options import INTERRUPTED, Model, TopK, complain
from clients.cli.progress import progress_bar

_SHOWN_CLASSES = 20


class EngineName(StrEnum):
    """What classifies."""

    GRPC = "grpc"
    LOCAL = "local"
    RAY = "ray"


def batch(
    inputs: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A folder of images, a glob pattern in quotes, a list of paths, a tar (also "
            "compressed), a .parquet with an image column, or a .npy uint8 [N, H, W, 3].",
        ),
    ],
    *,
    out: Annotated[
        Path,
        typer.Option(help="Table to write: .csv, .jsonl or .parquet.", show_default=False),
    ],
    engine: Annotated[
        EngineName,
        typer.Option(
            help="grpc: through a server. local: ONNX Runtime in this process. ray: on a cluster."
        ),
    ] = EngineName.GRPC,
    model: Model = "",
    version: Annotated[
        int, typer.Option(help="The model's version; 0 for the one in service.", min=0)
    ] = 0,
    top_k: TopK = 1,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate",
            help="The folder that an image lies in is its true class: give accuracies, and a "
            "confusion matrix as OUT's name with .confusion.png.",
        ),
    ] = False,
    shard: Annotated[
        str,
        typer.Option(
            metavar="I/N", help="Do one of N disjoint shares of the inputs, I from 0 to N-1."
        ),
    ] = "0/1",
    fail_fast: Annotated[
        bool, typer.Option("--fail-fast", help="End at the first bad image; no row for it.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a table that another job has made.")
    ] = False,
    image_column: Annotated[
        str, typer.Option(help="Of a .parquet: the images; may be left out where one only fits.")
    ] = "",
    key_column: Annotated[
        str, typer.Option(help="Of a .parquet: what the rows are called; else their number.")
    ] = "",
    part_size: Annotated[
        int,
        typer.Option(help="Images that are saved together; a crash loses no more.", min=1),
    ] = PartLimits().images,
    address: Annotated[
        str | None,
        typer.Option(
            help="grpc: the server, else CONVOY_ADDRESS or port 8001 here; IP:PORT,IP:PORT or "
            "dns:///NAME:PORT for several. ray: the cluster, else RAY_ADDRESS.",
            show_default=False,
        ),
    ] = None,
    in_flight: Annotated[
        int, typer.Option(help="grpc: requests under way, fewer if the server refuses.", min=1)
    ] = 256,
    timeout_s: Annotated[
        float, typer.Option(help="grpc: seconds that a request may take.", min=0.001)
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
        str, typer.Option(help="local, ray: cpu, cuda or cuda:INDEX; never another one.")
    ] = "cpu",
    batch_size: Annotated[
        int, typer.Option(help="local, ray: images in a run of the model.", min=1)
    ] = 64,
    decoders: Annotated[
        int, typer.Option(help="local: threads that decode; 0 for one a processor.", min=0)
    ] = 0,
) -> None:
    """Classifies many images; a bad one becomes a row with its error.

    A job that was stopped or killed goes on where it was when it is run again.
    """
    job = BatchJob(
        Input(inputs, Shard.parse(shard), image_column, key_column),
        out,
        top_k,
        evaluate,
        fail_fast,
        overwrite,
        PartLimits(images=part_size),
    )
    local = LocalModel(repository, model, version, device)
    chosen: Engine
    match engine:
        case EngineName.GRPC:
            remote = RemoteModel(address, model, version, top_k, timeout_s, in_flight, patience_s)
            chosen = GrpcEngine(remote)
        case EngineName.LOCAL:
            chosen = LocalEngine(Predictor(local, top_k), batch_size, decoders)
        case EngineName.RAY:
            with needs_extra("ray", "the ray engine"):
                from clients.batch.cluster import Cluster, RayEngine
            chosen = RayEngine(Cluster(address or "auto"), local, top_k, batch_size)
    try:
        with progress_bar(Console(stderr=True)) as show:
            summary = run_batch(job, chosen, show)
    except KeyboardInterrupt:
        complain("interrupted; the same command goes on where it was")
        raise typer.Exit(INTERRUPTED) from None
    _show_summary(job.table, summary)
    if job.evaluate and not summary.evaluation:
        complain("--evaluate: no image lies in a folder that is named like a class")
        raise typer.Exit(1)


def _show_summary(table: Path, summary: BatchSummary) -> None:
    print(
        f"{table}: {summary.counts.images} images, {summary.counts.errors} errors"
        + (f", {summary.earlier} done earlier" if summary.earlier else "")
        + (f", {summary.images_per_s:.0f} images/s" if summary.images_per_s else "")
    )
    evaluation = summary.evaluation
    shown = Table("class", "images", *(["accuracy"] if evaluation else []))
    for label, count in list(summary.classes.items())[:_SHOWN_CLASSES]:
        accuracy = evaluation.per_class.get(label) if evaluation else None
        cell = [] if not evaluation else ["-" if accuracy is None else f"{accuracy:.2%}"]
        shown.add_row(label, str(count), *cell)
    if summary.classes:
        Console().print(shown)
    if len(summary.classes) > _SHOWN_CLASSES:
        print(f"and {len(summary.classes) - _SHOWN_CLASSES} more classes")
    if evaluation:
        print(
            f"accuracy {evaluation.accuracy:.4f} over {evaluation.images} images"
            + (f", {evaluation.left_out} in other folders left out" if evaluation.left_out else "")
        )
