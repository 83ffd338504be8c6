import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convoy.training import checkpoints
from tests.training.test_command import train

ARGUMENTS = ("--model", "net", "--epochs", "2", "--set", "l2=1e-4", "--set", "flip=random")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
def test_two_processes_follow_the_loss_curve_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1,249 images in batches of 64 the last is odd: the two take unequal parts of it."""
    assert train(monkeypatch, *ARGUMENTS, "--out", tmp_path / "one") == 0
    command = [
        sys.executable,
        *TORCHRUN,
        "-m",
        "convoy.training",
        *ARGUMENTS,
        "--out",
        tmp_path / "two",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch   1") == 1
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    for name in ("train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "penalty", "lr"):
        ours, expected = ([line[name] for line in lines] for lines in (two, one))
        assert ours == pytest.approx(expected, rel=1e-4), name
    ends = [checkpoints.load(tmp_path / name / "best.pt") for name in ("one", "two")]
    assert ends[1].metrics == pytest.approx(ends[0].metrics, rel=1e-4)
    for name, value in ends[0].state_dict.items():
        torch.testing.assert_close(ends[1].state_dict[name], value, atol=1e-4, rtol=1e-3)
