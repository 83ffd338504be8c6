"""The same published version served by each backend."""

import shutil

import grpc
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import inference_pb2_grpc
from convoy.server.backends.base import load_backend
from convoy.server.backends.device import Device, Runtime
from convoy.server.batching import BatchingLimits
from convoy.server.metrics.requests import ServerMetrics
from convoy.server.models import loader
from tests.needs import needs_openvino
from tests.processes import ServerProcess, running_server


def logits_of(server: ServerProcess, images: np.ndarray) -> np.ndarray:
    with grpc.insecure_channel(server.address) as channel:
        reply = inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(
            pb.ModelInferRequest(
                model_name="digits",
                inputs=[{"name": "image", "datatype": "UINT8", "shape": images.shape}],
                outputs=[{"name": "logits"}],
                raw_input_contents=[images.tobytes()],
            )
        )
    return np.frombuffer(reply.raw_output_contents[0], "<f4").reshape(len(images), -1)


@pytest.mark.parametrize(
    ("backend", "platform", "provider"),
    [
        ("onnx", "onnx_onnxv1", "CPUExecutionProvider"),
        pytest.param("openvino", "openvino_onnxv1", "openvino-cpu", marks=needs_openvino),
        ("torchscript", "pytorch_torchscript", "torch-cpu"),
        ("exported-program", "pytorch_exported_program", "torch-cpu"),
    ],
)
def test_each_backend_serves_the_logits_of_the_eager_net(repository, backend, platform, provider):
    with np.load(repository / "digits" / "1" / "samples.npz", allow_pickle=False) as samples:
        images, expected = samples["images"], samples["logits"]
    with running_server(repository, "--backend", backend, "--device", "cpu") as server:
        np.testing.assert_allclose(logits_of(server, images), expected, atol=1e-4)
        with grpc.insecure_channel(server.address) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name="digits"))
        runs_on = {"platform": platform, "device": "cpu", "provider": provider}
        assert server.metric("convoy_model_info", model="digits", **runs_on) == 1
    assert metadata.platform == platform
    assert dict(metadata.properties) == {"device": "cpu", "provider": provider}


@pytest.mark.parametrize(
    ("backend", "platform"),
    [
        ("onnx", "onnx_onnxv1"),
        pytest.param("openvino", "openvino_onnxv1", marks=needs_openvino),
        ("torchscript", "pytorch_torchscript"),
        ("exported-program", "pytorch_exported_program"),
    ],
)
def test_each_backend_loads_what_was_verified_though_the_files_change_meanwhile(
    repository, tmp_path, monkeypatch, backend, platform
):
    folder = tmp_path / "digits" / "1"
    shutil.copytree(repository / "digits" / "1", folder)

    def load_late(*arguments, **options):
        for path in folder.iterdir():
            path.write_bytes(b"not what was verified")
        return load_backend(*arguments, **options)

    monkeypatch.setattr(loader, "load_backend", load_late)
    limits = BatchingLimits(max_batch_size=4, max_queue_size=16)
    options = loader.LoadOptions(Runtime(backend), (Device("cpu"),), 1, limits)
    # Loading compares the answers with the golden samples, of the bytes that were verified too.
    model = loader.ModelLoader(options, ServerMetrics(CollectorRegistry())).load(folder)
    assert model.runs_on.platform == platform
