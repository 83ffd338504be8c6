"""One run from data to checkpoints: `best.pt`, `last.pt`, `config.json`, `metrics.jsonl`."""

import json
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from convoy.training import checkpoints, nets
from convoy.training.augment import ImageAugmentation, augments_images
from convoy.training.checkpoints import Architecture, Checkpoint, DataDescription
from convoy.training.cpus import usable_cpus
from convoy.training.data import (
    Cache,
    Dataset,
    ImageFiles,
    ImageSet,
    Preprocessing,
    Shares,
    open_data,
)
from convoy.training.data.images import printable
from convoy.training.distributed import Group, join_group
from convoy.training.errors import CheckpointError, RecipeError, StoppedError
from convoy.training.evaluate import fit_temperature, predict
from convoy.training.loop import EpochResult, Trainer
from convoy.training.nets.airbench import AirbenchNet
from convoy.training.nets.factories import is_factory, source_digest
from convoy.training.normalization import Normalization, measure
from convoy.training.readers import Reader, make_reader
from convoy.training.recipe import Recipe
from convoy.training.report import FinishedRun, misclassified
from convoy.training.tracking import Journal, Outcome
from convoy.training.weights import fit_names, load_into, read_weights

_WHITENING_SAMPLES = 5000
_SHOWN_CHARACTERS = 200
_MEASURED = ("mean", "std")

