"""convoy.v1.ClassifierService against a real server process, by the generated stub."""

import asyncio
import io
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from PIL import Image

from convoy.v1 import classifier_pb2 as pb
from convoy.v1 import classifier_pb2_grpc
from tests.processes import ServerProcess

Stub = classifier_pb2_grpc.ClassifierServiceStub


@pytest.fixture(scope="module")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> Stub:
    return Stub(channel)


@pytest.fixture(scope="module")
def golden(repository: Path) -> dict[str, np.ndarray]:
    with np.load(repository / "digits" / "1" / "samples.npz", allow_pickle=False) as samples:
        return dict(samples)


def png_files(golden: dict[str, np.ndarray]) -> list[bytes]:
    offsets = golden["encoded_offsets"]
    return [golden["encoded"][a:b].tobytes() for a, b in pairwise(offsets)]


def encoded(image: Image.Image, format_: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_)
    return buffer.getvalue()


def test_encoded_and_raw_images_get_the_class_of_the_exported_net(stub, golden):
    expected = golden["logits"].argmax(axis=1)
    for file, image, index in zip(png_files(golden), golden["images"], expected, strict=True):
        raw = pb.RawImage(height=32, width=32, pixels=image.tobytes())
        by_file = stub.Classify(pb.ClassifyRequest(model="digits", encoded=file, top_k=10))
        by_pixels = stub.Classify(pb.ClassifyRequest(model="digits", raw=raw, top_k=10))
        assert by_file.classes[0].index == by_pixels.classes[0].index == index
        assert by_file.classes == by_pixels.classes


def test_the_reply_tells_version_probabilities_and_times(stub, golden):
    reply = stub.Classify(pb.ClassifyRequest(encoded=png_files(golden)[0], top_k=10))
    assert (reply.model, reply.version) == ("digits", 1)
    assert sum(score.probability for score in reply.classes) == pytest.approx(1, abs=1e-5)
    probabilities = [score.probability for score in reply.classes]
    assert probabilities == sorted(probabilities, reverse=True)
    assert all(score.label == str(score.index) for score in reply.classes)
    assert reply.times.decode_ns > 0
    assert reply.times.inference_ns > 0
    assert reply.batch_size >= 1


@pytest.mark.parametrize(("top_k", "expected"), [(0, 1), (1, 1), (3, 3), (99, 10)])
def test_top_k(stub, golden, top_k, expected):
    reply = stub.Classify(pb.ClassifyRequest(encoded=png_files(golden)[0], top_k=top_k))
    assert len(reply.classes) == expected


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (pb.ClassifyRequest(model="digits"), "INVALID_ARGUMENT", "encoded or raw, got neither"),
        (pb.ClassifyRequest(model="cats", encoded=b"x"), "NOT_FOUND", "got 'cats'"),
        (pb.ClassifyRequest(version=7, encoded=b"x"), "NOT_FOUND", "version 1, got 7"),
        (pb.ClassifyRequest(encoded=b"no image"), "INVALID_ARGUMENT", "got 8 other bytes"),
        (pb.ClassifyRequest(encoded=b""), "INVALID_ARGUMENT", "got 0 other bytes"),
        (
            pb.ClassifyRequest(raw=pb.RawImage(height=1, width=2, pixels=b"")),
            "INVALID_ARGUMENT",
            "takes 32 x 32 pixels, got 1 x 2",
        ),
        (
            pb.ClassifyRequest(raw=pb.RawImage(height=32, width=32, pixels=b"abc")),
            "INVALID_ARGUMENT",
            "raw.pixels: expected 3072 bytes, got 3",
        ),
    ],
)
def test_an_invalid_request_gets_the_reason(stub, request_, code, message):
    with pytest.raises(grpc.RpcError, match=message) as caught:
        stub.Classify(request_)
    assert caught.value.code().name == code


def test_a_damaged_image_is_rejected_without_affecting_others(server, golden):
    good, damaged = png_files(golden)[0], png_files(golden)[0][:-40]

    async def ask() -> list[object]:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = Stub(channel)
            calls = [
                stub.Classify(pb.ClassifyRequest(encoded=damaged if number % 3 else good))
                for number in range(60)
            ]
            return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(ask())
    codes = [a.code().name if isinstance(a, grpc.RpcError) else "OK" for a in answers]
    assert codes == ["INVALID_ARGUMENT" if number % 3 else "OK" for number in range(60)]


def test_a_decompression_bomb_is_rejected(stub):
    bomb = encoded(Image.new("1", (10_000, 10_000)))
    assert len(bomb) < 100_000
    with pytest.raises(grpc.RpcError, match="at most 50000000 pixels") as caught:
        stub.Classify(pb.ClassifyRequest(encoded=bomb))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_concurrent_requests_share_batches_and_keep_their_own_answers(server, golden):
    expected = golden["logits"].argmax(axis=1)

    async def ask() -> list[pb.ClassifyResponse]:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = Stub(channel)
            calls = [
                stub.Classify(
                    pb.ClassifyRequest(
                        raw=pb.RawImage(
                            height=32, width=32, pixels=golden["images"][n % 16].tobytes()
                        )
                    )
                )
                for n in range(400)
            ]
            return await asyncio.gather(*calls)

    replies = asyncio.run(ask())
    assert [reply.classes[0].index for reply in replies] == [expected[n % 16] for n in range(400)]
    assert max(reply.batch_size for reply in replies) > 1


def test_list_models(stub):
    (model,) = stub.ListModels(pb.ListModelsRequest()).models
    assert (model.model, model.version, model.ready) == ("digits", 1, True)
    assert (model.height, model.width) == (32, 32)
    assert list(model.labels) == [str(digit) for digit in range(10)]
    assert (model.backend, model.device, model.provider) == ("onnx", "cpu", "CPUExecutionProvider")


@pytest.mark.parametrize("service", ["", "digits", "convoy.v1.ClassifierService"])
def test_health(channel, service):
    stub = health_pb2_grpc.HealthStub(channel)
    reply = stub.Check(health_pb2.HealthCheckRequest(service=service))
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_the_services(channel):
    services = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert {
        "convoy.v1.ClassifierService",
        "inference.GRPCInferenceService",
        "grpc.health.v1.Health",
    } <= services
