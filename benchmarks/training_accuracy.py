"""Test accuracy of a recipe by number of epochs, mean and deviation over seeds.

    python benchmarks/training_accuracy.py DATA --epochs 3 8 --seeds 0 1 2 [--jobs 2]

DATA is what `convoy-train --data` takes. Accuracy depends on the number of epochs and not on the
speed of the machine, so this may run beside other work; `training_speed.py` measures the time of an
epoch on a machine that is otherwise idle. Test accuracy is of one view, without augmentation.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from convoy.training import checkpoints


def measure(arguments: list[str], epochs: int, seed: int, threads: int) -> float:
    """Run `convoy-train` and return the test accuracy of its best.pt."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "convoy.training", *arguments, "--out", folder]
        command += ["--epochs", str(epochs), "--seed", str(seed)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        accuracy = checkpoints.load(Path(folder) / "best.pt").metrics["test_accuracy"]
    print(f"{epochs} epochs, seed {seed}: {accuracy:.4f}", flush=True)
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--epochs", type=int, nargs="+", default=[8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    options = parser.parse_args()
    arguments = ["--data", options.data, "--recipe", options.recipe]
    arguments += [part for setting in options.set for part in ("--set", setting)]
    threads = 1 if options.jobs > 1 else len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = {
            epochs: [
                pool.submit(measure, arguments, epochs, seed, threads) for seed in options.seeds
            ]
            for epochs in options.epochs
        }
        for epochs, pending in runs.items():
            results = [run.result() for run in pending]
            spread = statistics.stdev(results) if len(results) > 1 else 0.0
            mean = statistics.mean(results)
            print(f"{epochs} epochs: {mean:.4f} ± {spread:.4f} over {len(results)} seeds")


if __name__ == "__main__":
    main()