AnyDataset = Dataset[ImageSet] | Dataset[ImageFiles]


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of a run besides its recipe.

    Attributes:
        data: As for `open_data`.
        out: Folder of the run.
        device: Of the training.
        weights: A state_dict to start from; None starts from random weights.
        resume: Continue from `out/last.pt` if it exists.
        max_s: Seconds after which no further epoch starts; None: no limit.
        skip_bad: Leave unreadable images out.
        stream: Leave a folder's images in their files; None does so for large folders.
        workers: Processes that decode streamed images.
        cache: Where decoded images are kept; None takes the user's cache folder.
        trackers: Where to record metrics and images: tensorboard, mlflow, wandb.
    """

    data: str
    out: Path
    device: torch.device
    weights: Path | None = None
    resume: bool = False
    max_s: float | None = None
    skip_bad: bool = False
    stream: bool | None = None
    workers: int = 0
    cache: Cache | None = None
    trackers: Sequence[str] = ("tensorboard",)


@dataclass(frozen=True, slots=True)
class Progress:
    """Receives the progress of a run."""

    on_start: Callable[[AnyDataset, Trainer], None]
    on_step: Callable[[], None]
    on_epoch: Callable[[EpochResult], None]


def run(recipe: Recipe, options: RunOptions, progress: Progress) -> Checkpoint:
    """Train and return the best epoch's checkpoint, tested once.

    `last.pt` is written after every epoch, before the first, and where SIGINT or SIGTERM stops the
    run, so that at most one step is lost; `best.pt` whenever the validation loss falls.
    If torchrun started several processes, the first one writes.

    Raises:
        TrainingError: Settings, data or a checkpoint are wrong, or the loss diverged.
        KeyboardInterrupt: A signal stopped it.
    """
    _bound_threads()
    with join_group(options.device) as group:
        cuts = recipe.crop == "random_resized"
        with group.first_ahead():
            data = open_data(
                options.data,
                preprocessing(recipe),
                # Random crops are taken from the whole image.
                stream=True if cuts and options.stream is None else options.stream,
                cache=options.cache,
                skip_bad=options.skip_bad,
                shares=shares(recipe),
            )
        normalization = _normalization(recipe, data)
        torch.manual_seed(recipe.seed)
        template, net = make_net(recipe, options.data, data, normalization, options.weights)
        augmentation = (
            ImageAugmentation(recipe, preprocessing(recipe)) if augments_images(recipe) else None
        )
        train, valid, test = (
            make_reader(
                part,
                options.device,
                options.workers,
                options.skip_bad,
                augmentation if part is data.train else None,
            )
            for part in (data.train, data.valid, data.test)
        )
        trainer = Trainer(net.to(options.device), recipe, normalization, train, valid, group=group)
        prepare_folder(options.out, trainer, template, options.resume, group)
        progress.on_start(data, trainer)
        tracking = (
            Journal(options.out, options.trackers, recipe.as_dict(), trainer.epoch)
            if group.is_first
            else nullcontext()
        )
        with tracking as tracker, _stop_on_signal() as stop:
            session = _Session(trainer, template, tracker, group, options, stop, data)
            try:
                session.train(recipe, progress)
                return session.finish(valid, test)
            except StoppedError as error:
                raise KeyboardInterrupt from error


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGINT or SIGTERM came; a second one interrupts at once.

    An interrupt in the middle of a step would leave partly updated weights.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: object) -> None:
        came.set()
        for each in before:
            signal.signal(each, signal.default_int_handler)

    for number in before:
        signal.signal(number, stop)
    try:
        yield came.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _normalization(recipe: Recipe, data: AnyDataset) -> Normalization:
    if recipe.mean and recipe.std:
        mean, std = recipe.mean, recipe.std
    else:
        measured = measure(data.train)
        mean, std = recipe.mean or measured.mean, recipe.std or measured.std
    return Normalization((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


@dataclass(frozen=True, slots=True)
class _Session:
    """A running training; only the first process has a tracker and writes."""

    trainer: Trainer
    template: Checkpoint
    tracker: Journal | None
    group: Group
    options: RunOptions
    stop: Callable[[], bool]
    data: AnyDataset

    @property
    def _best_path(self) -> Path:
        return self.options.out / "best.pt"

    def train(self, recipe: Recipe, progress: Progress) -> None:
        """Run epochs up to the limits of the recipe's epochs, patience and time."""
        began, max_s = time.monotonic(), self.options.max_s
        best = self._best_so_far()
        stop = False
        while not stop and self.trainer.epoch < recipe.epochs:
            try:
                result = self.trainer.run_epoch(progress.on_step, self.stop)
            except StoppedError:
                self.save_last(best)
                raise
            metrics = {
                "epoch": float(result.epoch),
                "valid_loss": result.valid_loss,
                "valid_accuracy": result.valid_accuracy,
            }
            better = not best or result.valid_loss < best["valid_loss"]
            best = metrics if better else best
            self._keep(metrics, better)
            if self.tracker:
                self.tracker.write(result)
            progress.on_epoch(result)
            late = max_s is not None and time.monotonic() - began > max_s
            stale = recipe.patience > 0 and result.epoch - best["epoch"] >= recipe.patience
            stop = self.group.from_first(late or stale)

    def _best_so_far(self) -> Mapping[str, float]:
        resumed = self.tracker and self._best_path.exists()
        return self.group.from_first(checkpoints.load(self._best_path).metrics if resumed else {})

    def _keep(self, metrics: Mapping[str, float], better: bool) -> None:
        if self.tracker and better:
            checkpoints.save(self._best_path, self._current(metrics))
        self.save_last(metrics)

    def save_last(self, metrics: Mapping[str, float]) -> None:
        """Write last.pt, from which the run can resume, even within an epoch."""
        if self.tracker:
            path, state = self.options.out / "last.pt", self.trainer.state_dict()
            checkpoints.save(path, self._current(metrics), state)

    def _current(self, metrics: Mapping[str, float]) -> Checkpoint:
        weights = self.trainer.net.state_dict()
        return replace(self.template, state_dict=weights, metrics=metrics)

    def finish(self, valid: Reader, test: Reader) -> Checkpoint:
        """Calibrate and test the best epoch, then complete its checkpoint."""
        stored = checkpoints.load(self._best_path) if self.tracker else self.template
        best = self.group.from_first(stored)
        load_into(self.trainer.net, best.state_dict, "best.pt")
        temperature = fit_temperature(self.trainer.evaluate(valid, self.stop))
        tested = self.trainer.evaluate(test, self.stop)
        metrics = {**best.metrics, "test_loss": tested.loss, "test_accuracy": tested.accuracy}
        final = replace(best, metrics=metrics, temperature=temperature)
        if self.tracker:
            checkpoints.save(self._best_path, final)
            shown = torch.cat((torch.tensor([0]), misclassified(tested)))
            pixels = next(iter(test.read([shown])))
            report = FinishedRun(
                name=f"{final.architecture.name} on {printable(self.options.data)}",
                classes=self.data.classes,
                tested=tested,
                temperature=temperature,
                best_epoch=int(final.metrics["epoch"]),
                recipe=final.recipe,
                data_lines=list(self.data.inventory.lines()) if self.data.inventory else [],
                wrong=pixels[1:].cpu().numpy(),
            )
            self.tracker.finish(Outcome(final, report, self.trainer.net, pixels[:1]))
        return final


def preprocessing(recipe: Recipe) -> Preprocessing:
    """Return the recipe's preprocessing."""
    size = recipe.image_size
    return Preprocessing(
        size,
        size,
        recipe.resize_shorter_px,
        recipe.interpolation,
        recipe.antialias,
        recipe.decode,
    )


def shares(recipe: Recipe) -> Shares:
    """Return the shares that the recipe holds out of data without splits."""
    return Shares(recipe.valid_share, recipe.test_share)


