"""States and identifiers of streams (RFC 9113, section 5)."""

import struct

from tests.edge.conformance.rules import (
    IGNORED,
    OK,
    connection_error,
    rule,
    stream_error,
)
from tests.edge.frames import (
    CHECK,
    DATA,
    EMPTY_MESSAGE,
    END_HEADERS,
    END_STREAM,
    HAS_PRIORITY,
    HEADERS,
    MAX_CONCURRENT_STREAMS,
    PRIORITY,
    WATCH,
    Http2Client,
    frame,
    literal_block,
    request_fields,
    rst_stream,
    window_update,
)

STREAM_CLOSED = stream_error("STREAM_CLOSED")
PROTOCOL_ERROR = connection_error("PROTOCOL_ERROR")


@rule("RFC9113-5.1", PROTOCOL_ERROR)
def test_data_on_an_idle_stream(client: Http2Client) -> str:
    client.data(1, EMPTY_MESSAGE)
    return client.outcome()


@rule("RFC9113-5.1", PROTOCOL_ERROR)
def test_rst_stream_on_an_idle_stream(client: Http2Client) -> str:
    client.send(rst_stream(1))
    return client.outcome()


@rule("RFC9113-5.1", PROTOCOL_ERROR)
def test_window_update_on_an_idle_stream(client: Http2Client) -> str:
    client.send(window_update(1, 100))
    return client.outcome()


@rule("RFC9113-5.1", OK)
def test_priority_on_an_idle_stream(client: Http2Client) -> str:
    client.send(frame(PRIORITY, 0, 1, bytes(5)))
    return client.stream_outcome(client.call())


@rule("RFC9113-5.1", STREAM_CLOSED)
def test_data_on_a_half_closed_stream(client: Http2Client) -> str:
    stream_id = client.call(WATCH)
    client.data(stream_id, EMPTY_MESSAGE, end=True)
    return client.outcome(stream_id)


@rule("RFC9113-5.1", STREAM_CLOSED)
def test_headers_on_a_half_closed_stream(client: Http2Client) -> str:
    stream_id = client.call(WATCH)
    client.headers(stream_id, request_fields(WATCH), END_HEADERS | END_STREAM)
    return client.outcome(stream_id)


@rule("RFC9113-5.1", STREAM_CLOSED | PROTOCOL_ERROR)
def test_fifty_requests_on_one_stream(client: Http2Client) -> str:
    """`test_handlers.py` counts the handlers that this runs."""
    stream_id = client.new_stream()
    block = literal_block(request_fields(WATCH))
    client.send(
        *[
            frame(HEADERS, END_HEADERS, stream_id, block)
            + frame(DATA, END_STREAM, stream_id, EMPTY_MESSAGE)
        ]
        * 50
    )
    return client.outcome(stream_id)


@rule("RFC9113-5.1", IGNORED)
def test_frames_that_a_half_closed_stream_takes(client: Http2Client) -> str:
    stream_id = client.call(WATCH)
    client.send(window_update(stream_id, 100), frame(PRIORITY, 0, stream_id, bytes(5)))
    return client.outcome(stream_id)


@rule("RFC9113-5.1", {"works"})
def test_reset_of_a_half_closed_stream(client: Http2Client) -> str:
    client.send(rst_stream(client.call(WATCH)))
    return "works" if client.works() else client.outcome()


@rule("RFC9113-5.1", STREAM_CLOSED | PROTOCOL_ERROR)
def test_headers_on_a_closed_stream(client: Http2Client) -> str:
    stream_id = client.call()
    client.answer(stream_id)
    client.replies.clear()
    client.headers(stream_id, request_fields(), END_HEADERS | END_STREAM)
    return client.outcome(stream_id)


@rule("RFC9113-5.1", STREAM_CLOSED | PROTOCOL_ERROR)
def test_data_on_a_closed_stream(client: Http2Client) -> str:
    stream_id = client.call()
    client.answer(stream_id)
    client.replies.clear()
    client.data(stream_id, EMPTY_MESSAGE)
    return client.outcome(stream_id)


@rule("RFC9113-5.1", STREAM_CLOSED | PROTOCOL_ERROR)
def test_data_on_a_stream_that_the_client_reset(client: Http2Client) -> str:
    stream_id = client.open(WATCH)
    client.send(rst_stream(stream_id))
    client.data(stream_id, EMPTY_MESSAGE, end=True)
    return client.outcome(stream_id)


