"""SETTINGS: values, acknowledgment and effect (RFC 9113, section 6.5)."""

from tests.edge.conformance.rules import OK, connection_error, rule
from tests.edge.frames import (
    CHECK,
    DEFAULT_FRAME_BYTES,
    DESCRIBE,
    ENABLE_PUSH,
    HEADER_TABLE_SIZE,
    INITIAL_WINDOW_SIZE,
    MAX_CONCURRENT_STREAMS,
    MAX_FRAME_SIZE,
    MAX_HEADER_LIST_SIZE,
    MAX_WINDOW_BYTES,
    REFLECTION,
    SETTINGS,
    Http2Client,
    frame,
    settings,
    window_update,
)

PROTOCOL_ERROR = connection_error("PROTOCOL_ERROR")


@rule("RFC9113-6.5.2", PROTOCOL_ERROR)
def test_enable_push_of_2(client: Http2Client) -> str:
    client.send(settings({ENABLE_PUSH: 2}))
    return client.outcome()


@rule("RFC9113-6.5.2", connection_error("FLOW_CONTROL_ERROR"))
def test_initial_window_over_the_largest(client: Http2Client) -> str:
    client.send(settings({INITIAL_WINDOW_SIZE: MAX_WINDOW_BYTES + 1}))
    return client.outcome()


@rule("RFC9113-6.5.2", PROTOCOL_ERROR)
def test_frame_size_below_the_smallest(client: Http2Client) -> str:
    client.send(settings({MAX_FRAME_SIZE: DEFAULT_FRAME_BYTES - 1}))
    return client.outcome()


@rule("RFC9113-6.5.2", PROTOCOL_ERROR)
def test_frame_size_over_the_largest(client: Http2Client) -> str:
    client.send(settings({MAX_FRAME_SIZE: 2**24}))
    return client.outcome()


@rule("RFC9113-6.5.2", OK)
def test_unknown_setting(client: Http2Client) -> str:
    client.set({0xFFFF: 123})
    return client.stream_outcome(client.call())


@rule("RFC9113-6.5.2", OK)
def test_all_settings_at_their_least(client: Http2Client) -> str:
    """A client that takes no pushed stream may say so by a limit of 0 streams."""
    client.set(
        {
            HEADER_TABLE_SIZE: 0,
            ENABLE_PUSH: 0,
            MAX_CONCURRENT_STREAMS: 0,
            MAX_FRAME_SIZE: DEFAULT_FRAME_BYTES,
        }
    )
    return client.stream_outcome(client.call(CHECK))


@rule("RFC9113-6.5.3", {"5 acknowledgments"})
def test_each_settings_frame_is_acknowledged(client: Http2Client) -> str:
    before = client.acknowledged
    client.send(*[settings({INITIAL_WINDOW_SIZE: 1000 + number}) for number in range(5)])
    client.ping()
    client.ping()
    return f"{client.acknowledged - before} acknowledgments"


@rule("RFC9113-6.5.3", OK)
def test_the_last_of_equal_settings_holds(client: Http2Client) -> str:
    """Values are taken in order, also within one frame."""
    first = settings({INITIAL_WINDOW_SIZE: 0})[9:]
    last = settings({INITIAL_WINDOW_SIZE: 100})[9:]
    client.send(frame(SETTINGS, 0, 0, first + last))
    return client.stream_outcome(client.call())


@rule("RFC9113-4.2", {"at most 16384"})
def test_replies_keep_to_the_default_frame_size(client: Http2Client) -> str:
    return _largest_frame(client, DEFAULT_FRAME_BYTES)


@rule("RFC9113-6.5.2", {"at most 20000"})
def test_replies_keep_to_the_announced_frame_size(client: Http2Client) -> str:
    client.set({MAX_FRAME_SIZE: 20_000})
    return _largest_frame(client, 20_000)


@rule("RFC9113-6.5.2", OK)
def test_header_list_limit_of_the_client(client: Http2Client) -> str:
    """It is advice; a normal reply takes some hundred bytes."""
    client.set({MAX_HEADER_LIST_SIZE: 1000})
    return client.stream_outcome(client.call())


def _largest_frame(client: Http2Client, limit: int) -> str:
    """Ask for replies of some 100 KB, with windows for all of them."""
    client.set({INITIAL_WINDOW_SIZE: MAX_WINDOW_BYTES})
    client.send(window_update(0, 1_000_000_000))
    stream_id = client.call(REFLECTION, DESCRIBE * 20)
    reply = client.answer(stream_id)
    assert len(reply.data) > 5 * limit, "the replies are too small to tell"
    largest = max(each.body_len for each in client.frames)
    return f"at most {limit}" if largest <= limit else f"{largest}"
