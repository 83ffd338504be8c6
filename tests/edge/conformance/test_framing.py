"""Frames by themselves: sizes, flags, padding and the stream they belong to (RFC 9113)."""

import struct

from tests.edge.conformance.rules import (
    IGNORED,
    OK,
    connection_error,
    rule,
    stream_error,
)
from tests.edge.frames import (
    ACK,
    CONTINUATION,
    DATA,
    DEFAULT_FRAME_BYTES,
    EMPTY_MESSAGE,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HAS_PRIORITY,
    HEADERS,
    MAX_FRAME_SIZE,
    PADDED,
    PING,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WATCH,
    WINDOW_UPDATE,
    Http2Client,
    frame,
    literal_block,
    message,
    request_fields,
)

UNKNOWN_KIND = 0xBE
PROTOCOL_ERROR = connection_error("PROTOCOL_ERROR")
FRAME_SIZE_ERROR = connection_error("FRAME_SIZE_ERROR")


@rule("RFC9113-4.1", IGNORED)
def test_unknown_frame(client: Http2Client) -> str:
    client.send(frame(UNKNOWN_KIND, 0xFF, 0, b"unknown"))
    return client.outcome()


@rule("RFC9113-4.1", OK)
def test_unknown_frame_in_a_call(client: Http2Client) -> str:
    stream_id = client.open()
    client.send(frame(UNKNOWN_KIND, 0xFF, stream_id, bytes(1000)))
    client.data(stream_id, EMPTY_MESSAGE, end=True)
    return client.stream_outcome(stream_id)


@rule("RFC9113-4.1", OK)
def test_undefined_flags(client: Http2Client) -> str:
    """The bits that no flag uses: 0xD2 of HEADERS, 0xF6 of DATA, 0xFE of PING."""
    stream_id = client.new_stream()
    block = literal_block(request_fields())
    client.send(
        frame(HEADERS, END_HEADERS | 0xD2, stream_id, block),
        frame(PING, 0xFE, 0, bytes(8)),
        frame(DATA, END_STREAM | 0xF6, stream_id, EMPTY_MESSAGE),
    )
    return client.stream_outcome(stream_id)


@rule("RFC9113-4.1", OK)
def test_reserved_bit(client: Http2Client) -> str:
    stream_id = client.new_stream()
    reserved = stream_id | 0x80000000
    client.send(
        frame(HEADERS, END_HEADERS, reserved, literal_block(request_fields())),
        frame(DATA, END_STREAM, reserved, EMPTY_MESSAGE),
    )
    return client.stream_outcome(stream_id)


@rule("RFC9113-4.2", OK)
def test_data_of_16384_bytes(client: Http2Client) -> str:
    """Every receiver takes frames of that size. The field is unknown to the service."""
    return client.stream_outcome(client.call(body=_message_of(DEFAULT_FRAME_BYTES)))


@rule("RFC9113-4.2", OK)
def test_data_of_the_announced_size(client: Http2Client) -> str:
    size = client.server_settings.get(MAX_FRAME_SIZE, DEFAULT_FRAME_BYTES)
    # Within the default window of the connection, so that flow control does not interfere.
    return client.stream_outcome(client.call(body=_message_of(min(size, 65_000))))


@rule("RFC9113-4.2", FRAME_SIZE_ERROR | {"RST_STREAM FRAME_SIZE_ERROR"})
def test_data_over_the_announced_size(client: Http2Client) -> str:
    stream_id = client.open()
    client.data(stream_id, _message_of(_over_limit(client)), end=True)
    return client.outcome(stream_id)


@rule("RFC9113-4.2", FRAME_SIZE_ERROR)
def test_headers_over_the_announced_size(client: Http2Client) -> str:
    """An error of the connection: the frame would change its compression state."""
    fields = [*request_fields(), ("padding", "a" * _over_limit(client))]
    stream_id = client.new_stream()
    client.send(frame(HEADERS, END_HEADERS | END_STREAM, stream_id, literal_block(fields)))
    return client.outcome(stream_id)


