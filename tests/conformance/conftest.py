"""A suite for any server of the Open Inference Protocol, version 2, over gRPC.

    pytest tests/conformance --address HOST:PORT --model NAME

Without an address it starts this project's server with a model made by hand. Of the model it asks
one tensor in and at least one FP32 tensor out, each row of an output depending on its row of the
input alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import numpy as np
import pytest

from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import inference_pb2_grpc
from tests.processes import GRPC_FLAGS, running_server
from tests.server.conftest import publish_version

_DTYPES = {"UINT8": np.uint8, "FP32": np.float32, "INT64": np.int64, "INT32": np.int32}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption("--address", help="HOST:PORT of the server to test; none starts ours")
    group.addoption("--model", help="name of the model to ask", default="colors")


@dataclass(frozen=True)
class Target:
    """The server under test.

    Attributes:
        input: Its model's input, as the metadata tell.
    """

    address: str
    model: str
    input: pb.ModelMetadataResponse.TensorMetadata

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of one row; axes of any length have length 1."""
        return tuple(max(1, axis) for axis in self.input.shape[1:])

    def rows(self, count: int, seed: int) -> np.ndarray:
        """Rows that hardly ever occur twice."""
        shape = (count, *self.sample_shape)
        generator = np.random.default_rng(seed)
        return generator.integers(0, 256, shape).astype(_DTYPES[self.input.datatype])

    def request(self, rows: np.ndarray, **fields: object) -> pb.ModelInferRequest:
        """A request for these rows, with raw contents."""
        tensor = {"name": self.input.name, "datatype": self.input.datatype, "shape": rows.shape}
        request = pb.ModelInferRequest(
            model_name=self.model, inputs=[tensor], raw_input_contents=[rows.tobytes()]
        )
        request.MergeFrom(pb.ModelInferRequest(**fields))
        return request


def outputs_of(reply: pb.ModelInferResponse) -> dict[str, np.ndarray]:
    """The FP32 outputs of a reply, from raw or typed contents."""
    arrays = {}
    for index, tensor in enumerate(reply.outputs):
        if tensor.datatype != "FP32":
            continue
        if reply.raw_output_contents:
            flat = np.frombuffer(reply.raw_output_contents[index], "<f4")
        else:
            flat = np.array(tensor.contents.fp32_contents, np.float32)
        arrays[tensor.name] = flat.reshape(tensor.shape)
    return arrays


@pytest.fixture(scope="module", params=["h2corn", "front ends"])
def target(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Target]:
    """The server that the command line names, or ours, with and without front ends."""
    address = request.config.getoption("--address", None)
    model = request.config.getoption("--model", "colors")
    if address:
        if request.param != "h2corn":
            pytest.skip("a server that is named is tested once")
        yield _describe(address, model)
        return
    repository = tmp_path_factory.mktemp("conformance")
    publish_version(repository / "colors" / "1")
    with running_server(repository, "--device", "cpu", *GRPC_FLAGS[request.param]) as server:
        yield _describe(server.address, "colors")


def _describe(address: str, model: str) -> Target:
    with grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name=model), timeout=30)
    (tensor,) = metadata.inputs
    return Target(address, model, tensor)


@pytest.fixture(scope="module")
def stub(target: Target) -> Iterator[inference_pb2_grpc.GRPCInferenceServiceStub]:
    """The protocol's generated client."""
    with grpc.insecure_channel(target.address) as channel:
        yield inference_pb2_grpc.GRPCInferenceServiceStub(channel)
