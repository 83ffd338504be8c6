"""Nets whose shapes ONNX Runtime computes on the CPU beside CUDA, by a double of its session."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from convoy.client.batch import runtime as client_runtime
from convoy.export import onnx_format
from convoy.export.servable import Servable
from convoy.server.backends import onnx as onnx_backend
from convoy.server.backends.device import Device
from convoy.server.backends.onnx import OnnxBackend
from convoy.server.backends.onnx_check import SHAPE_OPERATORS
from convoy.server.errors import DeviceError
from convoy.server.models.repository import VerifiedFile
from tests.fake_cuda.runtime import FakeCuda

timm = pytest.importorskip("timm", reason="the extra timm is not installed")

SIZE_PX = 64
NETS = {
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)},
    "swin_tiny_patch4_window7_224": {
        "img_size": SIZE_PX,
        "window_size": 4,
        "embed_dim": 8,
        "depths": (2,),
        "num_heads": (2,),
    },
    "vit_tiny_patch16_224": {"img_size": SIZE_PX, "depth": 1, "embed_dim": 24},
}
INDEX_TYPES = {onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.BOOL}


@pytest.fixture(scope="module", params=NETS)
def path(request, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    net = timm.create_model(request.param, num_classes=3, **NETS[request.param]).eval()
    servable = Servable(net, (0.5,) * 3, (0.25,) * 3, 1.0).eval()
    path = tmp_path_factory.mktemp("nets") / f"{request.param}.onnx"
    example = torch.zeros((2, SIZE_PX, SIZE_PX, 3), dtype=torch.uint8)
    onnx_format.write(servable, example, path, {"name": request.param})
    return path


def shape_nodes(path: Path) -> set[str]:
    """The names of the nodes that compute integers only, which CUDA leaves to the CPU."""
    graph = onnx.load(path).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    return {
        node.name
        for node in graph.node
        if all(types.get(output) in INDEX_TYPES for output in node.output)
    }


def load(path: Path, cuda: FakeCuda, monkeypatch) -> OnnxBackend:
    monkeypatch.setattr(onnx_backend, "ort", cuda)
    return OnnxBackend(VerifiedFile(path.name, path.read_bytes()), Device("cuda"), 1)


@pytest.mark.slow
def test_shapes_may_be_computed_on_the_cpu(path, monkeypatch):
    names = shape_nodes(path)
    assert names or "swin" in path.name, "the net should have such nodes"
    backend = load(path, FakeCuda(on_cpu=lambda operator, name: name in names), monkeypatch)
    assert backend.run(np.zeros((3, SIZE_PX, SIZE_PX, 3), np.uint8)).logits.shape == (3, 3)


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["Gemm", "LayerNormalization", "Add", "Reshape"])
def test_what_computes_activations_may_not(path, monkeypatch, operator):
    cuda = FakeCuda(on_cpu=lambda found, name: found == operator)
    with pytest.raises(DeviceError, match=rf"on the CPU beside CUDA, found {operator} '"):
        load(path, cuda, monkeypatch)


def test_the_batch_client_knows_the_same_operators():
    assert client_runtime.SHAPE_OPERATORS == SHAPE_OPERATORS
