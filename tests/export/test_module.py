"""A net of one's own: from a file by the command, and from Python; served with the same proof."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import nn

import convoy.export
from convoy.export.__main__ import main
from convoy.export.errors import InputError
from convoy.export.source import from_checkpoint
from convoy.server.backends.device import Device, Runtime
from convoy.server.batching import BatchingLimits
from convoy.server.metrics.requests import ServerMetrics
from convoy.server.models.loader import LoadOptions, ModelLoader
from convoy.training import checkpoints
from convoy.training.checkpoints import Architecture, Checkpoint, DataDescription
from convoy.training.data import Preprocessing
from convoy.training.nets.factories import source_digest

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
LABELS = ("cat", "dog", "fox", "owl")
CODE = """
from torch import nn


class Small(nn.Module):
    def __init__(self, n_classes, width=4, ending=""):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=2)
        self.head = nn.Linear(width, n_classes)
        self.ending = {"softmax": nn.Softmax(1), "sigmoid": nn.Sigmoid(), "": nn.Identity()}[ending]

    def forward(self, pixels):
        return self.ending(3 * self.head(self.conv(pixels).relu().mean((2, 3))))
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_net.py"
    path.write_text(CODE)
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    return path


def make(file: Path, **arguments: object) -> nn.Module:
    from convoy.training import nets

    torch.manual_seed(4)
    return nets.create(f"{file}:Small", n_classes=len(LABELS), **arguments).eval()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["convoy-export", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def flags(folder: Path) -> list[object]:
    named = ["--name", "mine", "--repository", folder / "models"]
    return [*named, "--labels", folder / "labels.txt", "--mean", *MEAN, "--std", *STD]


def load_in_server(version: Path, runtime: Runtime = Runtime.ONNX_RUNTIME) -> None:
    """Has the server verify a version as it does before it reports ready."""
    limits = BatchingLimits(max_batch_size=2, max_queue_size=4)
    options = LoadOptions(runtime, (Device("cpu"),), 1, limits)
    ModelLoader(options, ServerMetrics(CollectorRegistry())).load(version)


def answers(version: Path, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    module = torch.jit.load(version / "model.torchscript")
    with torch.inference_mode():
        logits, probabilities = module(torch.from_numpy(images))
    return logits.numpy(), probabilities.numpy()


IMAGES = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


def eager(net: nn.Module) -> np.ndarray:
    pixels = torch.from_numpy(((IMAGES / 255 - MEAN) / STD).astype(np.float32)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        return net(pixels).numpy()


@pytest.mark.slow
def test_a_module_in_a_file_is_one_command(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = make(file, width=6)
    torch.save({"model_state_dict": net.state_dict()}, tmp_path / "net.pt")
    arguments = ["module", f"{file}:Small", "--weights", tmp_path / "net.pt", *flags(tmp_path)]
    assert run(monkeypatch, *arguments, "--set", "width=6", "--image-size-px", 16) == 0
    version = tmp_path / "models" / "mine" / "1"
    assert {path.name for path in version.glob("model.*")} == {"model.onnx", "model.torchscript"}
    load_in_server(version)
    np.testing.assert_allclose(answers(version, IMAGES)[0], eager(net), atol=1e-5)
    manifest = json.loads((version / "manifest.json").read_text())
    assert manifest["labels"] == list(LABELS)
    assert json.loads(manifest["provenance"]["architecture_arguments_json"])["width"] == 6
    # The server needs none of the code.
    for each in version.iterdir():
        assert str(tmp_path).encode() not in each.read_bytes()


def test_publish_from_python(file: Path, tmp_path: Path) -> None:
    net = make(file)
    published = convoy.export.publish(
        net,
        name="mine",
        labels=LABELS,
        mean=MEAN,
        std=STD,
        image_size_px=(16, 16),
        interpolation="bicubic",
        formats=["torchscript"],
        repository=tmp_path / "models",
        arguments={"width": 4},
    )
    assert published.path == tmp_path / "models" / "mine" / "1"
    np.testing.assert_allclose(answers(published.path, IMAGES)[0], eager(net), atol=1e-5)
    assert published.manifest.preprocessing.interpolation == 2
    assert published.manifest.provenance.architecture == "Small"
    with pytest.raises(InputError, match=r"formats: expected one of onnx, .*got 'caffe'"):
        convoy.export.publish(
            net, name="mine", labels=LABELS, mean=MEAN, std=STD, formats=["caffe"]
        )


def test_channels_of_a_net_of_opencv(file: Path, tmp_path: Path) -> None:
    net = make(file)
    published = convoy.export.publish(
        net,
        name="mine",
        labels=LABELS,
        mean=MEAN,
        std=STD,
        image_size_px=16,
        channel_order="bgr",
        formats=["torchscript"],
        repository=tmp_path / "models",
    )

    class Reversed(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return net(pixels.flip(1))

    np.testing.assert_allclose(answers(published.path, IMAGES)[0], eager(Reversed()), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "output"), [("softmax", "probabilities"), ("sigmoid",) * 2])
def test_a_net_that_ends_in_an_activation(
    ending: str,
    output: str,
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["module", f"{file}:Small", *flags(tmp_path), "--set", f"ending={ending}"]
    arguments += ["--image-size-px", 16]
    if ending == "softmax":
        assert run(monkeypatch, *arguments) == 2
        assert "--output probabilities" in capsys.readouterr().err
    torch.manual_seed(4)
    assert run(monkeypatch, *arguments, "--output", output) == 0
    version = tmp_path / "models" / "mine" / "1"
    load_in_server(version)
    logits, probabilities = answers(version, IMAGES)
    np.testing.assert_allclose(probabilities, eager(make(file, ending=ending)), atol=1e-6)
    np.testing.assert_allclose(logits, np.log(np.maximum(probabilities, 1e-4)), atol=1e-3)
    manifest = json.loads((version / "manifest.json").read_text())
    assert manifest.get("activation") == ("ACTIVATION_SIGMOID" if ending == "sigmoid" else None)
    # Its golden samples prove it again.
    assert run(monkeypatch, "verify", version) == 0


@pytest.mark.parametrize(
    ("flag", "values", "complaint"),
    [
        ("--mean", (123.7, 116.3, 103.5), "mean: .* got 123.7; divide it by 255"),
        ("--mean", (-0.5, 0.5, 0.5), "mean: expected numbers from 0 to 1, .*got -0.5"),
        ("--mean", ("inf", 0.5, 0.5), "mean: .*got inf"),
        ("--std", (58.4, 57.1, 57.4), "std: .* got 58.4; divide it by 255"),
        ("--std", (0, 0.5, 0.5), "std: expected numbers from 0.001 to 1"),
        ("--std", ("nan", 0.5, 0.5), "std: .*got nan"),
        ("--resize-shorter-px", (8,), "resize_shorter_px: expected 0 or at least"),
        ("--image-size-px", ("12x",), "image_size_px: expected PX or HEIGHTxWIDTH"),
        ("--interpolation", ("lanczos",), "interpolation: expected bilinear or bicubic"),
    ],
)
def test_an_impossible_description_is_one_line(
    flag: str,
    values: tuple[object, ...],
    complaint: str,
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["module", f"{file}:Small", *flags(tmp_path), "--image-size-px", 16]
    assert run(monkeypatch, *arguments, flag, *values) == 2
    captured = capsys.readouterr().err
    assert captured.count("\n") == 1
    import re

    assert re.search(complaint, captured)
    assert not (tmp_path / "models").exists()


def test_a_checkpoint_of_a_users_net_needs_the_factory(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = f"{file}:Small"
    net = make(file)
    architecture = Architecture(name, {"n_classes": len(LABELS)}, source_digest(name))
    data = DataDescription("", LABELS, MEAN, STD, Preprocessing(16, 16))
    path = tmp_path / "best.pt"
    checkpoints.save(path, Checkpoint(net.state_dict(), architecture, data))
    with pytest.raises(InputError, match="add --model"):
        from_checkpoint(path)
    arguments = [path, "--name", "mine", "--repository", tmp_path / "models"]
    assert run(monkeypatch, *arguments) == 2
    assert "creates its net" in capsys.readouterr().err
    assert run(monkeypatch, *arguments, "--model", name, "--format", "torchscript") == 0
    version = tmp_path / "models" / "mine" / "1"
    np.testing.assert_allclose(answers(version, IMAGES)[0], eager(net), atol=1e-5)


@pytest.mark.slow
def test_a_timm_net_uses_its_published_constants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model("test_efficientnet", num_classes=4).eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    arguments = ["weights", tmp_path / "net.pth", "--architecture", "timm:test_efficientnet"]
    arguments += ["--labels", tmp_path / "labels.txt", "--name", "mine"]
    arguments += ["--repository", tmp_path / "models", "--format", "onnx"]
    assert run(monkeypatch, *arguments) == 0
    version = tmp_path / "models" / "mine" / "1"
    load_in_server(version)
    manifest = json.loads((version / "manifest.json").read_text())
    config = timm.get_pretrained_cfg("test_efficientnet")
    assert manifest["normalization"] == {"mean": list(config.mean), "std": list(config.std)}
    steps = manifest["preprocessing"]
    assert steps["height_px"] == config.input_size[1]
    assert steps["resize_shorter_px"] == int(config.input_size[1] / config.crop_pct)
    assert steps["interpolation"] == "INTERPOLATION_BICUBIC"


def test_without_images_the_proof_says_so(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        published = convoy.export.publish(
            make(file),
            name="mine",
            labels=LABELS,
            mean=MEAN,
            std=STD,
            image_size_px=16,
            formats=["torchscript"],
            repository=tmp_path,
        )
    assert "runs on generated images and measures no accuracy" in caplog.text
    (artifact,) = published.manifest.artefacts
    assert artifact.parity.samples >= 64
    assert not artifact.parity.HasField("accuracy")
    assert not artifact.parity.HasField("reference_accuracy")
