"""A user's own ONNX file: proved like ours, or rejected in one line."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from prometheus_client import CollectorRegistry

from convoy.export.__main__ import main
from convoy.export.description import InputDescription
from convoy.export.errors import InputError
from convoy.export.foreign import read_foreign
from convoy.export.formats import Precision
from convoy.export.publisher import Order, publish_source
from convoy.export.repository import ModelFolder
from convoy.export.source import ModelSource
from convoy.server.backends.device import Device, Runtime
from convoy.server.batching import BatchingLimits
from convoy.server.metrics.requests import ServerMetrics
from convoy.server.models.loader import LoadOptions, ModelLoader
from convoy.v1 import model_manifest_pb2 as pb
from tests.export import graphs

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def exported(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny net as somebody else would export it: normalized NCHW in, logits out."""
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


@pytest.mark.slow
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
    normalized = ((images / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32)
    (expected,) = theirs.run(None, {theirs.get_inputs()[0].name: normalized})
    logits, probabilities = ours.run(["logits", "probabilities"], {"image": images})
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    manifest = json.loads((version / "manifest.json").read_text())
    assert manifest["provenance"]["architecture"] == "onnx"
    assert int(manifest["provenance"]["parameters"]) > 10_000


def test_a_rejection_is_one_line_and_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.onnx").write_bytes(b"not a graph")
    assert run(monkeypatch, tmp_path, tmp_path / "text.onnx") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "models").exists()


def test_what_the_file_does_not_say_is_asked_for(
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--name", "foreign", "--repository", str(tmp_path / "models")]
    monkeypatch.setattr(sys, "argv", ["convoy-export", "import", str(exported), *flags])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "expected also --labels, --mean, --std" in capsys.readouterr().err


def test_int8_of_an_imported_graph(tmp_path: Path) -> None:
    """Whatever its operator set: scales for each channel need a newer one than some files have."""
    path = tmp_path / "old.onnx"
    onnx.save(graphs.model(domains={"": 12}, ir_version=7), path)
    described = InputDescription(labels=tuple("0123456789"), mean=MEAN, std=STD)
    order = Order(
        ModelFolder(tmp_path / "models", "old"),
        precisions=[Precision.INT8],
        data="digits",
        # The classes of a random net are too close together for its gate on some processors.
        openvino=False,
    )
    published = publish_source(read_foreign(path, described), order)
    names = {path.name for path in published.path.glob("*.onnx")}
    assert names == {"model.onnx", "model.int8.onnx"}
    operators = {node.op_type for node in onnx.load(published.path / "model.int8.onnx").graph.node}
    assert "QuantizeLinear" in operators
    assert {load(published.path, precision) for precision in ("fp32", "int8")} == {"fp32", "int8"}


def test_float16_inside_is_published_under_its_own_gate(tmp_path: Path) -> None:
    body = [
        onnx.helper.make_node("Cast", ["input"], ["half"], to=onnx.TensorProto.FLOAT16),
        *graphs.nodes(image="half", scores="half_scores"),
        onnx.helper.make_node("Cast", ["half_scores"], ["output"], to=onnx.TensorProto.FLOAT),
    ]
    path = tmp_path / "half.onnx"
    onnx.save(graphs.model(body, weights=graphs.half()), path)
    described = InputDescription(labels=tuple("0123456789"), mean=MEAN, std=STD)
    source = read_foreign(path, described)
    published = publish_source(source, Order(ModelFolder(tmp_path / "models", "half")))
    assert [path.name for path in published.path.glob("*.onnx")] == ["model.fp16.onnx"]
    (artifact,) = published.manifest.artefacts
    assert artifact.precision == pb.PRECISION_FP16
    assert load(published.path, "fp16") == "fp16"
    order = Order(ModelFolder(tmp_path / "models", "half"), precisions=[Precision.INT8])
    with pytest.raises(InputError, match="precision int8: expected a model in fp32"):
        publish_source(source, order)


def load(version: Path, precision: str) -> str:
    """Has the server load and verify a version; returns the precision that runs."""
    limits = BatchingLimits(max_batch_size=2, max_queue_size=4)
    options = LoadOptions(Runtime.ONNX_RUNTIME, (Device("cpu"),), 1, limits, precision=precision)
    model = ModelLoader(options, ServerMetrics(CollectorRegistry())).load(version)
    return str(model.runs_on.precision)
