"""Accuracy and time of each epoch of a recipe, beside airbench94's own code on the same images.

    python -m benchmarks.airbench DATA --device cuda --seeds 5 [--recipe fast] [--epochs 8]
        [--airbench cifar10-airbench/airbench94_muon.py]

Its code (github.com/KellerJordan/cifar10-airbench) is not part of Convoy: give the path of a copy.
It runs unchanged, on CUDA only, in its own process, after a warm-up run that compiles. It trains on
our training images and tests on our validation images. Its seconds are those of training alone, as
it counts them; ours include the validation after each epoch.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch

from convoy.training.console import find_device
from convoy.training.data import load_data
from convoy.training.loop import EpochResult
from convoy.training.recipe import load_recipe
from convoy.training.run import Progress, RunOptions, run

TARGET = 0.94
Epochs = dict[int, list[tuple[float, float]]]
"""By epoch the seconds so far and the accuracy, of each seed."""
RUN_THEIRS = """
import importlib.util, sys
import torch
spec = importlib.util.spec_from_file_location("theirs", sys.argv[1])
theirs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(theirs)
model = theirs.CifarNet().cuda().to(memory_format=torch.channels_last)
model.compile(mode="max-autotune")
theirs.main("warmup", model)
for seed in range(int(sys.argv[2])):
    print("seed", seed)
    torch.manual_seed(seed)
    theirs.main(seed, model)
"""


class Watch:
    """Records each epoch of a run; time starts when the data are loaded and the net is created."""

    def __init__(self, found: Epochs) -> None:
        self._found = found
        self._began_s = 0.0

    def start(self, *_: object) -> None:
        self._began_s = time.perf_counter()

    def note(self, result: EpochResult) -> None:
        taken_s = time.perf_counter() - self._began_s
        self._found[result.epoch].append((taken_s, result.valid_accuracy))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="as `convoy-train --data` takes it")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--airbench", type=Path)
    arguments = parser.parse_args()
    show(f"convoy-train --recipe {arguments.recipe}", train(arguments))
    if arguments.airbench and arguments.device.startswith("cuda"):
        show(arguments.airbench.stem, train_theirs(arguments))
    else:
        print("\nairbench94 was not run: it needs --airbench PATH and CUDA")


def train(arguments: argparse.Namespace) -> Epochs:
    found: Epochs = defaultdict(list)
    device = find_device(arguments.device)
    for seed in range(arguments.seeds):
        recipe = load_recipe(arguments.recipe, {"epochs": arguments.epochs, "seed": seed})
        watch = Watch(found)
        progress = Progress(watch.start, lambda: None, watch.note)
        with tempfile.TemporaryDirectory() as out:
            run(recipe, RunOptions(arguments.data, Path(out), device), progress)
    return found


def train_theirs(arguments: argparse.Namespace) -> Epochs:
    with tempfile.TemporaryDirectory() as folder:
        write_theirs(arguments.data, Path(folder) / "cifar10")
        path = str(arguments.airbench.resolve())
        command = [sys.executable, "-c", RUN_THEIRS, path, str(arguments.seeds)]
        done = subprocess.run(
            command, cwd=folder, env=os.environ, stdout=subprocess.PIPE, text=True, check=True
        )
    return parse_theirs(done.stdout.splitlines())


def write_theirs(spec: str, folder: Path) -> None:
    """Write the two files that its loader looks for before it downloads anything."""
    folder.mkdir()
    data = load_data(spec)
    for name, part in (("train", data.train), ("test", data.valid)):
        images, labels = torch.from_numpy(part.images), torch.from_numpy(part.labels)
        content = {"images": images, "labels": labels, "classes": list(data.classes)}
        torch.save(content, folder / f"{name}.pt")


def parse_theirs(lines: Iterable[str]) -> Epochs:
    """Read its table `| run | epoch | train_acc | val_acc | tta_val_acc | time_seconds |`."""
    found: Epochs = defaultdict(list)
    counts = False
    for line in lines:
        counts = counts or line.startswith("seed ")
        cells = [cell.strip() for cell in line.strip("|\n").split("|")]
        if counts and len(cells) == 6 and cells[1].isdigit():
            found[int(cells[1]) + 1].append((float(cells[5]), float(cells[3])))
    return found


def show(title: str, epochs: Epochs) -> None:
    print(f"\n{title}\nepoch  seconds so far                accuracy")
    for epoch, seeds in epochs.items():
        seconds, accuracies = zip(*seeds, strict=True)
        print(f"{epoch:5}  {spread(seconds, '.2f'):28}  {spread(accuracies, '.4f')}")
    reached = [
        next(s for s, accuracy in seed if accuracy >= TARGET)
        for seed in zip(*epochs.values(), strict=True)
        if any(accuracy >= TARGET for _, accuracy in seed)
    ]
    count = len(next(iter(epochs.values())))
    when = f", after {spread(reached, '.2f')} s" if reached else ""
    print(f"{TARGET:.0%} was reached by {len(reached)} of {count} seeds{when}", flush=True)


def spread(values: Iterable[float], form: str) -> str:
    ordered = sorted(values)
    middle, low, high = (
        format(value, form) for value in (statistics.median(ordered), ordered[0], ordered[-1])
    )
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    main()
