"""What a published version holds, read with other libraries than those that wrote it."""

import hashlib
import importlib.metadata
import io
import json
import os
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from google.protobuf import json_format
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from convoy.export.errors import ParityError, UnsupportedNetError
from convoy.export.formats import ArtifactFormat, Variant
from convoy.export.pipeline import LOADERS, ExportOptions, Published, export
from convoy.export.repository import ModelFolder
from convoy.export.samples import Samples
from convoy.export.servable import Servable
from convoy.export.source import ModelSource
from convoy.training.data import ImageSet
from convoy.training.data.images import preprocess
from convoy.v1 import model_manifest_pb2 as pb
from tests.export.conftest import MEAN, PORTABLE_FORMATS, STD, TEMPERATURE


@pytest.fixture
def manifest(published: Published) -> pb.ModelManifest:
    text = (published.path / "manifest.json").read_text()
    return json_format.Parse(text, pb.ModelManifest())


def torchvision_logits(net: nn.Module, images: np.ndarray) -> np.ndarray:
    """The reference of the field: ToImage, ToDtype and Normalize of torchvision, image by image."""
    prepare = v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    )
    with torch.inference_mode():
        return net(torch.stack([prepare(image) for image in images])).numpy()


@pytest.mark.slow
def test_a_version_holds_exactly_the_files_asked_for(published: Published) -> None:
    assert published.path.name == "1"
    names = {entry.name for entry in published.path.iterdir()}
    assert names == {
        "manifest.json",
        "model.onnx",
        "model.pt2",
        "model.torchscript",
        "report.png",
        "samples.npz",
    }
    assert not [entry for entry in published.path.parent.iterdir() if entry.name != "1"]


def test_every_file_has_the_size_and_digest_that_the_manifest_states(
    published: Published, manifest: pb.ModelManifest
) -> None:
    records = [artifact.file for artifact in manifest.artefacts]
    records += [manifest.samples.file, manifest.report]
    assert len(records) == 5
    for record in records:
        content = (published.path / record.name).read_bytes()
        assert len(content) == record.size_bytes
        assert hashlib.sha256(content).hexdigest() == record.sha256


def test_manifest_says_what_the_checkpoint_said(
    manifest: pb.ModelManifest, source: ModelSource, tiny_checkpoint: Path
) -> None:
    assert (manifest.schema_version, manifest.name, manifest.version) == (1, "digits", 1)
    assert list(manifest.labels) == list("0123456789")
    assert list(manifest.normalization.mean) == list(MEAN)
    assert manifest.temperature == TEMPERATURE
    digest = hashlib.sha256(tiny_checkpoint.read_bytes()).hexdigest()
    assert manifest.provenance.checkpoint_sha256 == digest
    assert json.loads(manifest.provenance.architecture_arguments_json)["n_blocks"] == 2
    assert manifest.provenance.parameters == sum(p.numel() for p in source.net.parameters())
    assert dict(manifest.provenance.accuracy) == {"valid": 0.25}


def test_manifest_records_cost_and_accuracy(manifest: pb.ModelManifest) -> None:
    first = 32 * 32 * 8 * 3 * 9
    blocks = 2 * 16 * 16 * 8 * 8 * 9
    head = 8 * 8 * 8 * 32 + 32 * 10
    assert manifest.provenance.multiply_adds == first + blocks + head
    for artifact in manifest.artefacts:
        assert artifact.precision == pb.PRECISION_FP32
        sizes = [latency.batch_size for latency in artifact.latencies]
        assert sizes == [1, 2, 4, 8, 16, 32, 64][: len(sizes)] != []
        assert all(0 < latency.median_s < 5 for latency in artifact.latencies)
        assert artifact.parity.accuracy == artifact.parity.reference_accuracy > 0


@pytest.mark.parametrize("form", PORTABLE_FORMATS)
@pytest.mark.parametrize("batch_size", [1, 3, 8, 65])
def test_an_artifact_agrees_with_torchvision_normalization(
    published: Published,
    source: ModelSource,
    real: ImageSet,
    form: ArtifactFormat,
    batch_size: int,
) -> None:
    images = real.images[:batch_size]
    found = LOADERS[form](published.path / Variant(form).file_name)(images)
    logits = torchvision_logits(source.net, images)
    np.testing.assert_allclose(found.logits, logits, atol=1e-5)
    scaled = np.exp(logits / TEMPERATURE)
    np.testing.assert_allclose(
        found.probabilities, scaled / scaled.sum(axis=1, keepdims=True), atol=1e-6
    )


def test_onnx_is_one_portable_file_with_a_free_batch_axis(published: Published) -> None:
    path = published.path / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    image, *outputs = (*model.graph.input, *model.graph.output)
    assert image.name == "image"
    assert [output.name for output in outputs] == ["logits", "probabilities"]
    dims = image.type.tensor_type.shape.dim
    assert dims[0].dim_param == "batch"
    assert [dim.dim_value for dim in dims[1:]] == [32, 32, 3]
    assert not [node.op_type for node in model.graph.node if node.op_type in {"Shape", "Range"}]
    repository_root = Path(__file__).parents[2]
    for trace in (str(repository_root), os.path.expanduser("~"), "site-packages", ".py"):
        assert trace.encode() not in path.read_bytes()


