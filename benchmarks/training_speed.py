"""Speed of training: an epoch, the input pipeline, decoding. For a machine that is otherwise idle.

    python benchmarks/training_speed.py epoch DATA --recipe fast --epochs 3
    python benchmarks/training_speed.py pipeline DATA --recipe fast --rounds 5 [--px 32]
    python benchmarks/training_speed.py decode DATA --rounds 3

DATA is what `convoy-train --data` takes.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convoy.training import recipe as recipes
from convoy.training import run
from convoy.training.data import open_data
from convoy.training.loop import Trainer
from convoy.training.normalization import measure
from convoy.training.readers import make_reader
from convoy.training.schedules import size_px

CPU = torch.device("cpu")


def time_epochs(data: str, recipe: str, settings: list[str], epochs: int) -> None:
    """Note when `convoy-train` begins and ends each epoch: what they take, and all the rest."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "convoy.training", "--data", data, "--recipe", recipe]
        command += ["--epochs", str(epochs), "--out", folder]
        command += [part for setting in settings for part in ("--set", setting)]
        began = time.perf_counter()
        marks = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith((f"{data}:", "epoch ")):
                    marks.append(time.perf_counter())
                print(line, end="", flush=True)
        whole_s = time.perf_counter() - began
    epoch_s = [later - earlier for earlier, later in itertools.pairwise(marks)]
    print(f"epochs: {', '.join(f'{took_s:.1f}' for took_s in epoch_s)} s")
    print(f"all the rest: {whole_s - sum(epoch_s):.1f} s; whole command: {whole_s:.1f} s")


class OneBatch(Trainer):
    """Makes every step on the first batch of its size: what it costs when input costs nothing."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._fixed: dict[int, tuple[Tensor, Tensor, float]] = {}

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        batches = super()._batches()
        for _ in range(self.steps_per_epoch):
            size = size_px(self._recipe, self._done)
            if size not in self._fixed:
                self._fixed[size] = next(batches)
            yield self._fixed[size]


def compare_pipeline(options: argparse.Namespace) -> None:
    """Images per second of whole epochs against those on one fixed batch, in turns."""
    overrides = {"batch_size": options.batch_size} if options.batch_size else {}
    # The images grow within a round or, in so many epochs, not at all.
    overrides |= {"start_px": options.px, "epochs": 10**6} if options.px else {"epochs": 1}
    recipe = recipes.load_recipe(options.recipe, overrides)
    data = open_data(options.data, run.preprocessing(recipe), stream=options.stream)
    normalization = measure(data.train)
    some = torch.randperm(len(data.train))[: options.steps * recipe.batch_size].numpy()
    few = data.valid.take(some[:2] % len(data.valid))
    ratios = []
    trainers = []
    for kind in (Trainer, OneBatch):
        _, net = run.make_net(recipe, options.data, data, normalization, None)
        readers = (make_reader(part, CPU, options.workers) for part in (data.train.take(some), few))
        trainers.append(kind(net, recipe, normalization, *readers))
        _images_per_s(trainers[-1])
    for turn in range(options.rounds):
        # Each goes first in turn, so a machine that slows down or recovers favors neither.
        rates = [_images_per_s(trainer) for trainer in trainers[:: -1 if turn % 2 else 1]]
        whole, fixed = reversed(rates) if turn % 2 else rates
        ratios.append(whole / fixed)
        print(f"{whole:.0f} of {fixed:.0f} images/s: {ratios[-1]:.3f}", flush=True)
    print(f"median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")


def _images_per_s(trainer: Trainer) -> float:
    trainer._step = 0  # with the images' first size
    return trainer.run_epoch(lambda: None).images_per_s


def time_decoding(data: str, rounds: int) -> None:
    """Seconds to load the whole set into memory with an empty and with a filled cache."""
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            times = []
            for _ in range(2):
                began = time.perf_counter()
                loaded = open_data(data, run.preprocessing(recipes.Recipe()), cache=Path(cache))
                times.append(time.perf_counter() - began)
        count = len(loaded.train) + len(loaded.valid) + len(loaded.test)
        print(f"{count} images: decoded in {times[0]:.2f} s, cached {times[1]:.2f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("epoch", "pipeline", "decode"))
    parser.add_argument("data")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="of a round")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--px", type=int, help="keep growing images at this size")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    match options.what:
        case "epoch":
            time_epochs(options.data, options.recipe, options.set, options.epochs)
        case "pipeline":
            compare_pipeline(options)
        case "decode":
            time_decoding(options.data, options.rounds)


if __name__ == "__main__":
    main()
