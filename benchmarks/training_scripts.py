"""Training beside timm's train.py and torchvision's references/classification, on a CPU.

    python -m benchmarks.training_scripts speed DATA --timm TIMM --torchvision TORCHVISION
    python -m benchmarks.training_scripts accuracy DATA --timm TIMM --torchvision TORCHVISION

TIMM and TORCHVISION are the paths of their `train.py`, from their repositories; torchvision's other
scripts must be beside its own. DATA has `train/CLASS`, `val/CLASS` and `test/CLASS`, the number of
training images is a multiple of the batch size, since timm drops the rest, and only Convoy looks at
`test`. All three train with the same settings, without weights to start from: SGD with Nesterov's
momentum, a cosine schedule by steps, label smoothing, random crops and flips, float32.

For the speed, the three run one after the other for an epoch each, validation and checkpoint
included, and are stopped meanwhile; for a machine that is otherwise idle.
"""

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.tables import spread, table

_CONVOY = """
    -m convoy.training --data imagefolder:{data} --out {out} --seed {seed} --epochs {epochs}
    --stream --recipe scratch-224 --model {model} --image-size {px} --batch-size {batch_size}
    --lr {lr} --workers {workers} --set resize_shorter_px={resized_px} --set warmup_share=0.0
    --set crop_scale=[0.35,1.0] --set auto_augment=none --set random_erasing=0.0
    --set mixup_alpha=0.0 --set cutmix_alpha=0.0 --set average=none --set precision=float32
    --set mean=[0.485,0.456,0.406] --set std=[0.229,0.224,0.225]
"""
_TIMM = """
    {timm} {data} --output {out} --experiment run --seed {seed} --epochs {epochs} --device cpu
    --model {timm_model} --num-classes 10 --input-size 3 {px} {px} --crop-pct {crop_share}
    -b {batch_size} --lr {lr} -j {workers} --opt sgd --momentum 0.9 --weight-decay 2e-5
    --sched cosine --sched-on-updates --warmup-epochs 0 --min-lr {least_lr} --smoothing 0.1
    --color-jitter 0 --scale 0.35 1.0 --train-interpolation bilinear --interpolation bilinear
    --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 --checkpoint-hist 1
    --model-kwargs {timm_arguments}
"""
_TORCHVISION = """
    {seed} {steps_per_epoch} {torchvision} --data-path {data} --output-dir {out} --epochs {epochs}
    --device cpu --model {model} --train-crop-size {px} --val-crop-size {px}
    --val-resize-size {resized_px} -b {batch_size} --lr {lr} -j {workers} --opt sgd_nesterov
    --momentum 0.9 --wd 2e-5 --norm-weight-decay 0 --bias-weight-decay 0 --label-smoothing 0.1
    --lr-scheduler cosineannealinglr
"""
# torchvision's script has no options for the seed, for the scale of crops, and for a rate that
# changes in each step.
_LAUNCH_TORCHVISION = """
import functools, math, runpy, sys, torch
from torch.optim import lr_scheduler
from torchvision.transforms import RandomResizedCrop

def cosine(optimizer, T_max, eta_min):
    schedule = lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.505 + 0.495 * math.cos(math.pi * step / T_max / steps_per_epoch)
    )
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    return lr_scheduler.ConstantLR(optimizer, 1)

seed, steps_per_epoch, script = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
del sys.argv[1:4]
torch.manual_seed(seed)
lr_scheduler.CosineAnnealingLR = cosine
RandomResizedCrop.__init__ = functools.partialmethod(
    RandomResizedCrop.__init__, scale=(0.35, 1.0)
)
sys.path.insert(0, script.rpartition("/")[0])
runpy.run_path(script, run_name="__main__")
"""
# In torchvision's resnet18 the blocks do not begin as identities.
_TIMM_MODELS = {
    "resnet18": ("resnet18", "zero_init_last=False"),
    "mobilenet_v3_small": ("mobilenetv3_small_100", "drop_rate=0.2"),
}
_CROP_SHARE = 0.875
_LOOK_EVERY_S = 0.01


@dataclass(frozen=True, slots=True)
class Setup:
    """What all scripts have in common."""

    data: str
    timm: str
    torchvision: str
    model: str
    px: int
    batch_size: int
    lr: float
    epochs: int
    workers: int

    @property
    def images(self) -> int:
        """The number of training images."""
        return sum(1 for _ in Path(self.data, "train").glob("*/*"))

    def commands(self, seed: int, out: str) -> dict[str, list[str]]:
        """Return the command of each script."""
        timm_model, timm_arguments = _TIMM_MODELS[self.model]
        more = {
            "seed": seed,
            "out": out,
            "timm_model": timm_model,
            "timm_arguments": timm_arguments,
            "crop_share": _CROP_SHARE,
            "least_lr": self.lr / 100,
            "steps_per_epoch": self.images // self.batch_size,
            "resized_px": int(self.px / _CROP_SHARE),
        }
        values = {name: shlex.quote(str(value)) for name, value in {**asdict(self), **more}.items()}
        convoy, timm, torchvision = (
            shlex.split(template.format(**values)) for template in (_CONVOY, _TIMM, _TORCHVISION)
        )
        return {
            "convoy": [sys.executable, *convoy],
            "timm": [sys.executable, *timm],
            "torchvision": [sys.executable, "-c", _LAUNCH_TORCHVISION, *torchvision],
        }


