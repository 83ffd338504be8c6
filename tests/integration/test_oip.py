"""The Open Inference Protocol against a real server process, by the generated stub."""

import json
import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import grpc
import numpy as np
import pytest

from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import inference_pb2_grpc
from tests.processes import ServerProcess


@pytest.fixture(scope="module")
def stub(server: ServerProcess) -> Iterator[inference_pb2_grpc.GRPCInferenceServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield inference_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module")
def golden(repository: Path) -> dict[str, np.ndarray]:
    with np.load(repository / "digits" / "1" / "samples.npz", allow_pickle=False) as samples:
        return dict(samples)


@pytest.fixture(scope="module")
def temperature(repository: Path) -> float:
    return json.loads((repository / "digits" / "1" / "manifest.json").read_text())["temperature"]


def infer_request(images: np.ndarray, **changes: object) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(
        model_name="digits",
        id="seven",
        inputs=[{"name": "image", "datatype": "UINT8", "shape": images.shape}],
        raw_input_contents=[images.tobytes()],
    )
    request.MergeFrom(pb.ModelInferRequest(**changes))
    return request


def outputs_of(reply: pb.ModelInferResponse) -> dict[str, np.ndarray]:
    return {
        tensor.name: np.frombuffer(raw, "<f4").reshape(tensor.shape)
        for tensor, raw in zip(reply.outputs, reply.raw_output_contents, strict=True)
    }


def test_live_ready_and_metadata(stub):
    assert stub.ServerLive(pb.ServerLiveRequest()).live
    assert stub.ServerReady(pb.ServerReadyRequest()).ready
    assert stub.ServerMetadata(pb.ServerMetadataRequest()).name == "convoy"
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name="digits"))
    assert metadata.platform == "onnx_onnxv1"
    assert list(metadata.versions) == ["1"]
    assert dict(metadata.properties) == {"device": "cpu", "provider": "CPUExecutionProvider"}
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [
        ("image", "UINT8", [-1, 32, 32, 3])
    ]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs] == [
        ("logits", "FP32", [-1, 10]),
        ("probabilities", "FP32", [-1, 10]),
    ]


@pytest.mark.parametrize(
    ("name", "version", "ready"),
    [("digits", "", True), ("digits", "1", True), ("digits", "2", False), ("cats", "", False)],
)
def test_model_ready_of_an_unknown_model_is_false_and_no_error(stub, name, version, ready):
    assert stub.ModelReady(pb.ModelReadyRequest(name=name, version=version)).ready is ready


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_served_logits_are_those_of_the_exported_net(stub, golden, temperature, count):
    reply = stub.ModelInfer(infer_request(golden["images"][:count]))
    assert (reply.model_name, reply.model_version, reply.id) == ("digits", "1", "seven")
    outputs = outputs_of(reply)
    np.testing.assert_allclose(outputs["logits"], golden["logits"][:count], atol=1e-4)
    scaled = golden["logits"][:count].astype(np.float64) / temperature
    exponentials = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    softmax = exponentials / exponentials.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(outputs["probabilities"], softmax, atol=1e-5)


def test_typed_contents_give_the_same_answer_as_raw(stub, golden):
    images = golden["images"][:2]
    raw = stub.ModelInfer(infer_request(images))
    typed = pb.ModelInferRequest(model_name="digits")
    tensor = typed.inputs.add(name="image", datatype="UINT8", shape=images.shape)
    tensor.contents.uint_contents.extend(images.ravel().tolist())
    np.testing.assert_array_equal(
        outputs_of(stub.ModelInfer(typed))["logits"], outputs_of(raw)["logits"]
    )


def png_files(golden: dict[str, np.ndarray]) -> list[bytes]:
    return [golden["encoded"][a:b].tobytes() for a, b in pairwise(golden["encoded_offsets"])]


@pytest.mark.parametrize("raw", [True, False])
def test_image_files_give_the_same_answer_as_their_pixels(stub, golden, raw):
    files = png_files(golden)[:5]
    request = pb.ModelInferRequest(model_name="digits")
    tensor = request.inputs.add(name="image", datatype="BYTES", shape=[5])
    if raw:
        request.raw_input_contents.append(
            b"".join(struct.pack("<I", len(file)) + file for file in files)
        )
    else:
        tensor.contents.bytes_contents.extend(files)
    by_pixels = stub.ModelInfer(infer_request(golden["images"][:5]))
    np.testing.assert_array_equal(
        outputs_of(stub.ModelInfer(request))["logits"], outputs_of(by_pixels)["logits"]
    )


