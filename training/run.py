"""One run from data to checkpoints: `best.pt`, `last.pt`, `config.json`, `metrics.jsonl`."""

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torchvision
from torch import nn

from training import checkpoints, nets
from training.checkpoints import Architecture, Checkpoint, DataDescription
from training.data import Dataset, Preprocessing, load_data
from training.errors import CheckpointError, RecipeError
from training.evaluate import fit_temperature
from training.inputs import Normalization, measure, to_device
from training.loop import EpochResult, Trainer
from training.nets.airbench import AirbenchNet
from training.recipe import Recipe
from training.report import misclassified, write_report
from training.tracking import Tracker

_WHITENING_SAMPLES = 5000


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What a run needs beside its recipe.

    Attributes:
        data: As `load_data` takes it.
        out: Folder of the run.
        device: Where to train.
        weights: A state_dict to start from; None starts from random weights.
        resume: Go on from `out/last.pt` where there is one.
        max_s: Starts no further epoch after so many seconds; None never stops.
        skip_bad: Leave unreadable images out.
    """

    data: str
    out: Path
    device: torch.device
    weights: Path | None = None
    resume: bool = False
    max_s: float | None = None
    skip_bad: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """What a run reports to whoever watches it."""

    on_start: Callable[[Dataset, int], None]
    on_step: Callable[[], None]
    on_epoch: Callable[[EpochResult], None]


def run(recipe: Recipe, options: RunOptions, progress: Progress) -> Checkpoint:
    """Trains and returns the best epoch's checkpoint, tested once.

    `last.pt` is written after every epoch and before the first, `best.pt` whenever the validation
    loss falls: an interruption costs the epoch it falls into and nothing else.

    Raises:
        TrainingError: Settings, data or a checkpoint are wrong, or the loss diverged.
    """
    data = load_data(options.data, _preprocessing(recipe), skip_bad=options.skip_bad)
    normalization = _normalization(recipe, data)
    torch.manual_seed(recipe.seed)
    template, net = _make_net(recipe, options, data, normalization)
    train, valid, test = (
        to_device(part, options.device) for part in (data.train, data.valid, data.test)
    )
    trainer = Trainer(net.to(options.device), recipe, normalization, train, valid)
    started_at_epoch = _prepare_folder(trainer, template, recipe, options)
    progress.on_start(data, (recipe.epochs - trainer.epoch) * trainer.steps_per_epoch())
    with Tracker(options.out, started_at_epoch) as tracker:
        _train(trainer, template, tracker, options, progress)
        best = checkpoints.load(options.out / "best.pt")
        trainer.net.load_state_dict(best.state_dict)
        temperature = fit_temperature(trainer.evaluate(*valid))
        tested = trainer.evaluate(*test)
        metrics = {**best.metrics, "test_loss": tested.loss, "test_accuracy": tested.accuracy}
        final = replace(best, metrics=metrics, temperature=temperature)
        checkpoints.save(options.out / "best.pt", final)
        figure = write_report(options.out, data.classes, tested)
        wrong = test[0].cpu()[misclassified(tested)]
        tracker.draw(figure, trainer.net, normalization.apply(test[0][:1]), wrong)
        tracker.finish(recipe.as_dict(), metrics)
    return final


def _preprocessing(recipe: Recipe) -> Preprocessing:
    size = recipe.image_size
    return Preprocessing(size, size, recipe.resize_shorter_px)


def _normalization(recipe: Recipe, data: Dataset) -> Normalization:
    measured = measure(data.train)
    mean, std = recipe.mean or measured.mean, recipe.std or measured.std
    return Normalization((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


def _make_net(
    recipe: Recipe, options: RunOptions, data: Dataset, normalization: Normalization
) -> tuple[Checkpoint, nn.Module]:
    """The net, and the checkpoint that describes it before any training."""
    arguments = {
        **recipe.model_arguments,
        "n_classes": len(data.classes),
        "image_size": recipe.image_size,
    }
    net = nets.create(recipe.model, **arguments)
    if isinstance(net, AirbenchNet):
        sample = torch.from_numpy(data.train.images[:_WHITENING_SAMPLES])
        net.whiten(normalization.apply(sample))
    if options.weights:
        _start_from(net, options.weights)
    description = DataDescription(
        options.data, data.classes, normalization.mean, normalization.std, _preprocessing(recipe)
    )
    architecture = Architecture(recipe.model, arguments)
    return Checkpoint(net.state_dict(), architecture, description, recipe=recipe.as_dict()), net


def _start_from(net: nn.Module, path: Path) -> None:
    """Loads weights; those of a head with another number of classes are left out.

    Raises:
        CheckpointError: Anything but the last layer is missing, unknown or of another shape.
    """
    weights, own = checkpoints.read_weights(path), net.state_dict()
    fitting = {k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}
    head = list(own)[-1].rpartition(".")[0]
    different = sorted(k for k in own.keys() ^ fitting.keys() if not k.startswith(f"{head}."))
    different += sorted(weights.keys() - own.keys())
    if different:
        shown = ", ".join(different[:5])
        raise CheckpointError(f"weights {path}: expected all but {head}.* to fit, not {shown}")
    net.load_state_dict(fitting, strict=False)


def _prepare_folder(
    trainer: Trainer, template: Checkpoint, recipe: Recipe, options: RunOptions
) -> int:
    """Makes or takes up the folder of the run; returns how many epochs it already has.

    Raises:
        CheckpointError: The folder or its last.pt is unusable.
        RecipeError: The run to resume had other settings.
    """
    last = options.out / "last.pt"
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        if options.resume and last.exists():
            _check_same_run(checkpoints.load(last), template)
            trainer.load_state_dict(checkpoints.load_training_state(last))
        else:
            (options.out / "best.pt").unlink(missing_ok=True)
            checkpoints.save(last, template, trainer.state_dict())
        config = {
            "data": options.data,
            "device": str(options.device),
            "recipe": recipe.as_dict(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
            },
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
        }
        text = json.dumps(config, indent=2) + "\n"
        (options.out / "config.json").write_text(text, "utf-8")
    except OSError as error:
        raise CheckpointError(f"out: cannot write to {options.out}: {error.strerror}") from error
    return trainer.epoch


def _check_same_run(last: Checkpoint, template: Checkpoint) -> None:
    if (last.architecture, last.data) != (template.architecture, template.data):
        raise RecipeError("resume: expected the data and model of last.pt, got others")
    changed = [k for k, v in template.recipe.items() if last.recipe.get(k) != v]
    if changed:
        raise RecipeError(f"resume: expected the recipe of last.pt, got another {changed[0]}")


def _train(
    trainer: Trainer,
    template: Checkpoint,
    tracker: Tracker,
    options: RunOptions,
    progress: Progress,
) -> None:
    began = time.monotonic()
    best_path = options.out / "best.pt"
    best = checkpoints.load(best_path).metrics if best_path.exists() else {}
    patience = template.recipe["patience"]
    while trainer.epoch < template.recipe["epochs"]:
        epoch_began = time.monotonic()
        result = trainer.run_epoch(progress.on_step)
        images_per_s = trainer.images_per_epoch / (time.monotonic() - epoch_began)
        metrics = {
            "epoch": float(result.epoch),
            "valid_loss": result.valid_loss,
            "valid_accuracy": result.valid_accuracy,
        }
        current = replace(template, state_dict=trainer.net.state_dict(), metrics=metrics)
        if not best or result.valid_loss < best["valid_loss"]:
            checkpoints.save(best_path, current)
            best = metrics
        checkpoints.save(options.out / "last.pt", current, trainer.state_dict())
        tracker.write(result, images_per_s)
        progress.on_epoch(result)
        if options.max_s is not None and time.monotonic() - began > options.max_s:
            break
        if patience and result.epoch - best["epoch"] >= patience:
            break
