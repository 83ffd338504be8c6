"""The command `convoy-train`: train a net, describe one, or save a data set as images."""

import io
import logging
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from convoy.training import __version__
from convoy.training import recipe as recipes
from convoy.training.cpus import usable_cpus
from convoy.training.errors import TrainingError

if TYPE_CHECKING:
    from convoy.training.data import Cache

_INTERRUPTED = 130
# Newer releases of typer bring their own click; this is the usage error of the one in use.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


DEFAULT_CACHE_GIB = 20.0
CacheDir = Annotated[
    Path | None,
    typer.Option(help="Folder of decoded images; by default ~/.cache/convoy or XDG_CACHE_HOME."),
]
CacheGib = Annotated[
    float,
    typer.Option(
        min=0, help="Largest size of the cache; the least recently used entries are deleted first."
    ),
]


class TrackerName(Enum):
    """Where a run records its metrics and images."""

    TENSORBOARD = "tensorboard"
    MLFLOW = "mlflow"
    WANDB = "wandb"


class CacheAction(Enum):
    """What to do with the cache."""

    LIST = "list"
    PRUNE = "prune"


class _DefaultToTrain(TyperGroup):
    """`convoy-train --data …` means `convoy-train train --data …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in {*self.commands, "--version"}:
            args = ["train", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_DefaultToTrain,
    help="Train an image classifier. Without a command, train is run.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"convoy-train {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None: ...


@app.command(epilog="`convoy-train describe MODEL` shows a net layer by layer.")
def train(  # noqa: PLR0917 -- typer passes every option by keyword
    data: Annotated[
        str,
        typer.Option(
            help="digits, cifar10 (downloaded), imagefolder:PATH, table:FILE (CSV or Parquet of "
            "paths and labels) or shards:PATTERN (tar or Parquet files, also by URL)."
        ),
    ] = "digits",
    out: Annotated[Path, typer.Option(help="Folder of the run; created if missing.")] = Path(
        "runs/run"
    ),
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A built-in recipe or a TOML file with the settings. By default "
            "digits for the digits, finetune with --weights or a torchvision model, else fast.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="net, net_res_deep, airbench, a torchvision classifier, timm:NAME, or a factory "
            "in your own code: FILE.py:NAME or PACKAGE.MODULE:NAME."
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Height and width, in pixels.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Equal seeds give bit-equal weights on a CPU.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Any other setting of the recipe; repeatable."
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Start from this state_dict (.pt or .safetensors); a head for other "
            "classes is initialized randomly."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue from last.pt; the result is that of an uninterrupted run.",
        ),
    ] = False,
    max_minutes: Annotated[
        float | None, typer.Option(help="Minutes after which no further epoch starts.")
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Decode a folder's images for each batch, or once into memory. By default in "
            "memory up to 4 GiB.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that decode streamed images; by default one per CPU."),
    ] = None,
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad",
            help="Skip unreadable images, and list them; replace one that becomes unreadable "
            "during the run by another of its class.",
        ),
    ] = False,
    antialias: Annotated[
        bool | None,
        typer.Option(
            "--antialias/--no-antialias",
            help="Shrink images by averaging (the default), or interpolate at points as OpenCV "
            "does.",
        ),
    ] = None,
    decode: Annotated[
        str | None,
        typer.Option(
            help="exact: decode all pixels of a file (the default). scaled: decode large JPEGs at "
            "1/2, 1/4 or 1/8 of their size, in training, serving and batch jobs; this is faster "
            "and changes the pixels slightly.",
        ),
    ] = None,
    valid_share: Annotated[
        float | None,
        typer.Option(
            help="Share of each class to hold out for validation if the data has no such split."
        ),
    ] = None,
    test_share: Annotated[
        float | None,
        typer.Option(
            help="Share of each class to hold out for the test if the data has no such split."
        ),
    ] = None,
    trackers: Annotated[
        list[TrackerName] | None,
        typer.Option("--tracker", help="Where to record metrics and images; repeatable."),
    ] = None,
    cache_dir: CacheDir = None,
    cache_gib: CacheGib = DEFAULT_CACHE_GIB,
) -> None:
    """Train a net; write best.pt, last.pt, config.json, metrics.jsonl and TensorBoard events."""
    from convoy.training.console import find_device, run_with_progress
    from convoy.training.run import RunOptions

    flags = {
        "model": model,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "image_size": image_size,
        "seed": seed,
        "antialias": antialias,
        "decode": decode,
        "valid_share": valid_share,
        "test_share": test_share,
    }
    overrides = {name: value for name, value in flags.items() if value is not None}
    overrides.update(recipes.parse_setting(text) for text in settings or [])
    if model and model.startswith("timm:"):
        overrides = {**_published_input(model, image_size), **overrides}
    options = RunOptions(
        data=data,
        out=out,
        device=find_device(device),
        weights=weights,
        resume=resume,
        max_s=None if max_minutes is None else 60 * max_minutes,
        skip_bad=skip_bad,
        stream=stream,
        workers=usable_cpus() if workers is None else workers,
        cache=_cache(cache_dir, cache_gib),
        trackers=[each.value for each in trackers or [TrackerName.TENSORBOARD]],
    )
    chosen = recipe or recipes.default_for(data, model, weights is not None)
    run_with_progress(recipes.load_recipe(chosen, overrides), options)


def _published_input(model: str, image_size: int | None) -> dict[str, Any]:
    """Return the settings that a timm model was published with."""
    from convoy.training.nets.factories import timm_input

    found = timm_input(model, image_size)
    return {
        "image_size": found.preprocessing.height_px,
        "resize_shorter_px": found.preprocessing.resize_shorter_px,
        "interpolation": found.preprocessing.interpolation,
        "mean": found.mean,
        "std": found.std,
    }


@app.command()
def inspect(  # noqa: PLR0917 -- typer passes every option by keyword
    data: Annotated[str, typer.Argument(help="As --data of a training run.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="As --recipe of a training run: the report shows its effect on the images."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="As --model of a training run.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Height and width, in pixels.")] = None,
    cache_dir: CacheDir = None,
    cache_gib: CacheGib = DEFAULT_CACHE_GIB,
) -> None:
    """Report on data: classes, formats, sizes, duplicates, and the files left out, with reasons."""
    from convoy.training.console import print_inventory
    from convoy.training.data import open_data
    from convoy.training.run import preprocessing, shares

    overrides = {} if image_size is None else {"image_size": image_size}
    chosen = recipes.load_recipe(recipe or recipes.default_for(data, model, False), overrides)
    found = open_data(
        data,
        preprocessing(chosen),
        stream=True,
        cache=_cache(cache_dir, cache_gib),
        skip_bad=True,
        shares=shares(chosen),
    )
    print_inventory(data, found, Console())


@app.command()
def cache(
    action: Annotated[
        CacheAction, typer.Argument(help="list: show the entries. prune: delete entries.")
    ],
    cache_dir: CacheDir = None,
    cache_gib: Annotated[
        float, typer.Option(min=0, help="Size to prune to; 0 deletes everything.")
    ] = DEFAULT_CACHE_GIB,
) -> None:
    """Show the cache of decoded images, or delete its least recently used entries."""
    from convoy.training.console import print_entries

    kept = _cache(cache_dir, cache_gib)
    if action is CacheAction.PRUNE:
        print_entries(f"deleted from {kept.folder}", kept.prune(), Console())
    else:
        print_entries(f"in {kept.folder}", kept.entries(), Console())


def _cache(folder: Path | None, gib: float) -> "Cache":
    from convoy.training.data import Cache, default_cache

    return Cache(folder or default_cache(), int(gib * 2**30))


@app.command()
def describe(
    model: Annotated[str, typer.Argument(help="As --model of a training run.")],
    image_size: Annotated[int, typer.Option(help="Height and width, in pixels.")] = 32,
    classes: Annotated[int, typer.Option(help="Number of classes.")] = 10,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="An argument of the net."),
    ] = None,
) -> None:
    """Show a net layer by layer: output shapes, parameters, multiply-adds for one image."""
    from convoy.training.console import print_layers
    from convoy.training.describe import describe as describe_net

    arguments = dict(recipes.parse_setting(text) for text in settings or [])
    layers = describe_net(model, n_classes=classes, image_size=image_size, **arguments)
    print_layers(layers, Console())


@app.command()
def save_images(
    data: Annotated[str, typer.Argument(help="As --data of a training run.")],
    folder: Annotated[Path, typer.Argument(help="Folder to create; it must not exist.")],
    image_size: Annotated[int, typer.Option(help="Height and width, in pixels.")] = 32,
) -> None:
    """Save a data set as PNG files, FOLDER/SPLIT/CLASS/NUMBER.png, in the layout of imagefolder."""
    from convoy.training import data as datasets

    size = datasets.Preprocessing(image_size, image_size)
    counts = datasets.save_images(datasets.load_data(data, size), folder)
    splits = ", ".join(f"{count} {split}" for split, count in counts.items())
    Console().print(f"{folder}: {splits}", soft_wrap=True, highlight=False)


def main() -> None:
    """Run the command; an error is one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        # File names need not be UTF-8.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    # Stopping a container ends a run as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        # typer turns Ctrl-C into this return value.
        code = app(standalone_mode=False)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("convoy"):
            raise
        extra = "convoy-serving[train]"
        print(f"convoy-train: needs {error.name}: pip install '{extra}'", file=sys.stderr)
        sys.exit(2)
    except (TrainingError, _UsageError) as error:
        print(f"convoy-train: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        # For example, a full disk while metrics are written.
        print(f"convoy-train: {error}", file=sys.stderr)
        sys.exit(1)
    if code == _INTERRUPTED:
        print("convoy-train: stopped; --resume continues from last.pt", file=sys.stderr)
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
