"""The command `convoy-train`: trains a net, or describes one."""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from training import recipe as recipes
from training.errors import TrainingError

_INTERRUPTED = 130
# typer brings a click of its own in newer releases; this names whichever usage error is in use.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class _DefaultToTrain(TyperGroup):
    """`convoy-train --data …` means `convoy-train train --data …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = ["train", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_DefaultToTrain, add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog="`convoy-train describe MODEL` shows a net layer by layer.")
def train(  # noqa: PLR0917 -- typer passes every option by keyword
    data: Annotated[
        str, typer.Option(help="digits, cifar10 (downloaded) or imagefolder:PATH.")
    ] = "digits",
    out: Annotated[Path, typer.Option(help="Folder of the run; made if missing.")] = Path(
        "runs/run"
    ),
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Recipe of the package or a TOML file: where all settings start from. By default "
            "digits for the digits, finetune with --weights or a torchvision model, else fast.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="net, net_res_deep, airbench or a torchvision classifier.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Height and width, in pixels.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Equal seeds give equal weights on a CPU, to the bit.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other setting of the recipe."),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Start from this state_dict (.pt or .safetensors); a head for other "
            "classes is made anew."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from last.pt; ends as if never stopped.")
    ] = False,
    max_minutes: Annotated[
        float | None, typer.Option(help="Start no further epoch after so many minutes.")
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Decode a folder's images as they are needed, or once into memory; by default in "
            "memory up to 4 GiB.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that decode streamed images; one a CPU by default."),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave unreadable images out.")
    ] = False,
) -> None:
    """Trains a net; writes best.pt, last.pt, config.json, metrics.jsonl, TensorBoard events."""
    from training.console import find_device, run_with_progress
    from training.run import RunOptions

    flags = {
        "model": model,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "image_size": image_size,
        "seed": seed,
    }
    overrides = {name: value for name, value in flags.items() if value is not None}
    overrides.update(recipes.parse_setting(text) for text in settings or [])
    options = RunOptions(
        data=data,
        out=out,
        device=find_device(device),
        weights=weights,
        resume=resume,
        max_s=None if max_minutes is None else 60 * max_minutes,
        skip_bad=skip_bad,
        stream=stream,
        workers=len(os.sched_getaffinity(0)) if workers is None else workers,
    )
    chosen = recipe or recipes.default_for(data, model, weights is not None)
    run_with_progress(recipes.load_recipe(chosen, overrides), options)


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
    """Shows a net layer by layer: output shapes, parameters, multiply-adds for one image."""
    from training.console import print_layers
    from training.describe import describe as describe_net

    arguments = dict(recipes.parse_setting(text) for text in settings or [])
    layers = describe_net(model, n_classes=classes, image_size=image_size, **arguments)
    print_layers(layers, Console())


def main() -> None:
    """Runs the command; a mistake is one line on stderr and exit code 2."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    # A container's stop ends a run as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        # typer turns Ctrl-C into this return value.
        code = app(standalone_mode=False)
    except (TrainingError, _UsageError) as error:
        print(f"convoy-train: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        # A disk that fills up under the metrics, for example.
        print(f"convoy-train: {error}", file=sys.stderr)
        sys.exit(1)
    if code == _INTERRUPTED:
        print("convoy-train: stopped; --resume goes on from last.pt", file=sys.stderr)
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
