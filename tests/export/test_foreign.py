"""Models as other tools write them, imported by one command each."""

import json
import resource
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from PIL import Image
from torch import nn

from convoy.export import onnx_format
from convoy.export.description import InputDescription
from convoy.export.errors import InputError, ParityError
from convoy.export.foreign import Kind, kind_of, read_foreign
from convoy.export.formats import ArtifactFormat, ChannelOrder, Layout, Precision
from convoy.export.publisher import Order, publish_source
from convoy.export.repository import ModelFolder
from convoy.export.source import from_net
from convoy.export.versions import read_version
from convoy.server.backends.device import Runtime
from convoy.training import nets
from tests.export import graphs
from tests.export.test_module import load_in_server
from tests.needs import needs_openvino

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
LABELS = tuple("0123456789")
FLAGS = InputDescription(labels=LABELS, mean=MEAN, std=STD, image_size_px=(32, 32))
RUNTIMES = {
    ArtifactFormat.ONNX: Runtime.ONNX_RUNTIME,
    ArtifactFormat.TORCHSCRIPT: Runtime.TORCHSCRIPT,
    ArtifactFormat.EXPORTED_PROGRAM: Runtime.EXPORTED_PROGRAM,
}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return nets.create("net_res_deep", n_chans1=8, n_blocks=1).eval()


def publish(path: Path, folder: Path, flags: InputDescription, *formats: ArtifactFormat) -> Path:
    """Publishes an import and has the server load it."""
    published = publish_source(
        read_foreign(path, flags), Order(ModelFolder(folder / "models", "m"), formats)
    )
    for variant in published.parities:
        load_in_server(published.path, RUNTIMES[variant.format])
    return published.path


def test_torchscript_stays_torchscript(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.jit.save(torch.jit.trace(net, torch.zeros(2, 3, 32, 32)), path)
    assert kind_of(path) is Kind.TORCHSCRIPT
    version = publish(path, tmp_path, FLAGS)
    assert [each.name for each in version.glob("model.*")] == ["model.torchscript"]
    with pytest.raises(InputError, match="format: expected torchscript for a model of torchscript"):
        publish(path, tmp_path, FLAGS, ArtifactFormat.ONNX)


@pytest.mark.slow
def test_an_exported_program_becomes_onnx_and_pt2(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    images = (torch.zeros(2, 3, 32, 32),)
    shapes = ({0: torch.export.Dim("n")},)
    torch.export.save(torch.export.export(net, images, dynamic_shapes=shapes), path)
    assert kind_of(path) is Kind.EXPORTED_PROGRAM
    formats = (ArtifactFormat.ONNX, ArtifactFormat.EXPORTED_PROGRAM)
    version = publish(path, tmp_path, FLAGS, *formats)
    assert {each.name for each in version.glob("model.*")} == {"model.onnx", "model.pt2"}


def test_an_exported_program_of_a_fixed_batch_is_one_line(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(net, (torch.zeros(1, 3, 32, 32),)), path)
    with pytest.raises(InputError, match="the net fails on a batch of 64"):
        publish(path, tmp_path, FLAGS)
    assert not (tmp_path / "models").exists()


@pytest.fixture
def hugging_face(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        id2label={index: f"kind {index}" for index in range(12)},
        label2id={f"kind {index}": index for index in range(12)},
    )
    folder = tmp_path / "vit"
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    write_steps(folder, {"size": {"height": 32, "width": 32}})
    return folder


def write_steps(folder: Path, changes: dict[str, object]) -> None:
    steps = {
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps({**steps, **changes}))


@pytest.mark.slow
def test_a_hugging_face_folder_needs_no_flags(hugging_face: Path, tmp_path: Path) -> None:
    assert kind_of(hugging_face) is Kind.HUGGING_FACE
    version = publish(hugging_face, tmp_path, InputDescription(), ArtifactFormat.ONNX)
    manifest = json.loads((version / "manifest.json").read_text())
    # Not in the order of their names: 10 comes before 2 there.
    assert manifest["labels"] == [f"kind {index}" for index in range(12)]
    assert manifest["normalization"] == {"mean": list(MEAN), "std": list(STD)}
    assert manifest["preprocessing"] == {
        "height_px": 32,
        "width_px": 32,
        "interpolation": "INTERPOLATION_BICUBIC",
    }
    assert manifest["provenance"]["architecture"] == "ViTForImageClassification"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": 32},
            (32, 32, 40),
        ),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, (224, 224, 256)),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, (384, 384, 0)),
        ({"size": 32}, (32, 32, 0)),
    ],
)
def test_sizes_as_the_processors_write_them(
    changes: dict[str, object], expected: tuple[int, int, int], hugging_face: Path
) -> None:
    from convoy.export.huggingface import describe

    write_steps(hugging_face, changes)
    found = describe(hugging_face)
    assert found.image_size_px is not None
    assert (*found.image_size_px, found.resize_shorter_px) == expected


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"size": {"height": 32, "width": 32}, "resample": 1}, "resample: expected 2 .bilinear."),
        ({"size": {"height": 32, "width": 32}, "rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"size": {"longest_edge": 32}}, "size: expected height and width"),
    ],
)
def test_steps_that_cannot_be_expressed_are_rejected(
    changes: dict[str, object], complaint: str, hugging_face: Path
) -> None:
    write_steps(hugging_face, changes)
    with pytest.raises(InputError, match=complaint):
        read_foreign(hugging_face, InputDescription())


