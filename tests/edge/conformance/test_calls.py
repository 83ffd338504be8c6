"""gRPC over HTTP/2 (github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md), call by call."""

import gzip

import pytest
from google.protobuf.message import Message

from convoy.oip.v2 import inference_pb2
from tests.edge.conformance.rules import OK, rule
from tests.edge.frames import (
    CHECK,
    DATA,
    DESCRIBE,
    EMPTY_MESSAGE,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    INFERENCE,
    REFLECTION,
    WATCH,
    Http2Client,
    Reply,
    frame,
    literal_block,
    message,
    request_fields,
    rst_stream,
)
from tests.processes import ServerProcess

ONE_FRAME = "one block with END_STREAM"


@rule("gRPC-Responses", {"200 application/grpc, a message, grpc-status 0 in trailers"})
def test_reply(client: Http2Client) -> str:
    reply = client.answer(client.call())
    head, trailers = map(dict, reply.blocks)
    size = int.from_bytes(reply.data[1:5], "big")
    whole = reply.data[0] == 0 and size == len(reply.data) - 5
    content = "a message" if whole else reply.data.hex()
    status = trailers.get("grpc-status")
    return f"{head[':status']} {head['content-type']}, {content}, grpc-status {status} in trailers"


@rule("gRPC-Responses", {f"200 application/grpc grpc-status 12, {ONE_FRAME}"})
def test_status_without_a_reply(client: Http2Client) -> str:
    """Trailers-Only: one header block that ends the stream."""
    stream_id = client.call("/unknown/Method")
    reply = client.answer(stream_id)
    (fields,) = map(dict, reply.blocks)
    shape = ONE_FRAME if not reply.data_sizes else f"{len(reply.data_sizes)} DATA frames"
    status = fields["grpc-status"]
    return f"{fields[':status']} {fields['content-type']} grpc-status {status}, {shape}"


@rule("gRPC-Responses", {"grpc-message %-encoded"})
def test_message_of_a_status_is_percent_encoded(client: Http2Client) -> str:
    """All but printable ASCII, and the percent sign (U+0020 to U+007E without U+0025)."""
    request = inference_pb2.ModelMetadataRequest(name="50% 模型\n\t~")
    stream_id = client.call(f"{INFERENCE}/ModelMetadata", _message(request))
    text = client.answer(stream_id).get("grpc-message") or ""
    encoded = "50%25 %E6%A8%A1%E5%9E%8B"
    return "grpc-message %-encoded" if encoded in text and text.isascii() else text


@rule("gRPC-Requests", OK)
def test_content_type_with_a_subtype(client: Http2Client) -> str:
    return client.stream_outcome(client.call(content_type="application/grpc+proto"))


@rule("gRPC-Requests", OK)
def test_scheme_https_behind_a_proxy(client: Http2Client) -> str:
    return client.stream_outcome(client.call(_scheme="https"))


@rule("gRPC-Requests", OK)
def test_timeout_in_every_unit(client: Http2Client) -> str:
    timeouts = ("1H", "2M", "99999999S", "60000m", "60000000u")
    return _all(client.stream_outcome(client.call(grpc_timeout=each)) for each in timeouts)


@rule("gRPC-Requests", {"grpc-status 4"})
def test_timeout_that_passes(client: Http2Client) -> str:
    return client.stream_outcome(client.call(WATCH, grpc_timeout="50m"))


@rule("gRPC-Requests", {"grpc-status 4"})
def test_timeout_that_passes_before_the_request_ends(client: Http2Client) -> str:
    stream_id = client.open(CHECK, grpc_timeout="50m")
    client.data(stream_id, EMPTY_MESSAGE[:3])
    return client.stream_outcome(stream_id)


@rule("gRPC-Requests", OK)
def test_unknown_metadata(client: Http2Client) -> str:
    return client.stream_outcome(
        client.call(x_text="value", x_data_bin="AAEC", x_padded_bin="AA==", grpc_tags_bin="AAE")
    )


@rule("gRPC-Requests", OK)
def test_binary_metadata_joined_by_commas(client: Http2Client) -> str:
    return client.stream_outcome(client.call(x_data_bin="AAEC,AAE,AA=="))


@rule("gRPC-Requests", OK)
def test_message_in_single_bytes(client: Http2Client) -> str:
    stream_id = client.open(f"{INFERENCE}/ModelReady")
    body = _message(inference_pb2.ModelReadyRequest(name="colors"))
    for index in range(len(body)):
        client.data(stream_id, body[index : index + 1], end=index == len(body) - 1)
    return client.stream_outcome(stream_id)


@rule("gRPC-Requests", OK)
def test_end_of_stream_in_a_frame_of_its_own(client: Http2Client) -> str:
    stream_id = client.open()
    client.data(stream_id)
    client.data(stream_id, EMPTY_MESSAGE)
    client.data(stream_id)
    client.data(stream_id, end=True)
    return client.stream_outcome(stream_id)


@rule("gRPC-Requests", {"HTTP 415"})
def test_other_content_type(client: Http2Client) -> str:
    """A client that is none of gRPC's gets a status that it understands."""
    return client.stream_outcome(client.call(content_type="application/json"))


