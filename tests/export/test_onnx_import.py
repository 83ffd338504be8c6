"""A user's own ONNX file: proved like ours, or refused in one line."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from export.__main__ import main
from export.source import ModelSource

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def exported(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny net as somebody else would export it: normalised NCHW in, logits out."""
    path = tmp_path_factory.mktemp("foreign") / "foreign.onnx"
    torch.onnx.export(
        source.net,
        (torch.zeros(2, 3, 32, 32),),
        path,
        dynamo=True,
        verbose=False,
        external_data=False,
        dynamic_shapes=({0: "n"},),
    )
    return path


@pytest.fixture
def foreign(exported: Path, tmp_path: Path) -> onnx.ModelProto:
    return onnx.load(exported)


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, file: Path, *more: object) -> int:
    labels = folder / "labels.txt"
    if not labels.exists():
        labels.write_text("\n".join("0123456789"))
    flags = ["--name", "foreign", "--repository", folder / "models", "--labels", labels]
    flags += ["--mean", *MEAN, "--std", *STD, "--data", "digits", *more]
    monkeypatch.setattr(sys, "argv", ["convoy-export", "import", str(file), *map(str, flags)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_a_foreign_file_is_published_behind_our_input_and_outputs(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, tmp_path, exported) == 0
    version = tmp_path / "models" / "foreign" / "1"
    assert {path.name for path in version.iterdir()} == {
        "manifest.json",
        "model.onnx",
        "report.png",
        "samples.npz",
    }
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    ours, theirs = (
        ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        for path in (version / "model.onnx", exported)
    )
    normalised = ((images / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32)
    (expected,) = theirs.run(None, {theirs.get_inputs()[0].name: normalised})
    logits, probabilities = ours.run(["logits", "probabilities"], {"image": images})
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    manifest = json.loads((version / "manifest.json").read_text())
    assert manifest["provenance"]["architecture"] == "onnx"
    assert int(manifest["provenance"]["parameters"]) > 10_000


def refuse(
    model: onnx.ModelProto,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """Imports a model that must be refused and returns the complaint."""
    path = folder / "foreign.onnx"
    path.write_bytes(model.SerializeToString())
    assert run(monkeypatch, folder, path) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert not (folder / "models").exists()
    return complaint


def test_weights_outside_the_file_are_refused(
    foreign: onnx.ModelProto,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensor = foreign.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    assert "outside" in refuse(foreign, tmp_path, monkeypatch, capsys)


def test_operators_of_another_domain_are_refused(
    foreign: onnx.ModelProto,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    foreign.opset_import.add(domain="com.example", version=1)
    assert "com.example" in refuse(foreign, tmp_path, monkeypatch, capsys)


def test_a_fixed_batch_axis_is_refused(
    foreign: onnx.ModelProto,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for value in (foreign.graph.input[0], foreign.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    assert "free first axis" in refuse(foreign, tmp_path, monkeypatch, capsys)


def test_another_number_of_classes_is_refused(
    foreign: onnx.ModelProto,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    assert "output" in refuse(foreign, tmp_path, monkeypatch, capsys)


def test_a_file_that_is_no_onnx_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.onnx").write_bytes(b"not a graph")
    assert run(monkeypatch, tmp_path, tmp_path / "text.onnx") == 2
    assert capsys.readouterr().err.count("\n") == 1