def accuracies(name: str, folder: Path) -> list[float]:
    """Return the validation accuracy of every epoch so far."""
    if name == "convoy":
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["valid_accuracy"] for line in lines]
    if name == "timm":
        path = folder / "run" / "summary.csv"
        rows = [line.split(",") for line in path.read_text().split()] if path.exists() else [[]]
        return [float(row[rows[0].index("eval_top1")]) / 100 for row in rows[1:]]
    lines = (folder / "log").read_text().splitlines()
    found = [line.split() for line in lines if line.startswith("Test:") and "Acc@1" in line]
    return [float(words[words.index("Acc@1") + 1]) / 100 for words in found]


def _end_of_log(folder: Path) -> str:
    return (folder / "log").read_text()[-2000:]


class Running:
    """A script in a process group of its own, stopped except during `epoch_s`."""

    def __init__(self, command: Sequence[str], folder: Path, epochs: Callable[[], int]) -> None:
        self._folder, self._epochs = folder, epochs
        with (folder / "log").open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )

    def epoch_s(self) -> float:
        """Let it run until it reports an epoch; return the seconds."""
        before, began = self._epochs(), time.perf_counter()
        self._send(signal.SIGCONT)
        while self._epochs() == before:
            if self._process.poll() is not None:
                raise RuntimeError(_end_of_log(self._folder))
            time.sleep(_LOOK_EVERY_S)
        self._send(signal.SIGSTOP)
        return time.perf_counter() - began

    def end(self) -> None:
        """End it and its workers."""
        self._send(signal.SIGKILL)
        self._process.wait()

    def _send(self, number: int) -> None:
        os.killpg(self._process.pid, number)


def compare_speed(setup: Setup, rounds: int) -> None:
    """Measure epochs in turn, after two of each script."""
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as parent, ExitStack() as stack:
        running = {}
        for name in setup.commands(0, ""):
            folder = Path(parent, name)
            folder.mkdir()
            command = setup.commands(0, str(folder))[name]

            def done(name: str = name, folder: Path = folder) -> int:
                return len(accuracies(name, folder))

            running[name] = Running(command, folder, done)
            stack.callback(running[name].end)
            for _ in range(2):
                running[name].epoch_s()
        for number in range(rounds):
            for name, script in running.items():
                rates.setdefault(name, []).append(setup.images / script.epoch_s())
            shown = ", ".join(f"{name} {found[-1]:.1f}" for name, found in rates.items())
            print(f"round {number + 1}: {shown} images/s", file=sys.stderr, flush=True)
    rows = []
    for name, found in rates.items():
        ratios = (ours / theirs for ours, theirs in zip(rates["convoy"], found, strict=True))
        rows.append([name, spread(found, 1), "" if name == "convoy" else spread(ratios, 2)])
    print(table(["script", "images/s", "convoy is"], rows))


def compare_accuracy(setup: Setup, seeds: Sequence[int]) -> None:
    """Train with each seed; print the validation accuracy of the last epoch."""
    found: dict[str, list[float]] = {}
    for seed in seeds:
        for name in setup.commands(seed, ""):
            with tempfile.TemporaryDirectory() as out, Path(out, "log").open("w") as log:
                command = setup.commands(seed, out)[name]
                ran = subprocess.run(command, check=False, stdout=log, stderr=subprocess.STDOUT)
                if ran.returncode:
                    raise RuntimeError(_end_of_log(Path(out)))
                found.setdefault(name, []).append(accuracies(name, Path(out))[-1])
            print(f"{name}, seed {seed}: {found[name][-1]:.4f}", file=sys.stderr, flush=True)
    rows = []
    for name, values in found.items():
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        rows.append([name, f"{statistics.mean(values):.3f} ± {deviation:.3f}", spread(values, 3)])
    print(table(["script", "mean ± deviation", "median [least-greatest]"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["speed", "accuracy"])
    parser.add_argument("data")
    parser.add_argument("--timm", required=True)
    parser.add_argument("--torchvision", required=True)
    parser.add_argument("--model", choices=list(_TIMM_MODELS), default="resnet18")
    parser.add_argument("--px", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.0625)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    setup = Setup(
        data=options.data,
        timm=options.timm,
        torchvision=options.torchvision,
        model=options.model,
        px=options.px,
        batch_size=options.batch_size,
        lr=options.lr,
        # Those of the speed must outlast the rounds.
        epochs=options.rounds + 3 if options.what == "speed" else options.epochs,
        workers=options.workers,
    )
    if options.what == "speed":
        compare_speed(setup, options.rounds)
    else:
        compare_accuracy(setup, options.seeds)


if __name__ == "__main__":
    main()