def write_triton(folder: Path, config: str) -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(config)
    (folder / "labels.txt").write_text("\n".join(LABELS))


TRITON = """
name: "theirs"
platform: "onnxruntime_onnx"
max_batch_size: 8
input [{ name: "input" data_type: TYPE_FP32 format: FORMAT_NCHW dims: [ 3, 32, 32 ] }]
output [{ name: "output" data_type: TYPE_FP32 dims: [ 10 ] label_filename: "labels.txt" }]
optimization { graph { level: 1 } }
"""


def test_a_triton_model_folder(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    write_triton(folder, TRITON)
    onnx.save(graphs.model(), folder / "1" / "model.onnx")
    assert kind_of(folder) is Kind.TRITON
    version = publish(folder, tmp_path, InputDescription(mean=MEAN, std=STD))
    assert json.loads((version / "manifest.json").read_text())["labels"] == list(LABELS)
    with pytest.raises(InputError, match=r"expected also --mean, --std"):
        read_foreign(folder, InputDescription())
    source = read_foreign(folder, InputDescription(layout=Layout.NCHW, mean=MEAN, std=STD))
    assert source.data.preprocessing.height_px == 32


def test_a_triton_folder_of_another_kind_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    write_triton(folder, 'platform: "tensorrt_plan"')
    (folder / "1" / "model.plan").write_bytes(b"")
    with pytest.raises(InputError, match=r"expected model\.onnx or model\.pt, found model\.plan"):
        read_foreign(folder, FLAGS)
    (folder / "config.pbtxt").write_text("name: {")
    with pytest.raises(InputError, match=r"config\.pbtxt: "):
        read_foreign(folder, FLAGS)
    (folder / "config.pbtxt").write_text('output [{ label_filename: "../../secret" }]')
    with pytest.raises(InputError, match="label_filename: expected a plain name"):
        read_foreign(folder, FLAGS)


def write_mar(path: Path, serialized: Path, **model: object) -> None:
    names = {str(index): ["n0144", f"kind {index}"] for index in range(10)}
    manifest = {"model": {"modelName": "theirs", "serializedFile": serialized.name, **model}}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        archive.writestr("index_to_name.json", json.dumps(names))
        archive.write(serialized, serialized.name)


@pytest.mark.slow
def test_a_torchserve_archive(tmp_path: Path) -> None:
    class AnySize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 10, 3, stride=8)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.conv(pixels).mean((2, 3))

    script = tmp_path / "net.pt"
    torch.jit.save(torch.jit.script(AnySize().eval()), script)
    path = tmp_path / "theirs.mar"
    write_mar(path, script, handler="image_classifier")
    assert kind_of(path) is Kind.TORCH_SERVE
    version = publish(path, tmp_path, InputDescription())
    manifest = json.loads((version / "manifest.json").read_text())
    assert manifest["labels"][3] == "kind 3"
    # What the handler does to each image.
    assert manifest["normalization"]["mean"] == [0.485, 0.456, 0.406]
    assert manifest["preprocessing"]["resize_shorter_px"] == 256
    assert manifest["preprocessing"]["height_px"] == 224

    write_mar(path, script, handler="my_handler.py")
    with pytest.raises(InputError, match=r"expected image_classifier, got 'my_handler\.py'"):
        read_foreign(path, InputDescription())
    write_mar(path, script, handler="image_classifier", modelFile="model.py")
    with pytest.raises(InputError, match=r"its net is code, model\.py; .*convoy-export module"):
        read_foreign(path, InputDescription())


def test_weights_and_packages_are_sent_elsewhere(net: nn.Module, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "w.pth")
    with pytest.raises(InputError, match="use `convoy-export weights"):
        read_foreign(tmp_path / "w.pth", FLAGS)
    with pytest.raises(InputError, match=r"expected a folder with config\.pbtxt or config\.json"):
        read_foreign(tmp_path, FLAGS)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "")
    with pytest.raises(InputError, match="expected a PyTorch or TorchServe archive"):
        read_foreign(tmp_path / "other.zip", FLAGS)