def make_net(
    recipe: Recipe, spec: str, data: AnyDataset, normalization: Normalization, weights: Path | None
) -> tuple[Checkpoint, nn.Module]:
    """Return the net, and the checkpoint that describes it before the training.

    Raises:
        CheckpointError: The weights cannot be read or do not fit.
        RecipeError: A frozen backbone has no weights, or images grow and the net accepts one size
            only.
    """
    arguments = {
        **recipe.model_arguments,
        "n_classes": len(data.classes),
        "image_size": recipe.image_size,
    }
    net = nets.create(recipe.model, **arguments)
    if recipe.growth_share:
        _check_takes(net, recipe)
    if isinstance(net, AirbenchNet):
        count = min(len(data.train), _WHITENING_SAMPLES)
        net.whiten(normalization.apply(torch.from_numpy(data.train.read(range(count)))))
    if weights:
        _start_from(net, weights)
    if recipe.freeze_backbone:
        if not weights:
            raise RecipeError("freeze_backbone: expected --weights for the frozen layers, got none")
        nets.freeze_backbone(net)
    description = DataDescription(
        spec,
        data.classes,
        normalization.mean,
        normalization.std,
        preprocessing(recipe),
        shares(recipe),
    )
    digest = source_digest(recipe.model) if is_factory(recipe.model) else ""
    # Downloaded once, because the checkpoint contains the weights.
    recorded = {key: value for key, value in arguments.items() if key != "pretrained"}
    architecture = Architecture(recipe.model, recorded, digest)
    return Checkpoint(net.state_dict(), architecture, description, recipe=recipe.as_dict()), net


def _check_takes(net: nn.Module, recipe: Recipe) -> None:
    images = torch.zeros(1, 3, recipe.start_px, recipe.start_px)
    try:
        predict(net, [images])
    except RuntimeError as error:
        raise RecipeError(
            f"start_px: {recipe.model} does not accept images of {recipe.start_px} px; "
            f"growth_share=0 trains at {recipe.image_size} px throughout"
        ) from error


def _start_from(net: nn.Module, path: Path) -> None:
    """Load weights, without those of a head with another number of classes.

    Raises:
        CheckpointError: A layer before the head is missing, unknown or of another shape.
    """
    weights, own = fit_names(read_weights(path), net), net.state_dict()
    fitting = {k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}
    head = nets.head_of(net)
    different = sorted(k for k in own.keys() ^ fitting.keys() if not k.startswith(f"{head}."))
    different += sorted(weights.keys() - own.keys())
    if different:
        shown = ", ".join(different[:5])
        raise CheckpointError(f"weights {path}: expected all but {head}.* to fit, not {shown}")
    net.load_state_dict(fitting, strict=False)


def prepare_folder(
    out: Path, trainer: Trainer, template: Checkpoint, resume: bool, group: Group
) -> None:
    """Create the folder of the run, or restore the trainer from its last.pt.

    Raises:
        CheckpointError: The folder or its last.pt is unusable.
        RecipeError: The run to resume had other settings.
    """
    state = _open_folder(out, trainer, template, resume) if group.is_first else None
    state = group.from_first(state)
    if state is not None:
        trainer.load_state_dict(state)


def _open_folder(
    out: Path, trainer: Trainer, template: Checkpoint, resume: bool
) -> dict[str, object] | None:
    """Return the training state of the run to resume."""
    last, state = out / "last.pt", None
    try:
        out.mkdir(parents=True, exist_ok=True)
        if resume and last.exists():
            _check_same_run(checkpoints.load(last), template)
            state = checkpoints.load_training_state(last)
        else:
            (out / "best.pt").unlink(missing_ok=True)
            checkpoints.save(last, template, trainer.state_dict())
        _write_config(out / "config.json", template)
    except OSError as error:
        raise CheckpointError(f"out: cannot write to {out}: {error.strerror}") from error
    return state


def _bound_threads() -> None:
    """Limit torch's threads to the usable processors; torch ignores a container's quota.

    torchrun and users set the number for each process by OMP_NUM_THREADS.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))


def _write_config(path: Path, template: Checkpoint) -> None:
    config = {
        "data": template.data.spec,
        "device": str(next(iter(template.state_dict.values())).device),
        "recipe": dict(template.recipe),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": version("torchvision"),
        },
        "threads": torch.get_num_threads(),
        "cpus": usable_cpus(),
    }
    path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _check_same_run(last: Checkpoint, template: Checkpoint) -> None:
    for ours, theirs in ((template.architecture, last.architecture), (template.data, last.data)):
        # First the user's choices, then what follows from them.
        for name in sorted((each.name for each in fields(ours)), key=_MEASURED.__contains__):
            now, then = getattr(ours, name), getattr(theirs, name)
            if now != then:
                raise RecipeError(
                    f"resume: {name}: expected those of last.pt, {_shortened(then)}, got "
                    f"{_shortened(now)}"
                )
    # A setting that is missing in an older run had its default.
    before = {**Recipe().as_dict(), **last.recipe}
    changed = [
        f"{name} {before.get(name)!r} → {value!r}"
        for name, value in template.recipe.items()
        if before.get(name) != value
    ]
    if changed:
        raise RecipeError(
            f"resume: expected the recipe of last.pt, got another: {', '.join(changed)}"
        )


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
