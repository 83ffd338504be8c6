"""The command line of `convoy-client`."""

import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from clients.aio import AsyncClient
from clients.batch import BatchJob, BatchSummary, run_batch
from clients.bench import BenchReport, run_closed_loop
from clients.client import Client
from clients.connection import DEFAULT_ADDRESS
from clients.errors import ClientError
from clients.results import Classification

NOT_READY = 1

app = typer.Typer(
    help="Uses a Convoy server: classify pictures, one or many, and look at the server.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

Address = Annotated[
    str, typer.Option(envvar="CONVOY_ADDRESS", help="The server's gRPC port, HOST:PORT.")
]
Timeout = Annotated[
    float, typer.Option(help="Seconds a request may take, its retries included.", min=0.001)
]
Model = Annotated[
    str, typer.Option(help="The model's name; may be left out where the server serves one.")
]
TopK = Annotated[int, typer.Option(help="How many classes to show for a picture.", min=1)]


@app.command()
def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files.", show_default=False)],
    *,
    model: Model = "",
    top_k: TopK = 3,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line, for programs.")
    ] = False,
    address: Address = DEFAULT_ADDRESS,
    timeout_s: Timeout = 10.0,
) -> None:
    """Classifies image files and shows their most probable classes."""
    failed = False
    with Client(address, timeout_s=timeout_s) as client:
        for path in images:
            try:
                answer = client.classify(path, model=model, top_k=top_k)
            except ClientError as error:
                failed = True
                complain(error if str(path) in str(error) else f"{path}: {error}")
                continue
            if as_json:
                print(json.dumps({"path": str(path), **asdict(answer)}))
            else:
                _show(path, answer)
    if failed:
        raise typer.Exit(1)


@app.command()
def batch(
    folder: Annotated[
        Path, typer.Argument(metavar="INPUT", help="Folder of image files, searched to its depth.")
    ],
    *,
    out: Annotated[Path, typer.Option(help="Table to write, .jsonl or .csv.", show_default=False)],
    model: Model = "",
    top_k: TopK = 1,
    in_flight: Annotated[
        int,
        typer.Option(help="Requests under way at a time; more fill larger batches.", min=1),
    ] = 32,
    address: Address = DEFAULT_ADDRESS,
    timeout_s: Timeout = 10.0,
) -> None:
    """Classifies every image below a folder; a bad image becomes a row with its error."""
    job = BatchJob(folder, out, model, top_k, in_flight)
    summary = asyncio.run(_run_batch(job, address, timeout_s))
    print(f"{out}: {summary.images} images, {summary.errors} errors")


async def _run_batch(job: BatchJob, address: str, timeout_s: float) -> BatchSummary:
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("images", total=None)
        async with AsyncClient(address, timeout_s=timeout_s) as client:
            return await run_batch(
                job, client, lambda done, total: bar.update(task, completed=done, total=total)
            )


@app.command()
def bench(
    image: Annotated[Path, typer.Argument(help="Image file to send again and again.")],
    *,
    model: Model = "",
    concurrency: Annotated[int, typer.Option(help="Requests always under way.", min=1)] = 8,
    duration_s: Annotated[float, typer.Option(help="Seconds to send for.", min=0.1)] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="The report as a JSON object.")] = False,
    address: Address = DEFAULT_ADDRESS,
    timeout_s: Timeout = 10.0,
) -> None:
    """Measures throughput and latency in a closed loop."""

    async def run() -> BenchReport:
        async with AsyncClient(address, timeout_s=timeout_s) as client:
            return await run_closed_loop(
                client, image, model=model, concurrency=concurrency, duration_s=duration_s
            )

    report = asyncio.run(run())
    if as_json:
        print(json.dumps({**asdict(report), "throughput_per_s": report.throughput_per_s}))
    else:
        _show_report(report)


@app.command()
def health(
    model: Annotated[str, typer.Option(help="Ask for this model alone.")] = "",
    address: Address = DEFAULT_ADDRESS,
    timeout_s: Timeout = 2.0,
) -> None:
    """Exits 0 if the server takes requests, 1 if not."""
    with Client(address, timeout_s=timeout_s) as client:
        ready = client.is_ready(model)
    if not ready:
        complain(f"{model or 'the server'} is not ready")
        raise typer.Exit(NOT_READY)
    print("ready")


@app.command()
def models(address: Address = DEFAULT_ADDRESS, timeout_s: Timeout = 10.0) -> None:
    """Lists the model versions in service."""
    table = Table("model", "version", "ready", "size", "classes", "backend", "device", "provider")
    with Client(address, timeout_s=timeout_s) as client:
        for model in client.models():
            table.add_row(
                model.name,
                str(model.version),
                "yes" if model.ready else "no",
                f"{model.height_px} x {model.width_px}",
                str(len(model.labels)),
                model.backend,
                model.device,
                model.provider,
            )
    Console().print(table)


def _show(path: Path, answer: Classification) -> None:
    classes = "  ".join(f"{score.label} {score.probability:.1%}" for score in answer.classes)
    print(f"{path}: {classes}  ({answer.model} version {answer.version})")


def _show_report(report: BenchReport) -> None:
    print(
        f"{report.throughput_per_s:.0f} requests/s at concurrency {report.concurrency} "
        f"for {report.duration_s:.1f} s, {report.completed} answered, "
        f"mean batch size {report.mean_batch_size:.1f}"
    )
    latencies = "  ".join(f"p{p:g} {s * 1000:.1f} ms" for p, s in report.latency_s.items())
    print(f"latency  {latencies}")
    for kind, count in report.errors.items():
        print(f"{kind}: {count}")


def complain(message: object) -> None:
    """Writes one line about a mistake to stderr."""
    print(f"convoy-client: {' '.join(str(message).split())}", file=sys.stderr)
