"""Progress and results of a training run, on the terminal."""

from collections.abc import Sequence
from datetime import UTC, datetime

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from convoy.training.data import ImageSet
from convoy.training.data.cache import Entry
from convoy.training.data.images import printable
from convoy.training.describe import Layer
from convoy.training.distributed import is_first_process, local_rank
from convoy.training.errors import RecipeError
from convoy.training.loop import EpochResult, Trainer
from convoy.training.recipe import Recipe
from convoy.training.run import AnyDataset, RunOptions, run
from convoy.training.run import Progress as RunProgress


def find_device(name: str) -> torch.device:
    """Resolve auto, cpu, cuda or cuda:INDEX; each process of torchrun gets its own GPU.

    Raises:
        RecipeError: The device does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(f"device: expected auto, cpu, cuda or cuda:INDEX, got {name!r}") from None
    count = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and count <= (device.index or 0)
    ):
        raise RecipeError(f"device: expected cpu or one of {count} usable GPUs, got {name!r}")
    return device


def run_with_progress(recipe: Recipe, options: RunOptions) -> None:
    """Train with a progress bar, one line per epoch, and the result at the end."""
    console = Console(quiet=not is_first_process())
    bar = Progress(
        TextColumn("steps"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    task: TaskID = bar.add_task("steps", total=None)

    def on_start(data: AnyDataset, trainer: Trainer) -> None:
        bar.update(task, total=trainer.steps_left)
        sizes = f"{len(data.train)} train, {len(data.valid)} valid, {len(data.test)} test"
        precision = str(trainer.precision).removeprefix("torch.")
        kept = "" if isinstance(data.train, ImageSet) else ", streamed from their files"
        console.print(
            f"{printable(options.data)}: {sizes}, {len(data.classes)} classes{kept}; "
            f"{recipe.model} on {options.device} in {precision}"
        )
        if data.inventory:
            for line in data.inventory.lines():
                console.print(line, markup=False, highlight=False, soft_wrap=True)

    def on_epoch(result: EpochResult) -> None:
        console.print(
            f"epoch {result.epoch:3d}  train loss {result.train_loss:.4f}  "
            f"valid loss {result.valid_loss:.4f}  valid accuracy {result.valid_accuracy:.4f}"
        )

    with bar:
        final = run(recipe, options, RunProgress(on_start, lambda: bar.advance(task), on_epoch))
    console.print(
        f"{options.out / 'best.pt'}: epoch {final.metrics['epoch']:.0f}, "
        f"test accuracy {final.metrics['test_accuracy']:.4f}, temperature {final.temperature:.3f}"
    )


def print_inventory(spec: str, data: AnyDataset, console: Console) -> None:
    """Print the data report, or the sizes of data that comes with a package."""
    sizes = f"{len(data.train)} train, {len(data.valid)} valid, {len(data.test)} test"
    console.print(f"{printable(spec)}: {sizes}, {len(data.classes)} classes", soft_wrap=True)
    for line in data.inventory.lines() if data.inventory else ():
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_entries(title: str, entries: Sequence[Entry], console: Console) -> None:
    """Print a line for each entry of the cache, and their sum."""
    for entry in entries:
        used = datetime.fromtimestamp(entry.used_at, UTC).isoformat(timespec="seconds")
        console.print(
            f"{entry.path.name}  {entry.size_bytes / 2**20:10.1f} MiB  used {used}", highlight=False
        )
    total = sum(entry.size_bytes for entry in entries) / 2**20
    console.print(
        f"{len(entries)} entries, {total:.1f} MiB {title}", highlight=False, soft_wrap=True
    )


def print_layers(layers: Sequence[Layer], console: Console) -> None:
    """Print one row per layer and the sums."""
    table = Table("layer", "kind", "output", show_footer=True)
    parameters = sum(layer.parameters for layer in layers)
    multiply_adds = sum(layer.multiply_adds for layer in layers)
    table.add_column("parameters", f"{parameters:,}", justify="right")
    table.add_column("multiply-adds", f"{multiply_adds:,}", justify="right")
    for layer in layers:
        shape = " x ".join(map(str, layer.output))
        counts = (f"{layer.parameters:,}", f"{layer.multiply_adds:,}")
        table.add_row(layer.name, layer.kind, shape, *counts)
    console.print(table)