@pytest.mark.slow
def test_logits_are_those_of_the_program(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.jit.save(torch.jit.trace(net, torch.zeros(2, 3, 32, 32)), path)
    version = publish(path, tmp_path, FLAGS)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    pixels = torch.from_numpy(((images / 255 - MEAN) / STD).astype(np.float32))
    module = torch.jit.load(version / "model.torchscript")
    with torch.inference_mode():
        expected = net(pixels.permute(0, 3, 1, 2))
        found = module(torch.from_numpy(images))[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


GRAY = InputDescription(labels=LABELS, mean=(0.4,) * 3, std=(0.2,) * 3)


def gray_graph() -> onnx.ModelProto:
    weights = {**graphs.WEIGHTS, "conv.weight": graphs.WEIGHTS["conv.weight"][:, :1]}
    return graphs.model(image=("batch", 1, 32, 32), weights=weights)


def test_a_graph_of_one_gray_channel(tmp_path: Path) -> None:
    path = tmp_path / "gray.onnx"
    onnx.save(gray_graph(), path)
    source = read_foreign(path, GRAY)
    assert source.channel_order is ChannelOrder.GRAY
    order = Order(ModelFolder(tmp_path / "models", "m"), precisions=[Precision.INT8], data="digits")
    published = publish_source(source, order)
    load_in_server(published.path)
    # Of gray images the net sees exactly their value, and of others Pillow's gray.
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    images[:2] = images[:2, ..., :1]
    gray = [np.asarray(Image.fromarray(image).convert("L"), np.float32) for image in images]
    pixels = (np.stack(gray)[:, None] / 255 - 0.4) / 0.2
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"input": pixels.astype(np.float32)})
    found = onnx_format.load(published.path / "model.onnx")(images).logits
    np.testing.assert_allclose(found[:2], expected[:2], atol=1e-4)
    np.testing.assert_allclose(found, expected, atol=0.05)


@pytest.mark.slow
def test_a_gray_net_of_torch_in_every_format(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 15 * 15, 10))
    described = replace(GRAY, image_size_px=(32, 32), channel_order=ChannelOrder.GRAY)
    source = from_net(net, described.complete(), described, "0" * 64, "gray")
    published = publish_source(source, Order(ModelFolder(tmp_path / "models", "m")))
    assert {each.format for each in published.parities} == {
        ArtifactFormat.ONNX,
        ArtifactFormat.TORCHSCRIPT,
    }


def test_what_does_not_fit_a_gray_graph_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "gray.onnx"
    onnx.save(gray_graph(), path)
    rgb = replace(GRAY, channel_order=ChannelOrder.RGB)
    with pytest.raises(InputError, match="channel_order: the input has 1 channels, got rgb"):
        read_foreign(path, rgb)
    uneven = read_foreign(path, replace(GRAY, mean=MEAN))
    with pytest.raises(InputError, match="mean: expected one number three times for a net of one"):
        publish_source(uneven, Order(ModelFolder(tmp_path / "models", "m")))


def only_for_onnx_runtime() -> onnx.ModelProto:
    """A classifier that ends in an operator that OpenVINO does not know."""
    body = graphs.nodes(scores="scores")
    scaler = {"domain": "ai.onnx.ml", "offset": [0.0], "scale": [1.0]}
    body.append(onnx.helper.make_node("Scaler", ["scores"], ["output"], "scaler", **scaler))
    return graphs.model(body, domains={"": 17, "ai.onnx.ml": 3})


@needs_openvino
def test_openvinos_verdict_is_in_the_manifest(tmp_path: Path) -> None:
    source = read_foreign(write(graphs.model(), tmp_path), FLAGS)
    published = publish_source(source, Order(ModelFolder(tmp_path / "models", "good")))
    manifest = read_version(published.path).manifest
    verdict = manifest.artefacts[0].openvino
    assert verdict.runtime.startswith("openvino 20")
    assert verdict.parity.max_logit_difference <= verdict.parity.tolerance
    assert not verdict.failure
    load_in_server(published.path)


@needs_openvino
def test_a_failure_in_openvino_ends_what_was_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = read_foreign(write(only_for_onnx_runtime(), tmp_path), FLAGS)
    target = ModelFolder(tmp_path / "models", "m")
    asked = Order(target, [ArtifactFormat.ONNX])
    with pytest.raises(ParityError, match=r"^model.onnx with OpenVINO: .*--no-openvino") as caught:
        publish_source(source, asked)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "models" / "m" / "1").exists()
    recorded = publish_source(source, Order(target)).manifest.artefacts[0].openvino
    assert recorded.failure.startswith("model.onnx with OpenVINO: ")
    assert not recorded.HasField("parity")
    assert "do not serve it with --backend openvino" in caplog.text
    without = publish_source(source, replace(asked, openvino=False))
    assert not without.manifest.artefacts[0].HasField("openvino")


def write(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "net.onnx"
    onnx.save(model, path)
    return path


def test_external_data_over_2_gib_is_one_line_and_read_by_nobody(tmp_path: Path) -> None:
    model = graphs.model()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    path = write(model, tmp_path)
    # A sparse file: it takes no room, and would take 3 GiB in memory.
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(3 * 2**30)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + 2**30, hard))
    try:
        with pytest.raises(InputError, match=r"net.onnx: expected at most 2146435071 bytes with"):
            read_foreign(path, FLAGS)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