def test_a_damaged_file_is_named_by_its_place(stub, golden):
    files = png_files(golden)[:3]
    request = pb.ModelInferRequest(model_name="digits")
    tensor = request.inputs.add(name="image", datatype="BYTES", shape=[3])
    tensor.contents.bytes_contents.extend([*files[:2], files[2][:-40]])
    with pytest.raises(grpc.RpcError, match="image 2: image: expected an intact file") as caught:
        stub.ModelInfer(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_only_requested_outputs_come_back(stub, golden):
    request = infer_request(golden["images"][:1], outputs=[{"name": "probabilities"}])
    assert list(outputs_of(stub.ModelInfer(request))) == ["probabilities"]


def _edit(edit: Callable[[pb.ModelInferRequest], object]) -> Callable[..., pb.ModelInferRequest]:
    def build(images: np.ndarray) -> pb.ModelInferRequest:
        request = infer_request(images)
        edit(request)
        return request

    return build


def _reshape(*shape: int) -> Callable[[pb.ModelInferRequest], None]:
    def edit(request: pb.ModelInferRequest) -> None:
        request.inputs[0].ClearField("shape")
        request.inputs[0].shape.extend(shape)

    return edit


@pytest.mark.parametrize(
    ("edit", "code", "message"),
    [
        (
            lambda r: setattr(r, "model_name", "cats"),
            "NOT_FOUND",
            "one of digits, got 'cats'",
        ),
        (lambda r: setattr(r, "model_version", "9"), "NOT_FOUND", "served in version 1, got 9"),
        (lambda r: setattr(r, "model_version", "new"), "INVALID_ARGUMENT", "version: .* got 'new'"),
        (
            lambda r: (r.ClearField("inputs"), r.ClearField("raw_input_contents")),
            "INVALID_ARGUMENT",
            "inputs: expected 1 .* got 0",
        ),
        (
            lambda r: setattr(r.inputs[0], "name", "x"),
            "INVALID_ARGUMENT",
            "'image', got 'x'",
        ),
        (
            lambda r: setattr(r.inputs[0], "datatype", "FP32"),
            "INVALID_ARGUMENT",
            "'image': datatype: expected UINT8 for pixels or BYTES .* got 'FP32'",
        ),
        (_reshape(1, 28, 28, 3), "INVALID_ARGUMENT", r"shape: expected \[-1, 32, 32, 3\]"),
        (_reshape(-1, 32, 32, 3), "INVALID_ARGUMENT", "shape: expected"),
        (_reshape(2**62, 32, 32, 3), "INVALID_ARGUMENT", "expected 1 to 256 images"),
        (_reshape(2, 32, 32, 3), "INVALID_ARGUMENT", "expected 6144 bytes, got 3072"),
        (
            lambda r: r.raw_input_contents.append(b""),
            "INVALID_ARGUMENT",
            "raw_input_contents: expected 1 entry, got 2",
        ),
        (
            lambda r: r.inputs[0].contents.uint_contents.append(1),
            "INVALID_ARGUMENT",
            "contents or raw_input_contents, got both",
        ),
        (
            lambda r: r.ClearField("raw_input_contents"),
            "INVALID_ARGUMENT",
            "expected 3072 values, got 0",
        ),
        (
            lambda r: r.parameters["triton_new"].CopyFrom(pb.InferParameter(bool_param=True)),
            "INVALID_ARGUMENT",
            "'triton_new' is reserved",
        ),
        (
            lambda r: r.parameters["priority"].CopyFrom(pb.InferParameter(string_param="1")),
            "INVALID_ARGUMENT",
            "priority: expected a whole number, got '1'",
        ),
        (
            lambda r: r.parameters["priority"].CopyFrom(pb.InferParameter()),
            "INVALID_ARGUMENT",
            "priority: expected a value, got none",
        ),
        (
            lambda r: (
                r.inputs[0]
                .parameters["shared_memory_region"]
                .CopyFrom(pb.InferParameter(string_param="region"))
            ),
            "UNIMPLEMENTED",
            "shared memory is not supported",
        ),
        (
            lambda r: r.outputs.add(name="loss"),
            "INVALID_ARGUMENT",
            "outputs: expected logits or probabilities, got 'loss'",
        ),
    ],
)
def test_an_invalid_request_gets_the_reason(stub, golden, edit, code, message):
    with pytest.raises(grpc.RpcError, match=message) as caught:
        stub.ModelInfer(_edit(edit)(golden["images"][:1]))
    assert caught.value.code().name == code


@pytest.mark.parametrize("method", ["RepositoryIndex", "RepositoryModelLoad"])
def test_the_repository_is_not_managed_on_this_port(stub, method):
    request = getattr(pb, f"{method}Request")()
    with pytest.raises(grpc.RpcError) as caught:
        getattr(stub, method)(request)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_typed_values_beyond_a_byte_are_rejected(stub):
    request = pb.ModelInferRequest(model_name="digits")
    tensor = request.inputs.add(name="image", datatype="UINT8", shape=[1, 32, 32, 3])
    tensor.contents.uint_contents.extend([256] * 3072)
    with pytest.raises(grpc.RpcError, match="expected whole numbers from 0 to 255") as caught:
        stub.ModelInfer(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_request_larger_than_any_batch_is_split_and_joined(stub, golden):
    images = np.concatenate([golden["images"]] * 10)[:256]
    logits = np.concatenate([golden["logits"]] * 10)[:256]
    reply = stub.ModelInfer(infer_request(images))
    np.testing.assert_allclose(outputs_of(reply)["logits"], logits, atol=1e-3)


def test_more_images_than_a_request_may_bring_are_rejected(stub, golden):
    images = np.concatenate([golden["images"]] * 20)[:257]
    with pytest.raises(grpc.RpcError, match="expected 1 to 256 images, got 257") as caught:
        stub.ModelInfer(infer_request(images))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
