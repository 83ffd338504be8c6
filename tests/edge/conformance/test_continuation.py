"""Header blocks over several frames, in both directions (RFC 9113, section 6.10)."""

import asyncio

import grpc
import pytest
from hyperframe.frame import ContinuationFrame
from prometheus_client import CollectorRegistry

from convoy.oip.v2.inference_pb2 import ModelInferRequest
from convoy.server.metrics.requests import ServerMetrics
from tests.edge.conformance.rules import OK, connection_error, rule, stream_error
from tests.edge.frames import (
    CONTINUATION,
    DATA,
    DEFAULT_FRAME_BYTES,
    EMPTY_MESSAGE,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    INFERENCE,
    MAX_HEADER_LIST_SIZE,
    PING,
    WATCH,
    Fields,
    Http2Client,
    frame,
    header_frames,
    literal_block,
    message,
    request_fields,
)
from tests.server.grpc.conftest import Echo, Limits, listener_of

PROTOCOL_ERROR = connection_error("PROTOCOL_ERROR")
# Metadata of 6 KB; grpcio rejects a random share of calls with more than 8 KiB.
MANY_FIELDS: Fields = [(f"x-field-{number}", "a" * 100) for number in range(40)]


@rule("RFC9113-6.10", OK)
def test_header_block_in_many_frames(client: Http2Client) -> str:
    stream_id = _open_in_parts(client, literal_block([*request_fields(), *MANY_FIELDS]), 1000)
    client.data(stream_id, EMPTY_MESSAGE, end=True)
    return client.stream_outcome(stream_id)


