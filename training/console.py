"""What a person sees while a net is trained."""

from collections.abc import Sequence

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

from training.data import ImageSet
from training.describe import Layer
from training.distributed import is_first_process, local_rank
from training.errors import RecipeError
from training.loop import EpochResult
from training.recipe import Recipe
from training.run import Progress as RunProgress
from training.run import RunOptions, run
from training.start import AnyDataset


def find_device(name: str) -> torch.device:
    """Resolves auto, cpu, cuda or cuda:INDEX; each process of torchrun takes a GPU of its own.

    Raises:
        RecipeError: There is no such device here.
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
    """Trains with a progress bar, one line an epoch, and the outcome at the end."""
    console = Console(quiet=not is_first_process())
    bar = Progress(
        TextColumn("steps"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    task: TaskID = bar.add_task("steps", total=None)

    def on_start(data: AnyDataset, steps: int) -> None:
        bar.update(task, total=steps)
        sizes = f"{len(data.train)} train, {len(data.valid)} valid, {len(data.test)} test"
        kept = "" if isinstance(data.train, ImageSet) else ", read from their files"
        console.print(
            f"{options.data}: {sizes}, {len(data.classes)} classes{kept}; "
            f"{recipe.model} on {options.device}"
        )

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


def print_layers(layers: Sequence[Layer], console: Console) -> None:
    """Prints one row a layer and the sums."""
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
