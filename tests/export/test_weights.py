"""Weights from outside: torchvision's architectures, safetensors and plain state_dicts."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from convoy.export.__main__ import main
from tests.export.conftest import perturb_batch_norms


@pytest.fixture(scope="module")
def resnet() -> torch.nn.Module:
    torch.manual_seed(0)
    net = models.resnet18(weights=None, num_classes=10)
    perturb_batch_norms(net)
    return net.eval()


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    path = tmp_path / "labels.txt"
    path.write_text("\n".join("0123456789") + "\n")
    return path


def run(monkeypatch: pytest.MonkeyPatch, file: Path, labels: Path, *more: object) -> int:
    flags = ["--name", "outside", "--repository", file.parent / "models", "--labels", labels]
    flags += ["--architecture", "resnet18", "--data", "digits", "--image-size-px", 32]
    flags += ["--mean", 0.4, 0.5, 0.6, "--std", 0.2, 0.3, 0.4, "--format", "torchscript", *more]
    monkeypatch.setattr(sys, "argv", ["convoy-export", "weights", str(file), *map(str, flags)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_foreign_state_dict_is_published_as_the_flags_describe(
    suffix: str,
    resnet: torch.nn.Module,
    labels: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / f"resnet{suffix}"
    if suffix == ".safetensors":
        save_file(resnet.state_dict(), path)
    else:
        torch.save(resnet.state_dict(), path)
    assert run(monkeypatch, path, labels) == 0
    version = tmp_path / "models" / "outside" / "1"
    manifest = json.loads((version / "manifest.json").read_text())
    assert manifest["normalization"] == {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    assert manifest["provenance"]["architecture"] == "resnet18"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest["provenance"]["checkpoint_sha256"] == digest
    module = torch.jit.load(version / "model.torchscript")
    image = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    with torch.inference_mode():
        expected = resnet(((image / 255 - mean) / std).permute(0, 3, 1, 2))
        torch.testing.assert_close(module(image)[0], expected, atol=1e-4, rtol=1e-4)


def test_weights_of_another_shape_are_one_line_and_status_2(
    resnet: torch.nn.Module,
    labels: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_file(resnet.state_dict(), tmp_path / "resnet.safetensors")
    labels.write_text("cat\ndog\n")
    assert run(monkeypatch, tmp_path / "resnet.safetensors", labels) == 2
    captured = capsys.readouterr().err
    assert captured.count("\n") == 1
    assert "fc.weight" in captured
    assert not (tmp_path / "models").exists()


def test_a_damaged_safetensors_file_is_one_line_and_status_2(
    labels: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"\x00" * 64)
    assert run(monkeypatch, tmp_path / "bad.safetensors", labels) == 2
    assert capsys.readouterr().err.count("\n") == 1