def test_onnx_metadata_describes_the_model(published: Published) -> None:
    session = ort.InferenceSession(
        published.path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["name"] == "digits"
    assert json.loads(metadata["labels"]) == list("0123456789")
    assert json.loads(metadata["accuracy"]) == {"valid": 0.25}
    assert len(metadata["checkpoint_sha256"]) == 64
    assert metadata["input_layout"] == "uint8 [N, 32, 32, 3], RGB"
    assert f"torch {importlib.metadata.version('torch')}" in metadata["producer"]


def test_onnx_rejects_another_size_and_type(published: Published) -> None:
    run = LOADERS[ArtifactFormat.ONNX](published.path / "model.onnx")
    with pytest.raises(Exception, match="dimensions"):
        run(np.zeros((1, 48, 48, 3), np.uint8))
    with pytest.raises(Exception, match="uint8"):
        run(np.zeros((1, 32, 32, 3), np.float32))


def test_torchscript_carries_its_description_and_returns_a_tuple(published: Published) -> None:
    extra = {"config.json": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.load(published.path / "model.torchscript", _extra_files=extra)
    assert json.loads(json.loads(extra["config.json"])["labels"]) == list("0123456789")
    outputs = module(torch.zeros(2, 32, 32, 3, dtype=torch.uint8))
    assert isinstance(outputs, tuple)
    assert [tuple(output.shape) for output in outputs] == [(2, 10), (2, 10)]


def test_golden_samples_need_no_pickle_and_are_what_their_pictures_decode_to(
    published: Published, manifest: pb.ModelManifest, source: ModelSource
) -> None:
    with np.load(published.path / "samples.npz", allow_pickle=False) as samples:
        images, logits, labels = samples["images"], samples["logits"], samples["labels"]
        encoded, offsets = samples["encoded"].tobytes(), samples["encoded_offsets"]
    assert manifest.samples.count == len(images) == len(labels) == 16
    assert (images.dtype, logits.dtype, labels.dtype) == (np.uint8, np.float32, np.int64)
    for image, start, end in zip(images, offsets[:-1], offsets[1:], strict=True):
        picture = Image.open(io.BytesIO(encoded[start:end]))
        assert picture.size == (41, 43)
        np.testing.assert_array_equal(preprocess(picture, source.data.preprocessing), image)
    np.testing.assert_allclose(logits, torchvision_logits(source.net, images), atol=1e-5)


def test_the_next_export_is_version_2_and_leaves_version_1_alone(
    source: ModelSource, samples: Samples, tmp_path: Path
) -> None:
    options = ExportOptions(variants=[Variant(ArtifactFormat.TORCHSCRIPT)], script=True)
    first = export(source, samples, ModelFolder(tmp_path, "digits"), options)
    before = (first.path / "manifest.json").read_bytes()
    second = export(source, samples, ModelFolder(tmp_path, "digits"), options)
    assert second.path == tmp_path / "digits" / "2"
    assert second.manifest.version == 2
    assert (first.path / "manifest.json").read_bytes() == before
    assert not os.access(first.path / "manifest.json", os.W_OK) or os.geteuid() == 0


def test_a_net_that_a_trace_cannot_hold_publishes_nothing(
    source: ModelSource, samples: Samples, tmp_path: Path
) -> None:
    class Moody(nn.Module):
        """Looks at its input to decide, which a trace cannot."""

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            dark = bool((pixels.mean((1, 2, 3)) < 0).all())
            return pixels.mean((2, 3)).repeat(1, 4)[:, :10] * (-1.0 if dark else 1.0)

    moody = ModelSource(Moody().eval(), source.data, 1.0, source.checkpoint_sha256, "moody", {}, {})
    options = ExportOptions(variants=[Variant(ArtifactFormat.TORCHSCRIPT)])
    with pytest.raises(ParityError, match=r"model.torchscript, batch size \d+, .* sample"):
        export(moody, samples, ModelFolder(tmp_path, "digits"), options)
    assert not list(tmp_path.iterdir())


def test_a_net_that_onnx_cannot_express_publishes_nothing(
    source: ModelSource, samples: Samples, tmp_path: Path
) -> None:
    class OneSize(nn.Module):
        """Works for the example's batch size only."""

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return (
                pixels.reshape(2, -1)[:, :10]
                if pixels.shape[0] == 2
                else pixels.flatten(1)[:, 1:11]
            )

    broken = ModelSource(
        OneSize().eval(), source.data, 1.0, source.checkpoint_sha256, "one_size", {}, {}
    )
    options = ExportOptions(variants=[Variant(ArtifactFormat.ONNX)])
    with pytest.raises((UnsupportedNetError, ParityError)):
        export(broken, samples, ModelFolder(tmp_path, "digits"), options)
    assert not list(tmp_path.iterdir())


def test_servable_normalizes_a_white_image_by_hand() -> None:
    servable = Servable(nn.Flatten(), MEAN, STD, 1.0)
    logits, probabilities = servable(torch.full((1, 1, 2, 3), 255, dtype=torch.uint8))
    expected = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(logits, expected.repeat_interleave(2)[None], atol=1e-6, rtol=0)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(1))
