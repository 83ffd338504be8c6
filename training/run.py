"""One run from data to checkpoints: `best.pt`, `last.pt`, `config.json`, `metrics.jsonl`."""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from training import checkpoints, start
from training.checkpoints import Checkpoint
from training.data import open_data
from training.distributed import Group, join_group
from training.evaluate import fit_temperature
from training.inputs import Normalization, measure
from training.loop import EpochResult, Trainer
from training.readers import Reader, make_reader
from training.recipe import Recipe
from training.report import misclassified
from training.start import AnyDataset
from training.tracking import Tracker


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What a run needs beside its recipe.

    Attributes:
        data: As `open_data` takes it.
        out: Folder of the run.
        device: Where to train.
        weights: A state_dict to start from; None starts from random weights.
        resume: Go on from `out/last.pt` where there is one.
        max_s: Starts no further epoch after so many seconds; None never stops.
        skip_bad: Leave unreadable images out.
        stream: Leave a folder's images in their files; None does so where they take much memory.
        workers: Processes that decode streamed images.
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


@dataclass(frozen=True, slots=True)
class Progress:
    """What a run reports to whoever watches it."""

    on_start: Callable[[AnyDataset, int], None]
    on_step: Callable[[], None]
    on_epoch: Callable[[EpochResult], None]


def run(recipe: Recipe, options: RunOptions, progress: Progress) -> Checkpoint:
    """Trains and returns the best epoch's checkpoint, tested once.

    `last.pt` is written after every epoch and before the first, `best.pt` whenever the validation
    loss falls: an interruption costs the epoch it falls into and nothing else. Of the processes
    that torchrun started the first one writes.

    Raises:
        TrainingError: Settings, data or a checkpoint are wrong, or the loss diverged.
    """
    with join_group(options.device) as group:
        with group.first_ahead():
            data = open_data(
                options.data,
                start.preprocessing(recipe),
                stream=options.stream,
                skip_bad=options.skip_bad,
            )
        normalization = _normalization(recipe, data)
        torch.manual_seed(recipe.seed)
        template, net = start.make_net(recipe, options.data, data, normalization, options.weights)
        train, valid, test = (
            make_reader(part, options.device, options.workers)
            for part in (data.train, data.valid, data.test)
        )
        trainer = Trainer(net.to(options.device), recipe, normalization, train, valid, group=group)
        start.prepare_folder(options.out, trainer, template, options.resume, group)
        progress.on_start(data, (recipe.epochs - trainer.epoch) * trainer.steps_per_epoch)
        tracking = Tracker(options.out, trainer.epoch) if group.is_first else nullcontext()
        with tracking as tracker:
            session = _Session(trainer, template, tracker, group, options)
            session.train(recipe, progress)
            return session.finish(valid, test)


def _normalization(recipe: Recipe, data: AnyDataset) -> Normalization:
    if recipe.mean and recipe.std:
        mean, std = recipe.mean, recipe.std
    else:
        measured = measure(data.train)
        mean, std = recipe.mean or measured.mean, recipe.std or measured.std
    return Normalization((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


@dataclass(frozen=True, slots=True)
class _Session:
    """A run under way; only the first process has a tracker, and only it writes."""

    trainer: Trainer
    template: Checkpoint
    tracker: Tracker | None
    group: Group
    options: RunOptions

    @property
    def _best_path(self) -> Path:
        return self.options.out / "best.pt"

    def train(self, recipe: Recipe, progress: Progress) -> None:
        """Runs epochs until the recipe's number, its patience or the time is used up."""
        began, max_s = time.monotonic(), self.options.max_s
        best = self._best_so_far()
        stop = False
        while not stop and self.trainer.epoch < recipe.epochs:
            result = self.trainer.run_epoch(progress.on_step)
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
        if not self.tracker:
            return
        weights = self.trainer.net.state_dict()
        current = replace(self.template, state_dict=weights, metrics=metrics)
        if better:
            checkpoints.save(self._best_path, current)
        checkpoints.save(self.options.out / "last.pt", current, self.trainer.state_dict())

    def finish(self, valid: Reader, test: Reader) -> Checkpoint:
        """Calibrates and tests the best epoch, and completes its checkpoint."""
        stored = checkpoints.load(self._best_path) if self.tracker else self.template
        best = self.group.from_first(stored)
        self.trainer.net.load_state_dict(best.state_dict)
        temperature = fit_temperature(self.trainer.evaluate(valid))
        tested = self.trainer.evaluate(test)
        metrics = {**best.metrics, "test_loss": tested.loss, "test_accuracy": tested.accuracy}
        final = replace(best, metrics=metrics, temperature=temperature)
        if self.tracker:
            checkpoints.save(self._best_path, final)
            shown = torch.cat((torch.tensor([0]), misclassified(tested)))
            pixels = next(iter(test.read([shown])))
            self.tracker.finish(final, tested, self.trainer.net, pixels[:1], pixels[1:])
        return final