@rule("gRPC-Requests", {"grpc-status 13"})
def test_message_with_an_undefined_flag(client: Http2Client) -> str:
    return client.stream_outcome(client.call(body=message(flag=2)))


@rule("gRPC-Compression", OK)
def test_compressed_message(client: Http2Client) -> str:
    request = inference_pb2.ModelReadyRequest(name="colors").SerializeToString()
    body = message(gzip.compress(request), flag=1)
    return client.stream_outcome(client.call(f"{INFERENCE}/ModelReady", body, grpc_encoding="gzip"))


@rule("gRPC-Compression", {"grpc-status 12, accepts identity, deflate, gzip"})
def test_unknown_compression(client: Http2Client) -> str:
    """The server also says what it accepts (doc/compression.md)."""
    stream_id = client.call(body=message(b"x", flag=1), grpc_encoding="br")
    outcome = client.stream_outcome(stream_id)
    return f"{outcome}, accepts {client.reply(stream_id).get('grpc-accept-encoding')}"


@rule("gRPC-Compression", {"grpc-status 13"})
def test_compressed_message_without_an_encoding(client: Http2Client) -> str:
    return client.stream_outcome(client.call(body=message(gzip.compress(b""), flag=1)))


@rule("gRPC-Requests", {"grpc-status 0 with 3 replies"})
def test_messages_in_one_frame(client: Http2Client) -> str:
    return _replies(client, client.call(REFLECTION, DESCRIBE * 3))


@rule("gRPC-Requests", {"grpc-status 0 with 3 replies"})
def test_messages_across_frames(client: Http2Client) -> str:
    """Each frame holds the end of one message and the beginning of the next."""
    stream_id, body = client.open(REFLECTION), DESCRIBE * 3
    size = len(DESCRIBE) - 7
    for start in range(0, len(body), size):
        client.data(stream_id, body[start : start + size], end=start + size >= len(body))
    return _replies(client, stream_id)


@rule("gRPC-Requests", {"grpc-status 0 with 0 replies"})
def test_stream_without_messages(client: Http2Client) -> str:
    stream_id = client.new_stream()
    client.headers(stream_id, request_fields(REFLECTION), END_HEADERS | END_STREAM)
    return _replies(client, stream_id)


@rule("gRPC-Streaming", {"a reply before the next request"})
def test_stream_in_both_directions_at_once(client: Http2Client) -> str:
    stream_id = client.open(REFLECTION)
    for count in (1, 2, 3):
        client.data(stream_id, DESCRIBE)
        client.wait(lambda: _messages(client.reply(stream_id)) == count)  # noqa: B023
    client.data(stream_id, end=True)
    outcome = client.stream_outcome(stream_id)
    return "a reply before the next request" if outcome in OK else outcome


@rule("gRPC-Streaming", {"works"})
def test_cancelled_stream(client: Http2Client) -> str:
    stream_id = client.call(WATCH)
    client.wait(lambda: client.reply(stream_id).data)
    client.send(rst_stream(stream_id))
    return "works" if client.works() else client.outcome()


@rule("gRPC-Streaming", OK)
def test_hundred_calls_at_once(client: Http2Client) -> str:
    """All in one write, so that the server reads them together."""
    block = literal_block(request_fields())
    streams = [client.new_stream() for _ in range(100)]
    client.send(
        *[
            frame(HEADERS, END_HEADERS, each, block) + frame(DATA, END_STREAM, each, EMPTY_MESSAGE)
            for each in streams
        ]
    )
    return _all(client.stream_outcome(each) for each in streams)


@pytest.mark.parametrize("section", ["RFC9113-5.1"])
def test_one_stream_runs_one_handler(server_process: ServerProcess, section: str) -> None:
    """Fifty whole requests on one stream are at most one request to the model."""
    request = inference_pb2.ModelInferRequest(model_name="colors")
    block = literal_block(request_fields(f"{INFERENCE}/ModelInfer"))
    body = _message(request)
    before = _calls(server_process)
    with Http2Client.connect(server_process.address) as client:
        stream_id = client.new_stream()
        client.send(
            *[
                frame(HEADERS, END_HEADERS, stream_id, block)
                + frame(DATA, END_STREAM, stream_id, body)
            ]
            * 50
        )
        client.outcome(stream_id)
    with Http2Client.connect(server_process.address) as client:
        assert client.works()
    assert _calls(server_process) - before <= 1


def _calls(server_process: ServerProcess) -> float:
    return server_process.metric("convoy_request_duration_seconds_count", method="ModelInfer")


def _message(request: Message) -> bytes:
    return message(request.SerializeToString())


def _messages(reply: Reply) -> int:
    """How many whole messages the data hold."""
    count, start = 0, 0
    while start + 5 <= len(reply.data):
        start += 5 + int.from_bytes(reply.data[start + 1 : start + 5], "big")
        count += start <= len(reply.data)
    return count


def _replies(client: Http2Client, stream_id: int) -> str:
    outcome = client.stream_outcome(stream_id)
    return f"{outcome} with {_messages(client.reply(stream_id))} replies"


def _all(outcomes: object) -> str:
    different = sorted(set(outcomes))
    return different[0] if len(different) == 1 else str(different)
