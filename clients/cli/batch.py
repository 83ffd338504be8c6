"""`batch`: a folder of images to a table of classes."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from clients.aio import AsyncClient
from clients.batch import BatchJob, BatchSummary, run_batch
from clients.cli.options import Address, Model, Timeout, TopK
from clients.connection import DEFAULT_ADDRESS


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
