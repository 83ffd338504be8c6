"""The page beside the artifacts shows what the manifest says."""

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from convoy.export import report
from convoy.export.cost import BatchLatency
from convoy.export.formats import ArtifactFormat, Precision, Variant
from convoy.export.manifest import ProvedArtifact
from convoy.export.pipeline import Published
from convoy.export.proof import Parity
from convoy.export.reference import Expectation, expect
from convoy.export.samples import Samples
from convoy.export.source import ModelSource

PARITY = Parity(
    samples=277,
    validation_samples=249,
    batch_sizes=(1, 64),
    max_logit_difference=0.02,
    logit_difference_p999=0.01,
    tolerance=0.05,
    argmax_agreement=0.99,
    reference_accuracy=0.9,
    accuracy=0.8,
    class_accuracy=tuple(0.1 * label for label in range(10)),
)


@pytest.fixture(scope="module")
def expected(source: ModelSource, samples: Samples) -> Expectation:
    return expect(source, samples)


def test_it_is_a_picture_of_readable_size(published: Published) -> None:
    content = (published.path / "report.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width_px, height_px = struct.unpack(">II", content[16:24])
    assert width_px >= 1000
    assert height_px >= 400


def test_it_shows_parity_accuracy_by_class_and_latency(
    source: ModelSource, expected: Expectation, tmp_path: Path
) -> None:
    path = tmp_path / "model.fp16.onnx"
    path.write_bytes(b"123456")
    latencies = [BatchLatency(1, 0.001), BatchLatency(8, 0.004)]
    artifact = ProvedArtifact(Variant(ArtifactFormat.ONNX, Precision.FP16), path, PARITY, latencies)
    figure = report.write(tmp_path / "report.png", "digits", source, expected, [artifact])
    parity, accuracy, latency = figure.axes
    assert [line.get_xdata()[0] for line in parity.lines] == [0.01, 0.02, 0.05]
    assert "model.fp16.onnx" in parity.get_yticklabels()[0].get_text()
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), PARITY.class_accuracy)
    eager = [bar.get_height() for bar in accuracy.patches]
    labels, right = expected.labels[:249], expected.correct(expected.outputs.logits)
    np.testing.assert_allclose(eager, [right[labels == label].mean() for label in range(10)])
    np.testing.assert_allclose(latency.lines[0].get_ydata(), [1.0, 4.0])


def test_of_many_classes_the_matrix_shows_the_worst(
    source: ModelSource, expected: Expectation, tmp_path: Path
) -> None:
    count = 40
    logits = np.eye(count, dtype=np.float32)[np.arange(len(expected.images)) % count]
    labels = np.arange(expected.real_count) % count
    labels[labels >= 30] = 0
    outputs = expected.outputs._replace(logits=logits)
    many = replace(expected, labels=labels, outputs=outputs, validation_count=200)
    data = replace(source.data, classes=tuple(map(str, range(count))))
    shown = replace(source, data=data)
    parity = replace(PARITY, class_accuracy=(0.5,) * count)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    artifact = ProvedArtifact(Variant(ArtifactFormat.ONNX), path, parity, [BatchLatency(1, 0.1)])
    accuracy = report.write(tmp_path / "report.png", "many", shown, many, [artifact]).axes[1]
    names = [label.get_text() for label in accuracy.get_xticklabels()]
    assert len(names) == 20
    assert names[0] == "0"
    assert "30 classes" in accuracy.get_title()
