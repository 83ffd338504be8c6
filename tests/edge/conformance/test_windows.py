"""Flow control in both directions (RFC 9113, sections 5.2 and 6.9)."""

from tests.edge.conformance.rules import OK, connection_error, rule, stream_error
from tests.edge.frames import (
    DEFAULT_WINDOW_BYTES,
    DESCRIBE,
    INFERENCE,
    INITIAL_WINDOW_SIZE,
    MAX_WINDOW_BYTES,
    REFLECTION,
    WATCH,
    Http2Client,
    message,
    settings,
    window_update,
)

# More than any window of the server.
MUCH_BYTES = 10_000_000
FLOW_CONTROL_ERROR = connection_error("FLOW_CONTROL_ERROR")


@rule("RFC9113-6.9", stream_error("PROTOCOL_ERROR"))
def test_increment_of_0_on_a_stream(client: Http2Client) -> str:
    stream_id = client.open(WATCH)
    client.send(window_update(stream_id, 0))
    return client.outcome(stream_id)


@rule("RFC9113-6.9", connection_error("PROTOCOL_ERROR"))
def test_increment_of_0_on_the_connection(client: Http2Client) -> str:
    client.send(window_update(0, 0))
    return client.outcome()


@rule("RFC9113-6.9.1", stream_error("FLOW_CONTROL_ERROR"))
def test_window_of_a_stream_overflows(client: Http2Client) -> str:
    stream_id = client.open(WATCH)
    client.send(window_update(stream_id, MAX_WINDOW_BYTES))
    return client.outcome(stream_id)


@rule("RFC9113-6.9.1", FLOW_CONTROL_ERROR)
def test_window_of_the_connection_overflows(client: Http2Client) -> str:
    client.send(window_update(0, MAX_WINDOW_BYTES))
    return client.outcome()


@rule("RFC9113-6.9.1", {"works"})
def test_windows_of_the_largest_size(client: Http2Client) -> str:
    stream_id = client.open(WATCH)
    room = MAX_WINDOW_BYTES - DEFAULT_WINDOW_BYTES
    client.send(window_update(0, room), window_update(stream_id, room))
    return "works" if client.works() else client.outcome()


@rule("RFC9113-6.9.2", FLOW_CONTROL_ERROR)
def test_settings_overflow_the_window_of_a_stream(client: Http2Client) -> str:
    stream_id = client.open(WATCH)
    client.send(window_update(stream_id, MAX_WINDOW_BYTES - DEFAULT_WINDOW_BYTES))
    client.send(settings({INITIAL_WINDOW_SIZE: DEFAULT_WINDOW_BYTES + 1}))
    return client.outcome(stream_id)


@rule("RFC9113-6.9.1", {"0, then 1, then all"})
def test_window_of_0(client: Http2Client) -> str:
    client.set({INITIAL_WINDOW_SIZE: 0})
    stream_id = client.call()
    client.wait(lambda: client.reply(stream_id).blocks)
    sizes = [_received(client, stream_id)]
    client.send(window_update(stream_id, 1))
    client.wait(lambda: client.reply(stream_id).data)
    sizes.append(_received(client, stream_id))
    client.send(window_update(stream_id, 1000))
    outcome = client.stream_outcome(stream_id)
    return f"{sizes[0]}, then {sizes[1]}, then all" if outcome in OK else outcome


@rule("RFC9113-6.9.2", OK)
def test_settings_open_the_windows_of_streams(client: Http2Client) -> str:
    client.set({INITIAL_WINDOW_SIZE: 0})
    stream_id = client.call()
    client.wait(lambda: client.reply(stream_id).blocks)
    client.set({INITIAL_WINDOW_SIZE: 100})
    return client.stream_outcome(stream_id)