@rule("RFC9113-6.10", OK)
def test_field_split_between_frames(client: Http2Client) -> str:
    """Sixteen frames split names and values wherever it falls."""
    block = literal_block(request_fields())
    stream_id = _open_in_parts(client, block, len(block) // 16 + 1)
    client.data(stream_id, EMPTY_MESSAGE, end=True)
    return client.stream_outcome(stream_id)


@rule("RFC9113-6.10", OK)
def test_empty_headers_frame_before_the_block(client: Http2Client) -> str:
    stream_id = client.new_stream()
    client.send(
        frame(HEADERS, 0, stream_id),
        frame(CONTINUATION, END_HEADERS, stream_id, literal_block(request_fields())),
    )
    client.data(stream_id, EMPTY_MESSAGE, end=True)
    return client.stream_outcome(stream_id)


@rule("RFC9113-6.2", PROTOCOL_ERROR)
def test_data_inside_a_header_block(client: Http2Client) -> str:
    return _interrupted(client, lambda stream_id: frame(DATA, 0, stream_id, EMPTY_MESSAGE))


@rule("RFC9113-6.2", PROTOCOL_ERROR)
def test_ping_inside_a_header_block(client: Http2Client) -> str:
    return _interrupted(client, lambda _: frame(PING, 0, 0, bytes(8)))


@rule("RFC9113-6.2", PROTOCOL_ERROR)
def test_headers_of_another_stream_inside_a_header_block(client: Http2Client) -> str:
    block = literal_block(request_fields())
    return _interrupted(client, lambda stream_id: frame(HEADERS, END_HEADERS, stream_id + 2, block))


@rule("RFC9113-6.10", PROTOCOL_ERROR)
def test_continuation_of_another_stream(client: Http2Client) -> str:
    other = client.open(WATCH)
    return _interrupted(client, lambda _: frame(CONTINUATION, END_HEADERS, other))


@rule("RFC9113-5.5", PROTOCOL_ERROR)
def test_unknown_frame_inside_a_header_block(client: Http2Client) -> str:
    return _interrupted(client, lambda stream_id: frame(0xBE, 0, stream_id))


@rule("RFC9113-6.10", PROTOCOL_ERROR)
def test_continuation_without_headers(client: Http2Client) -> str:
    block = literal_block(request_fields())
    client.send(frame(CONTINUATION, END_HEADERS, client.new_stream(), block))
    return client.outcome()


@rule("RFC9113-6.10", PROTOCOL_ERROR)
def test_continuation_after_the_end_of_a_block(client: Http2Client) -> str:
    stream_id = client.open(WATCH)
    client.send(frame(CONTINUATION, END_HEADERS, stream_id, literal_block([("a", "b")])))
    return client.outcome(stream_id)


@rule("RFC9113-6.10", PROTOCOL_ERROR)
def test_continuation_after_data(client: Http2Client) -> str:
    stream_id = client.new_stream()
    client.send(frame(HEADERS, 0, stream_id, literal_block(request_fields(WATCH))))
    client.data(stream_id, EMPTY_MESSAGE)
    client.send(frame(CONTINUATION, END_HEADERS, stream_id))
    return client.outcome(stream_id)


# A status of gRPC, or of HTTP (RFC 6585); an error of the connection where it is not decoded.
TOO_LARGE = {"grpc-status 8", "HTTP 431"} | connection_error("COMPRESSION_ERROR")


@rule("RFC9113-10.5.1", TOO_LARGE | stream_error("ENHANCE_YOUR_CALM"))
def test_header_list_over_the_announced_size(client: Http2Client) -> str:
    limit = client.server_settings.get(MAX_HEADER_LIST_SIZE, 2**20)
    fields = [*request_fields(), *[("x-long", "a" * 1000)] * (limit // 1000 + 1)]
    stream_id = _open_in_parts(client, literal_block(fields), 16_000)
    client.data(stream_id, EMPTY_MESSAGE, end=True)
    return client.stream_outcome(stream_id)


@rule("RFC9113-6.10", {"grpc-status 5"})
def test_status_of_1500_emoji(client: Http2Client) -> str:
    """Percent-encoded, the name that the status repeats takes 18 KB, more than one frame.

    A server may cut it, because clients reject more than 8 KiB; and the connection continues.
    """
    request = ModelInferRequest(model_name="\N{GRINNING FACE}" * 1500)
    stream_id = client.call(f"{INFERENCE}/ModelInfer", message(request.SerializeToString()))
    outcome = client.stream_outcome(stream_id)
    return outcome if client.works() else client.outcome()


class LargeTrailers(Echo):
    """Ends calls to `Abort` with trailers of 50 KB."""

    async def abort(self, request: bytes, context: grpc.aio.ServicerContext) -> None:
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
        await context.abort(code, "", (("large", "~" * 50_000),))


@pytest.mark.parametrize("section", ["RFC9113-6.10"])
async def test_trailers_in_many_frames(section: str) -> None:
    """No servicer of the server sends trailers over one frame, so this one runs in the test."""
    listener = listener_of(LargeTrailers(), Limits(), ServerMetrics(CollectorRegistry()))
    await listener.start()

    def call() -> None:
        with Http2Client.connect(f"127.0.0.1:{listener.port}") as client:
            reply = client.answer(client.call("/test.Echo/Abort"))
            assert str(reply) == "grpc-status 8"
            assert reply.get("large") == "~" * 50_000
            continued = [each for each in client.frames if isinstance(each, ContinuationFrame)]
            assert len(continued) >= 3
            assert max(each.body_len for each in client.frames) <= DEFAULT_FRAME_BYTES
            # The connection and its compression continue.
            assert str(client.answer(client.call("/test.Echo/Unary"))) == "grpc-status 0"

    await asyncio.to_thread(call)
    await listener.stop()


def _open_in_parts(client: Http2Client, block: bytes, size: int) -> int:
    """Begin a call with its header block in frames of `size` bytes."""
    stream_id = client.new_stream()
    client.send(header_frames(stream_id, block, size))
    return stream_id


def _interrupted(client: Http2Client, frame_between: object) -> str:
    stream_id = client.new_stream()
    block = literal_block(request_fields(WATCH))
    client.send(
        frame(HEADERS, END_STREAM, stream_id, block[:10]),
        frame_between(stream_id),
        frame(CONTINUATION, END_HEADERS, stream_id, block[10:]),
    )
    return client.outcome(stream_id)
