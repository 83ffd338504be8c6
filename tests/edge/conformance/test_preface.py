"""How a connection begins (RFC 9113, section 3)."""

from hyperframe.frame import SettingsFrame

from tests.edge.conformance.rules import OK, connection_error, rule
from tests.edge.frames import PING, PREFACE, Http2Client, frame, settings

# An HTTP/1.1 server that takes the bytes for a request may answer that it is none.
NO_HTTP2 = connection_error("PROTOCOL_ERROR") | {"HTTP/1.1 400", "HTTP/1.1 505"}


@rule("RFC9113-3.4", NO_HTTP2)
def test_wrong_preface(client: Http2Client) -> str:
    with Http2Client.connect(client.address, greet=False) as raw:
        raw.send(PREFACE.replace(b"2.0", b"2.1") + settings({}))
        return _end_of(raw)


@rule("RFC9113-3.4", NO_HTTP2)
def test_garbage_instead_of_the_preface(client: Http2Client) -> str:
    with Http2Client.connect(client.address, greet=False) as raw:
        raw.send(bytes(range(256)) * 4 + b"\r\n\r\n")
        return _end_of(raw)


@rule("RFC9113-3.4", connection_error("PROTOCOL_ERROR"))
def test_first_frame_is_no_settings(client: Http2Client) -> str:
    with Http2Client.connect(client.address, greet=False) as raw:
        raw.send(PREFACE + frame(PING, 0, 0, bytes(8)))
        return raw.outcome()


@rule("RFC9113-3.4", OK)
def test_preface_in_single_bytes(client: Http2Client) -> str:
    with Http2Client.connect(client.address, greet=False) as raw:
        for octet in PREFACE + settings({}):
            raw.send(bytes([octet]))
        return raw.stream_outcome(raw.call())


@rule("RFC9113-3.4", OK)
def test_request_in_one_write_with_the_preface(client: Http2Client) -> str:
    with Http2Client.connect(client.address, greet=False) as raw:
        raw.send(PREFACE + settings({}))
        return raw.stream_outcome(raw.call())


@rule("RFC9113-3.4", {"SETTINGS"})
def test_server_begins_with_settings(client: Http2Client) -> str:
    first = client.frames[0]
    return "SETTINGS" if isinstance(first, SettingsFrame) and not first.flags else repr(first)


def _end_of(raw: Http2Client) -> str:
    """What a connection that never spoke HTTP/2 ends with."""
    first_line = raw.status_line()
    return first_line if first_line else raw.outcome()