@rule("RFC9113-5.1", STREAM_CLOSED | PROTOCOL_ERROR)
def test_headers_on_a_stream_that_the_client_reset(client: Http2Client) -> str:
    stream_id = client.open(WATCH)
    client.send(rst_stream(stream_id))
    client.headers(stream_id, request_fields(WATCH), END_HEADERS | END_STREAM)
    return client.outcome(stream_id)


@rule("RFC9113-5.1", {"works"})
def test_late_frames_of_a_closed_stream(client: Http2Client) -> str:
    """WINDOW_UPDATE, RST_STREAM and PRIORITY may cross the end of a stream."""
    stream_id = client.call()
    client.answer(stream_id)
    client.send(
        window_update(stream_id, 100),
        frame(PRIORITY, 0, stream_id, bytes(5)),
        rst_stream(stream_id),
    )
    return "works" if client.works() else client.outcome()


@rule("RFC9113-5.1", {"works"})
def test_data_on_a_stream_that_the_server_reset(client: Http2Client) -> str:
    """It was sent before the reset arrived."""
    stream_id = client.open(_path=None)
    client.answer(stream_id)
    client.data(stream_id, EMPTY_MESSAGE, end=True)
    return "works" if client.works() else client.outcome()


@rule("RFC9113-5.1", {"works"})
def test_trailers_on_a_stream_that_the_server_reset(client: Http2Client) -> str:
    """They were sent before the reset arrived, and their header block changes the table."""
    stream_id = client.open(te="gzip", _path=None)
    client.answer(stream_id)
    client.data(stream_id, EMPTY_MESSAGE)
    client.headers(stream_id, [("new-in-the-table", "value")], END_HEADERS | END_STREAM)
    return "works" if client.works() else client.outcome()


@rule("RFC9113-5.1.1", PROTOCOL_ERROR)
def test_even_stream_identifier(client: Http2Client) -> str:
    client.headers(2, request_fields(), END_HEADERS | END_STREAM)
    return client.outcome(2)


@rule("RFC9113-5.1.1", PROTOCOL_ERROR | STREAM_CLOSED)
def test_stream_identifiers_backwards(client: Http2Client) -> str:
    """A stream below the newest was never opened, so it is closed."""
    client.headers(5, request_fields(WATCH))
    client.headers(3, request_fields(WATCH), END_HEADERS | END_STREAM)
    return client.outcome(3)


@rule("RFC9113-5.1.1", OK)
def test_stream_identifiers_with_gaps(client: Http2Client) -> str:
    last = 0
    for stream_id in (1, 7, 1001, 2**31 - 1):
        client.headers(stream_id, request_fields())
        client.data(stream_id, EMPTY_MESSAGE, end=True)
        last = stream_id
    return client.stream_outcome(last)


@rule("RFC9113-5.1.2", {"no limit", "RST_STREAM REFUSED_STREAM"} | stream_error("PROTOCOL_ERROR"))
def test_streams_over_the_announced_number(client: Http2Client) -> str:
    limit = client.server_settings.get(MAX_CONCURRENT_STREAMS, 2**32 - 1)
    if limit > 10_000:
        return "no limit"
    for _ in range(limit):
        client.open(WATCH)
    return client.outcome(client.open(WATCH))


@rule("RFC9113-5.1.2", OK)
def test_reset_streams_do_not_count_as_open(client: Http2Client) -> str:
    limit = min(client.server_settings.get(MAX_CONCURRENT_STREAMS, 100), 100)
    for _ in range(limit + 1):
        client.send(rst_stream(client.open(WATCH)))
        assert client.works()
    return client.stream_outcome(client.call(CHECK))


# Priorities are gone from RFC 9113; RFC 7540 made these a stream error, and both will do.
SELF_DEPENDENCY = IGNORED | stream_error("PROTOCOL_ERROR")


@rule("RFC7540-5.3.1", SELF_DEPENDENCY)
def test_priority_of_a_stream_on_itself(client: Http2Client) -> str:
    stream_id = client.open(WATCH)
    client.send(frame(PRIORITY, 0, stream_id, struct.pack(">LB", stream_id, 15)))
    return client.outcome(stream_id)


@rule("RFC7540-5.3.1", SELF_DEPENDENCY | OK)
def test_headers_of_a_stream_that_depends_on_itself(client: Http2Client) -> str:
    stream_id = client.new_stream()
    priority = struct.pack(">LB", stream_id, 15)
    block = priority + literal_block(request_fields())
    client.send(frame(HEADERS, HAS_PRIORITY | END_HEADERS, stream_id, block))
    client.data(stream_id, EMPTY_MESSAGE, end=True)
    return client.outcome(stream_id)
