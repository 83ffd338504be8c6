"""fp16, bf16 and int8 beside float32, of a net that has learnt something."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from prometheus_client import CollectorRegistry
from rich.console import Console
from torch import nn

from convoy.export import tf32
from convoy.export.errors import ParityError
from convoy.export.formats import (
    ArtifactFormat,
    Precision,
    Variant,
    choose_variants,
    variant_of,
)
from convoy.export.pipeline import ExportOptions, Published, export, load_artifact
from convoy.export.repository import ModelFolder
from convoy.export.samples import Samples, load_samples
from convoy.export.source import ModelSource
from convoy.export.tables import version_table
from convoy.export.versions import golden_expectation, read_version, verify
from convoy.server.backends.device import Device, Runtime
from convoy.server.batching import BatchingLimits
from convoy.server.metrics.requests import ServerMetrics
from convoy.server.models.loader import LoadOptions, ModelLoader
from convoy.training import nets
from convoy.training.data import Preprocessing, load_data
from convoy.v1 import model_manifest_pb2 as pb
from tests.export.conftest import MEAN, PORTABLE_FORMATS, STD
from tests.needs import needs_openvino


@pytest.fixture(scope="module")
def trained(source: ModelSource) -> ModelSource:
    """The tiny net after three epochs of Adam on digits."""
    torch.manual_seed(0)
    net = nets.create(source.architecture, **source.architecture_arguments).train()
    train = load_data("digits").train
    pixels = torch.from_numpy(train.images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(3):
        for rows in torch.randperm(len(pixels)).split(64):
            loss = torch.nn.functional.cross_entropy(
                net((pixels[rows] - mean) / std), torch.from_numpy(train.labels)[rows]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return ModelSource(
        net.eval(),
        source.data,
        1.0,
        "0" * 64,
        source.architecture,
        source.architecture_arguments,
        {},
    )


@pytest.fixture(scope="module")
def variants(
    trained: ModelSource, samples: Samples, tmp_path_factory: pytest.TempPathFactory
) -> Published:
    options = ExportOptions(choose_variants(PORTABLE_FORMATS, list(Precision)))
    return export(
        trained, samples, ModelFolder(tmp_path_factory.mktemp("models"), "digits"), options
    )


@pytest.mark.slow
def test_each_precision_is_written_in_the_formats_that_have_it(variants: Published) -> None:
    assert {path.name for path in variants.path.glob("model*")} == {
        "model.onnx",
        "model.torchscript",
        "model.pt2",
        "model.fp16.onnx",
        "model.fp16.torchscript",
        "model.fp16.pt2",
        "model.bf16.torchscript",
        "model.bf16.pt2",
        "model.int8.onnx",
    }
    precisions = [artifact.precision for artifact in variants.manifest.artefacts]
    assert precisions[:3] == [pb.PRECISION_FP32] * 3, "readers take the first of a format"


@pytest.mark.slow
def test_lower_precisions_keep_the_accuracy_within_their_gates(variants: Published) -> None:
    reference = variants.parities[Variant(ArtifactFormat.ONNX)].reference_accuracy
    assert reference > 0.85, "a net that has learnt nothing proves nothing"
    for variant, parity in variants.parities.items():
        assert parity.argmax_agreement >= 0.98
        assert parity.accuracy >= reference - 0.005
        if variant.precision is Precision.TF32:
            assert 1e-6 < parity.max_logit_difference < parity.tolerance
            continue
        exact = variant.precision is Precision.FP32
        assert (parity.max_logit_difference < 1e-4) is exact


def test_the_net_that_was_exported_is_still_in_float32(
    variants: Published, trained: ModelSource
) -> None:
    assert {parameter.dtype for parameter in trained.net.parameters()} == {torch.float32}


def test_int8_is_smaller_per_channel_and_keeps_its_head_in_float(variants: Published) -> None:
    graph = onnx.load(variants.path / "model.int8.onnx").graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    scales = [
        weights[node.input[1]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in weights
    ]
    assert any(scale.dims and scale.dims[0] == 8 for scale in scales), "one scale for each channel"
    head = [node for node in graph.node if node.op_type == "Gemm"][-1]
    assert head.input[1] in weights
    assert weights[head.input[1]].data_type == onnx.TensorProto.FLOAT
    sizes = [(variants.path / f"model{kept}.onnx").stat().st_size for kept in ("", ".fp16")]
    assert sizes[1] < 0.75 * sizes[0]


def test_a_net_that_int8_suits_has_only_its_head_in_float(variants: Published) -> None:
    in_int8, layers = variants.int8_layers
    assert (in_int8, layers) == (layers - 1, layers)


def test_int8_products_fit_processors_without_vnni(variants: Published) -> None:
    """These add two products in 16 bits, and clip what does not fit."""
    graph = onnx.load(variants.path / "model.int8.onnx").graph
    weights = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4
    ]
    assert weights
    assert all(2 * 255 * int(np.abs(each.astype(int)).max()) < 2**15 for each in weights)


def test_verify_holds_each_precision_to_its_own_gate(variants: Published) -> None:
    version = read_version(variants.path)
    parities = verify(version, golden_expectation(version))
    assert len(parities) == 12
    rounded = [parities[Variant(form, Precision.TF32)] for form in PORTABLE_FORMATS]
    assert min(parity.max_logit_difference for parity in rounded) > 1e-6


@pytest.mark.parametrize(
    ("runtime", "precision"),
    [
        (Runtime.ONNX_RUNTIME, "fp32"),
        (Runtime.ONNX_RUNTIME, "tf32"),
        (Runtime.ONNX_RUNTIME, "fp16"),
        (Runtime.TORCHSCRIPT, "bf16"),
        (Runtime.ONNX_RUNTIME, "int8"),
        pytest.param(Runtime.OPENVINO, "fp16", marks=needs_openvino),
        pytest.param(Runtime.OPENVINO, "int8", marks=needs_openvino),
    ],
)
def test_the_server_runs_the_variant_that_it_is_asked_for(
    variants: Published, runtime: Runtime, precision: str
) -> None:
    limits = BatchingLimits(max_batch_size=2, max_queue_size=4)
    options = LoadOptions(runtime, (Device("cpu"),), 1, limits, precision=precision)
    model = ModelLoader(options, ServerMetrics(CollectorRegistry())).load(variants.path)
    assert model.runs_on.precision == precision


def test_tf32_is_the_float32_file_with_a_tolerance_of_its_own(variants: Published) -> None:
    by_variant = {variant_of(artifact): artifact for artifact in variants.manifest.artefacts}
    for form in PORTABLE_FORMATS:
        exact, rounded = (by_variant[Variant(form, p)] for p in (Precision.FP32, Precision.TF32))
        assert exact.file == rounded.file
        assert rounded.parity.tolerance > 10 * exact.parity.tolerance
    verdicts = [artifact.HasField("openvino") for artifact in by_variant.values()]
    assert sum(verdicts) <= 3, "float32, fp16 and int8 are proved in OpenVINO"


def test_the_simulation_rounds_to_ten_bits_of_mantissa() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    rounded = tf32._rounded(values)
    assert not (rounded.view(torch.int32) & 0x1FFF).any()
    spacing = 2.0 ** (values.abs().log2().floor() - 10)
    assert ((rounded - values).abs() <= spacing / 2).all()


@pytest.mark.slow
def test_onnx_and_torch_simulate_the_same_rounding(
    source: ModelSource, samples: Samples, tmp_path: Path
) -> None:
    """Of one product: sums in another order may round to the other neighbor in the next one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 10, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    wanted = choose_variants(PORTABLE_FORMATS, [Precision.FP32, Precision.TF32])
    path = export(
        replace(source, net=net), samples, ModelFolder(tmp_path, "one"), ExportOptions(wanted)
    ).path
    images = samples.real.images[:32]
    exact = load_artifact(Variant(ArtifactFormat.ONNX), path / "model.onnx")(images)
    found = [
        load_artifact(variant, path / variant.file_name)(images)
        for variant in (Variant(form, Precision.TF32) for form in PORTABLE_FORMATS)
    ]
    changes = [np.abs(outputs.logits - exact.logits).max() for outputs in found]
    apart = max(np.abs(outputs.logits - found[0].logits).max() for outputs in found)
    assert apart < 0.02 * min(changes)


