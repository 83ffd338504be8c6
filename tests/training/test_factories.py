"""Nets made by the user's own code, and by timm."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convoy.training import checkpoints, nets
from convoy.training.errors import CheckpointError, NetError
from convoy.training.nets.factories import source_digest, timm_input
from tests.training.test_command import train

CODE = """
import torch
from torch import nn
from neighbor import WIDTH


class Small(nn.Module):
    def __init__(self, num_classes=10, width=WIDTH):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=2)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, pixels):
        return self.head(self.norm(self.conv(pixels)).relu().amax((2, 3)))


def make_net(n_classes, image_size, width=4):
    assert image_size == 32
    return Small(n_classes, width)


def fails():
    raise RuntimeError("no such\\nlayer")


def not_a_net():
    return 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_net.py"
    path.write_text(CODE)
    (tmp_path / "neighbor.py").write_text("WIDTH = 6\n")
    return path


def test_a_factory_gets_the_classes_and_size_that_it_takes(file: Path) -> None:
    net = nets.create(f"{file}:make_net", n_classes=7, image_size=32)
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    net = nets.create(f"{file}:Small", n_classes=5, image_size=32, width=3)
    assert net.conv.out_channels == 3
    assert net.head.out_features == 5


def test_a_module_of_the_present_folder(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "their_package_for_this_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "models.py").write_text(CODE.replace("from neighbor import WIDTH", "WIDTH = 6"))
    name = "their_package_for_this_test.models:make_net"
    assert nets.create(name, n_classes=2, image_size=32)(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


@pytest.mark.parametrize(
    ("factory", "complaint"),
    [
        ("fails", r"my_net\.py:fails: RuntimeError: no such layer$"),
        ("not_a_net", r"expected a torch\.nn\.Module, got int"),
        (
            "missing",
            "expected a function or class defined in the file, which has Small, fails, make_net",
        ),
    ],
)
def test_what_goes_wrong_in_the_factory_is_one_line(
    factory: str, complaint: str, file: Path
) -> None:
    with pytest.raises(NetError, match=complaint):
        nets.create(f"{file}:{factory}")


def test_a_missing_or_broken_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(NetError, match=r"no file .*nowhere\.py"):
        nets.create(f"{tmp_path}/nowhere.py:make")
    (tmp_path / "broken.py").write_text("def make(:\n")
    with pytest.raises(NetError, match=r"broken\.py:make: SyntaxError"):
        nets.create(f"{tmp_path}/broken.py:make")
    with pytest.raises(NetError, match="ModuleNotFoundError"):
        nets.create("no_such_package_anywhere.models:make")


@pytest.mark.slow
def test_training_records_module_arguments_and_digest(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, out = f"{file}:make_net", tmp_path / "run"
    flags = ["--data", "digits", "--model", name, "--epochs", 1, "--out", out]
    assert train(monkeypatch, *flags, "--set", "model_arguments={width=5}") == 0
    checkpoint = checkpoints.load(out / "best.pt")
    assert checkpoint.architecture.name == name
    assert checkpoint.architecture.arguments["width"] == 5
    assert checkpoint.architecture.source_sha256 == source_digest(name)
    assert json.loads((out / "config.json").read_text())["recipe"]["model"] == name
    # Reading a checkpoint runs no code, so the model has to be named.
    with pytest.raises(CheckpointError, match=r"runs only if you name it; add --model .*:make_"):
        checkpoint.build_net()
    with pytest.raises(CheckpointError, match=r"expected .*make_net, as in the training, got net"):
        checkpoint.build_net("net")
    assert checkpoint.build_net(name)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    file.write_text(CODE + "\n# changed\n")
    with pytest.raises(CheckpointError, match="expected the source of the training"):
        checkpoint.build_net(name)


def test_timm_has_a_net_its_preprocessing_and_its_own_head() -> None:
    pytest.importorskip("timm")
    net = nets.create("timm:test_resnet", n_classes=10).eval()
    assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    found = timm_input("timm:resnet18.a1_in1k")
    assert found.mean == (0.485, 0.456, 0.406)
    steps = found.preprocessing
    assert (steps.height_px, steps.resize_shorter_px, steps.interpolation) == (224, 235, "bicubic")
    assert timm_input("timm:resnet18.a1_in1k", 96).preprocessing.resize_shorter_px == 101
    with pytest.raises(NetError, match=r"expected one of timm\.list_models"):
        nets.create("timm:no_such_net")


@pytest.mark.slow
def test_training_a_timm_net_takes_its_constants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    flags = ["--data", "digits", "--model", "timm:test_resnet", "--epochs", 1, "--out", tmp_path]
    assert train(monkeypatch, *flags, "--image-size", 32, "--recipe", "digits") == 0
    checkpoint = checkpoints.load(tmp_path / "best.pt")
    expected = timm_input("timm:test_resnet", 32)
    assert checkpoint.data.mean == pytest.approx(expected.mean)
    assert checkpoint.data.preprocessing == expected.preprocessing
    assert checkpoint.build_net()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.slow
def test_a_net_of_a_hub_that_is_out_of_reach_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    # A fresh process, since this is read once. A rejected connection is tried again for 23 s.
    surroundings = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "convoy.training", "--model", "timm:hf-hub:timm/resnet18"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "run"],
        env=surroundings,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "convoy-train: model timm:hf-hub:timm/resnet18: its hub cannot be reached; download the "
        "weights and name them with --weights\n"
    )
