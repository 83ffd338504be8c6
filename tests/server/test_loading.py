import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper
from prometheus_client import CollectorRegistry

from server.backends import load_backend
from server.backends.devices import Device, choose_device, count_cuda_devices, usable_cpus
from server.backends.onnx import OnnxBackend
from server.batcher import BatchingLimits
from server.errors import (
    DeviceError,
    GoldenSamplesError,
    GraphError,
    RepositoryError,
    VerificationError,
)
from server.loading import LoadOptions, ModelLoader, ServedModel
from server.manifest import ArtefactFormat
from server.metrics import ServerMetrics
from tests.server.conftest import mean_colour_logits, seal


@pytest.fixture
def load(tmp_path):
    def load_newest(device: str = "cpu") -> ServedModel:
        limits = BatchingLimits(max_batch_size=6, max_queue_size=16)
        options = LoadOptions(ArtefactFormat.ONNX, choose_device(device), 1, limits)
        folder = max((tmp_path / "models" / "colours").iterdir())
        return ModelLoader(options, ServerMetrics(CollectorRegistry())).load(folder)

    return load_newest


def test_a_version_is_loaded_and_answers(publish, load):
    publish()
    model = load()
    assert (model.backend.device, model.backend.provider) == ("cpu", "CPUExecutionProvider")
    images = np.random.default_rng(1).integers(0, 256, (5, 4, 6, 3), np.uint8)
    outputs = model.backend.run(images)
    np.testing.assert_allclose(outputs.logits, mean_colour_logits(images), atol=1e-6)
    np.testing.assert_allclose(outputs.probabilities.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("offset", [0.01, np.nan])
def test_a_version_whose_golden_samples_disagree_is_refused(publish, load, offset):
    folder = publish()
    with np.load(folder / "samples.npz") as samples:
        images, logits = samples["images"], samples["logits"]
    np.savez(folder / "samples.npz", images=images, logits=logits + np.float32(offset))
    seal(folder)
    with pytest.raises(VerificationError, match=r"golden samples differ by .* on cpu"):
        load()


def test_a_file_that_is_no_model_is_refused(publish, load):
    folder = publish()
    (folder / "model.onnx").write_bytes(b"not a graph")
    seal(folder)
    with pytest.raises(GraphError, match=r"model\.onnx: expected an ONNX model"):
        load()


def edit_graph(folder: Path, edit: Callable[[onnx.ModelProto], object]) -> None:
    """Changes the published graph and seals the version again, as an attacker with a key would."""
    model = onnx.load(folder / "model.onnx")
    edit(model)
    onnx.save(model, folder / "model.onnx")
    seal(folder)


def external_weight(name: str = "outside") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../etc/passwd")
    return tensor


def foreign_node(op_type: str = "Evil", domain: str = "com.example") -> NodeProto:
    return helper.make_node(op_type, ["image"], ["y"], domain=domain)


def nested(node: NodeProto) -> NodeProto:
    """A branch that is never taken still is loaded."""
    branch = helper.make_graph([node], "branch", [], [])
    return helper.make_node("If", ["condition"], ["y"], then_branch=branch, else_branch=branch)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.graph.initializer.append(external_weight()), "found external data"),
        (
            lambda m: m.graph.node.append(
                helper.make_node("Constant", [], ["c"], value=external_weight())
            ),
            "found external data",
        ),
        (
            lambda m: m.graph.node.append(
                nested(helper.make_node("Constant", [], ["c"], value=external_weight()))
            ),
            "found external data",
        ),
        (lambda m: m.graph.node.append(foreign_node()), "'Evil' of the domain 'com.example'"),
        (lambda m: m.graph.node.append(nested(foreign_node())), "of the domain 'com.example'"),
        (
            lambda m: m.functions.append(
                helper.make_function("local", "f", ["x"], ["y"], [foreign_node()], [])
            ),
            "of the domain 'com.example'",
        ),
        (lambda m: m.graph.node.append(foreign_node("EPContext", "com.microsoft")), "'EPContext'"),
    ],
)
def test_a_graph_that_reaches_outside_its_file_is_refused(publish, load, edit, message):
    edit_graph(publish(), edit)
    with pytest.raises(GraphError, match=message) as caught:
        load()
    assert "passwd" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda m: m.graph.input[0].type.tensor_type.shape.dim[1].__setattr__("dim_value", 5),
            r"input: the manifest describes image UINT8 \[-1, 4, 6, 3\], "
            r"the graph has image UINT8 \[-1, 5, 6, 3\]",
        ),
        (lambda m: m.graph.output.pop(), "output: the manifest describes logits .*, probabilities"),
        (
            lambda m: m.graph.input.append(
                helper.make_tensor_value_info("other", TensorProto.FLOAT, [1])
            ),
            "the graph has image .*, other FP32",
        ),
    ],
)
def test_a_graph_with_other_inputs_or_outputs_is_refused(publish, load, edit, message):
    edit_graph(publish(), edit)
    with pytest.raises(GraphError, match=message):
        load()


@pytest.mark.parametrize("shape", [(8, 1), (1, 3), (8, 4)])
def test_golden_logits_of_another_shape_are_refused_and_not_stretched(publish, load, shape):
    folder = publish()
    with np.load(folder / "samples.npz") as samples:
        images = np.zeros_like(samples["images"])
    np.savez(folder / "samples.npz", images=images, logits=np.zeros(shape, "f4"))
    seal(folder)
    with pytest.raises(GoldenSamplesError, match=r"expected \[8, 3\]"):
        load()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x80\x04pickle"])
def test_samples_that_are_no_arrays_are_refused(publish, load, content):
    folder = publish()
    (folder / "samples.npz").write_bytes(content)
    seal(folder)
    with pytest.raises(VerificationError, match=r"samples\.npz: expected arrays"):
        load()


@pytest.mark.skipif(count_cuda_devices() > 0, reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_an_error_and_auto_takes_the_cpu():
    with pytest.raises(DeviceError, match="'cuda': the driver offers 0 CUDA devices"):
        choose_device("cuda")
    with pytest.raises(DeviceError, match="'cuda:3'"):
        choose_device("cuda:3")
    assert choose_device("auto") == Device("cpu")


@pytest.mark.skipif(count_cuda_devices() > 0, reason="this machine has a CUDA device")
def test_a_cuda_session_that_falls_back_is_noticed(publish):
    """ONNX Runtime itself does not raise when its CUDA provider cannot be loaded."""
    folder = publish()
    with pytest.raises(DeviceError, match="cuda:0"):
        OnnxBackend(folder / "model.onnx", Device("cuda"), threads=1)


def test_usable_cpus_follow_the_affinity():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_a_file_that_is_no_exported_program_is_refused(tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"not an archive")
    with pytest.raises(RepositoryError, match=r"model\.pt2: torch cannot load it"):
        load_backend(
            ArtefactFormat.EXPORTED_PROGRAM, tmp_path / "model.pt2", Device("cpu"), threads=1
        )