@pytest.mark.slow
def test_a_net_that_tf32_ruins_publishes_nothing(
    trained: ModelSource, samples: Samples, tmp_path: Path
) -> None:
    class Cancelling(torch.nn.Module):
        """Subtracts two large products, whose difference is below the rounding of both."""

        def __init__(self) -> None:
            super().__init__()
            self.net = trained.net
            self.large = torch.nn.Linear(10, 20, bias=False)
            self.difference = torch.nn.Linear(20, 10, bias=False)
            one = torch.eye(10)
            with torch.no_grad():
                self.large.weight.copy_(torch.cat([64 * one, 65 * one]))
                self.difference.weight.copy_(torch.cat([-one, one], dim=1))

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.difference(self.large(self.net(pixels)))
            return logits

    ruined = ModelSource(Cancelling().eval(), trained.data, 1.0, "0" * 64, "cancelling", {}, {})
    options = ExportOptions(choose_variants([ArtifactFormat.ONNX], [Precision.TF32]))
    with pytest.raises(ParityError, match=r"model\.onnx in TF32, batch size 1"):
        export(ruined, samples, ModelFolder(tmp_path, "digits"), options)
    assert not list(tmp_path.iterdir())


def test_calibration_shares_no_image_with_the_proof(samples: Samples) -> None:
    proof = {image.tobytes() for image in samples.real.images}
    assert len(samples.calibration) == 512
    assert not proof & {image.tobytes() for image in samples.calibration.images}