@rule("RFC9113-4.2", FRAME_SIZE_ERROR)
def test_settings_over_the_announced_size(client: Http2Client) -> str:
    entry = struct.pack(">HL", 0xFFFF, 0)
    client.send(frame(SETTINGS, 0, 0, entry * (_over_limit(client) // len(entry) + 1)))
    return client.outcome()


@rule("RFC9113-6.1", OK)
def test_padded_data(client: Http2Client) -> str:
    stream_id = client.open()
    client.data(stream_id, EMPTY_MESSAGE, end=True, padding=100)
    return client.stream_outcome(stream_id)


@rule("RFC9113-6.1", OK)
def test_data_of_padding_alone(client: Http2Client) -> str:
    stream_id = client.open()
    for _ in range(10):
        client.data(stream_id, padding=255)
    client.data(stream_id, EMPTY_MESSAGE, end=True)
    return client.stream_outcome(stream_id)


@rule("RFC9113-6.1", PROTOCOL_ERROR)
def test_data_padding_as_long_as_the_payload(client: Http2Client) -> str:
    stream_id = client.open()
    client.send(frame(DATA, PADDED | END_STREAM, stream_id, b"\x06" + bytes(5)))
    return client.outcome(stream_id)


@rule("RFC9113-6.1", PROTOCOL_ERROR | FRAME_SIZE_ERROR)
def test_padded_data_without_a_length(client: Http2Client) -> str:
    stream_id = client.open()
    client.send(frame(DATA, PADDED | END_STREAM, stream_id))
    return client.outcome(stream_id)


@rule("RFC9113-6.1", PROTOCOL_ERROR)
def test_data_on_stream_0(client: Http2Client) -> str:
    client.send(frame(DATA, 0, 0, EMPTY_MESSAGE))
    return client.outcome()


@rule("RFC9113-6.2", OK)
def test_padded_headers_with_priority(client: Http2Client) -> str:
    stream_id = client.new_stream()
    priority = struct.pack(">LB", 0, 15)
    payload = b"\x10" + priority + literal_block(request_fields()) + bytes(16)
    client.send(frame(HEADERS, PADDED | HAS_PRIORITY | END_HEADERS, stream_id, payload))
    client.data(stream_id, EMPTY_MESSAGE, end=True)
    return client.stream_outcome(stream_id)


@rule("RFC9113-6.2", PROTOCOL_ERROR)
def test_headers_padding_over_the_payload(client: Http2Client) -> str:
    block = literal_block(request_fields())
    stream_id = client.new_stream()
    client.send(frame(HEADERS, PADDED | END_HEADERS, stream_id, b"\xff" + block[:200]))
    return client.outcome(stream_id)


@rule("RFC9113-6.2", PROTOCOL_ERROR)
def test_headers_on_stream_0(client: Http2Client) -> str:
    client.headers(0, request_fields())
    return client.outcome()


@rule("RFC9113-6.3", stream_error("FRAME_SIZE_ERROR"))
def test_priority_of_4_bytes(client: Http2Client) -> str:
    stream_id = client.open(WATCH)
    client.send(frame(PRIORITY, 0, stream_id, bytes(4)))
    return client.outcome(stream_id)


@rule("RFC9113-6.3", PROTOCOL_ERROR)
def test_priority_on_stream_0(client: Http2Client) -> str:
    client.send(frame(PRIORITY, 0, 0, bytes(5)))
    return client.outcome()


@rule("RFC9113-6.4", FRAME_SIZE_ERROR)
def test_rst_stream_of_3_bytes(client: Http2Client) -> str:
    stream_id = client.open(WATCH)
    client.send(frame(RST_STREAM, 0, stream_id, bytes(3)))
    return client.outcome(stream_id)


@rule("RFC9113-6.4", PROTOCOL_ERROR)
def test_rst_stream_on_stream_0(client: Http2Client) -> str:
    client.send(frame(RST_STREAM, 0, 0, bytes(4)))
    return client.outcome()


@rule("RFC9113-6.5", FRAME_SIZE_ERROR)
def test_settings_of_5_bytes(client: Http2Client) -> str:
    client.send(frame(SETTINGS, 0, 0, bytes(5)))
    return client.outcome()


@rule("RFC9113-6.5", FRAME_SIZE_ERROR)
def test_settings_acknowledgment_with_a_payload(client: Http2Client) -> str:
    client.send(frame(SETTINGS, ACK, 0, bytes(6)))
    return client.outcome()


@rule("RFC9113-6.5", PROTOCOL_ERROR)
def test_settings_on_a_stream(client: Http2Client) -> str:
    client.send(frame(SETTINGS, 0, 1))
    return client.outcome()


@rule("RFC9113-6.6", PROTOCOL_ERROR)
def test_push_promise_from_a_client(client: Http2Client) -> str:
    stream_id = client.open(WATCH)
    block = struct.pack(">L", 2) + literal_block(request_fields())
    client.send(frame(PUSH_PROMISE, END_HEADERS, stream_id, block))
    return client.outcome(stream_id)


@rule("RFC9113-6.7", FRAME_SIZE_ERROR)
def test_ping_of_7_bytes(client: Http2Client) -> str:
    client.send(frame(PING, 0, 0, bytes(7)))
    return client.outcome()


@rule("RFC9113-6.7", PROTOCOL_ERROR)
def test_ping_on_a_stream(client: Http2Client) -> str:
    client.send(frame(PING, 0, 1, bytes(8)))
    return client.outcome()


@rule("RFC9113-6.7", {"1 acknowledgment"})
def test_ping_is_returned(client: Http2Client) -> str:
    """With the same payload; `outcome` waits for that. An acknowledgment gets no answer."""
    before = len(client.frames)
    client.send(frame(PING, ACK, 0, b"not-sent"))
    assert client.ping()
    pings = [each for each in client.frames[before:] if each.type == PING]
    return f"{len(pings)} acknowledgment"


@rule("RFC9113-6.8", FRAME_SIZE_ERROR)
def test_goaway_of_7_bytes(client: Http2Client) -> str:
    client.send(frame(GOAWAY, 0, 0, bytes(7)))
    return client.outcome()


@rule("RFC9113-6.8", PROTOCOL_ERROR)
def test_goaway_on_a_stream(client: Http2Client) -> str:
    client.send(frame(GOAWAY, 0, 1, bytes(8)))
    return client.outcome()


@rule("RFC9113-6.9", FRAME_SIZE_ERROR)
def test_window_update_of_3_bytes(client: Http2Client) -> str:
    client.send(frame(WINDOW_UPDATE, 0, 0, bytes(3)))
    return client.outcome()


@rule("RFC9113-6.10", PROTOCOL_ERROR)
def test_continuation_on_stream_0(client: Http2Client) -> str:
    client.send(frame(CONTINUATION, END_HEADERS, 0, literal_block(request_fields())))
    return client.outcome()


def _over_limit(client: Http2Client) -> int:
    return client.server_settings.get(MAX_FRAME_SIZE, DEFAULT_FRAME_BYTES) + 1


def _message_of(size: int) -> bytes:
    """A gRPC message of `size` bytes in all: field 1000 of a Check request, which is unknown."""
    tag, content = b"\xc2\x3e", size - 5 - 2 - 3
    length = bytes([content & 0x7F | 0x80, content >> 7 & 0x7F | 0x80, content >> 14])
    return message(tag + length + bytes(content))