@rule("RFC9113-6.9.2", {"100, then 110"})
def test_settings_make_a_window_negative(client: Http2Client) -> str:
    """Of a window of 100, all used, -100 remains when the initial window becomes 0."""
    client.set({INITIAL_WINDOW_SIZE: 100})
    stream_id = client.call(REFLECTION, DESCRIBE)
    client.wait(lambda: len(client.reply(stream_id).data) >= 100)
    client.set({INITIAL_WINDOW_SIZE: 0})
    client.send(window_update(stream_id, 100))
    before = _received(client, stream_id)
    client.send(window_update(stream_id, 10))
    client.wait(lambda: len(client.reply(stream_id).data) > before)
    return f"{before}, then {_received(client, stream_id)}"


@rule("RFC9113-6.9.1", {"65535, then all"})
def test_window_of_the_connection(client: Http2Client) -> str:
    """Ten replies, of streams with windows enough, share what the connection has."""
    client.set({INITIAL_WINDOW_SIZE: MAX_WINDOW_BYTES})
    streams = [client.open(REFLECTION) for _ in range(10)]
    for stream_id in streams:
        client.data(stream_id, DESCRIBE * 10, end=True)
    client.wait(lambda: _total(client, streams) >= DEFAULT_WINDOW_BYTES)
    client.ping()
    before = _total(client, streams)
    client.send(window_update(0, MAX_WINDOW_BYTES - DEFAULT_WINDOW_BYTES))
    outcomes = {client.stream_outcome(each) for each in streams}
    return f"{before}, then all" if outcomes == OK else ", ".join(sorted(outcomes))


@rule("RFC9113-6.9", {"4000000"})
def test_window_grows_while_a_message_is_read(client: Http2Client) -> str:
    """A sender that keeps to the windows gets a large message through; padding counts, too."""
    stream_id, padding = client.open(f"{INFERENCE}/ModelInfer"), 255
    body, sent = message(bytes(4_000_000 - 5)), 0
    while sent < len(body) and not client.ended(stream_id):
        client.wait(lambda: client.ended(stream_id) or client.room(stream_id) > 1 + padding)
        size = min(client.room(stream_id) - 1 - padding, 16_000)
        client.data(stream_id, body[sent : sent + size], padding=padding)
        sent += size
    return str(min(sent, len(body))) if not client.closed else client.outcome()


@rule("RFC9113-6.9.1", stream_error("FLOW_CONTROL_ERROR"))
def test_client_exceeds_the_window(client: Http2Client) -> str:
    """A stream whose replies nobody takes is not read either, so its window stays used up."""
    client.set({INITIAL_WINDOW_SIZE: 0})
    stream_id = client.open(REFLECTION)
    requests = DESCRIBE * (16_000 // len(DESCRIBE))
    for _ in range(MUCH_BYTES // len(requests)):
        client.data(stream_id, requests)
    if client.ping() and client.ping() and not client.ended(stream_id):
        return "ignored"
    return client.stream_outcome(stream_id)


@rule("RFC9113-6.9", {"works"})
def test_window_of_the_connection_survives_failed_calls(client: Http2Client) -> str:
    """What comes on a stream that ended counts for the connection, so the server returns it."""
    for _ in range(200):
        stream_id = client.open("/unknown/Method")
        client.wait(lambda: client.room(0) >= 16_384)
        client.data(stream_id, bytes(16_384))
        client.answer(stream_id)
    return "works" if client.works() else client.outcome()


@rule("RFC9113-6.9", {"grpc-status 12"})
def test_status_needs_no_window(client: Http2Client) -> str:
    client.set({INITIAL_WINDOW_SIZE: 0})
    return client.stream_outcome(client.call("/unknown/Method"))


def _received(client: Http2Client, stream_id: int) -> int:
    """How many bytes came on a stream once the server had its say."""
    client.ping()
    client.ping()
    return sum(client.reply(stream_id).data_sizes)


def _total(client: Http2Client, streams: list[int]) -> int:
    return sum(sum(client.reply(each).data_sizes) for each in streams)