def test_test_images_are_neither_for_proof_nor_for_calibration() -> None:
    dataset = load_data("digits")
    loaded = load_samples("digits", dataset.classes, Preprocessing())
    test = {image.tobytes() for image in dataset.test.images}
    used = np.concatenate([loaded.real.images, loaded.calibration.images])
    assert not test & {image.tobytes() for image in used}


class Lopsided(nn.Module):
    """One channel dwarfs the others in each pair, so one scale for all activations loses them."""

    def __init__(self, net: nn.Module, pairs: int) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)) for _ in range(pairs)
        )
        self.net = net
        with torch.no_grad():
            for first, second in self.pairs:
                for layer in (first, second):
                    layer.weight.zero_()
                    layer.bias.zero_()
                    for channel in range(3):
                        layer.weight[channel, channel] = 1.0
                first.weight[3, 0] = 1e4

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        for pair in self.pairs:
            pixels = pair(pixels)[:, :3]
        logits: torch.Tensor = self.net(pixels)
        return logits


def export_lopsided(trained: ModelSource, pairs: int, samples: Samples, folder: Path) -> Published:
    net = Lopsided(trained.net, pairs).eval()
    source = ModelSource(net, trained.data, 1.0, "0" * 64, "lopsided", {}, {})
    options = ExportOptions(choose_variants([ArtifactFormat.ONNX], [Precision.INT8]))
    return export(source, samples, ModelFolder(folder, "digits"), options)


@pytest.mark.slow
def test_layers_that_int8_ruins_stay_in_float(
    trained: ModelSource, samples: Samples, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published = export_lopsided(trained, 1, samples, tmp_path)
    graph = onnx.load(published.path / "model.int8.onnx").graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    in_float = [
        node
        for node in graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul")
        and node.input[1] in weights
        and weights[node.input[1]].data_type == onnx.TensorProto.FLOAT
    ]
    assert any(list(weights[node.input[1]].dims) == [4, 4, 1, 1] for node in in_float)
    (record,) = [each for each in caplog.records if "stay in float32" in each.message]
    assert all(node.name in record.message for node in in_float[:-1]), "all but the head"

    in_int8, layers = published.int8_layers
    assert layers - in_int8 == len(in_float)
    assert 2 * in_int8 >= layers
    shown = Console(width=200, file=io.StringIO())
    shown.print(version_table(published.manifest, read_version(published.path).int8_layers()))
    assert f"{in_int8} of {layers} layers in int8" in shown.file.getvalue()
    limits = BatchingLimits(max_batch_size=2, max_queue_size=4)
    options = LoadOptions(
        Runtime.ONNX_RUNTIME, (Device("cpu"),), 1, limits, precision=Precision.INT8.value
    )
    ModelLoader(options, ServerMetrics(CollectorRegistry())).load(published.path)


@pytest.mark.slow
def test_a_net_that_int8_ruins_publishes_nothing(
    trained: ModelSource, samples: Samples, tmp_path: Path
) -> None:
    with pytest.raises(ParityError, match=r"model.int8.onnx.* with \d+ of \d+ layers in int8"):
        export_lopsided(trained, 12, samples, tmp_path)
    assert not list(tmp_path.iterdir())
