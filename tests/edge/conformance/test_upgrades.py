"""Ways from HTTP to another protocol, none of which the server takes."""

from tests.edge.conformance.rules import MALFORMED, rule
from tests.edge.frames import Http2Client

NO_UPGRADE = {"HTTP/1.1", "closed", "GOAWAY PROTOCOL_ERROR"}


@rule("RFC9113-3.1", NO_UPGRADE)
def test_no_upgrade_from_http11(client: Http2Client) -> str:
    """RFC 9113 removed the upgrade by `h2c`; a server answers in HTTP/1.1 or not at all."""
    fields = b"connection: upgrade, http2-settings\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n"
    return _upgrade(client, b"h2c", fields)


GRPC = b"content-type: application/grpc\r\n"
WEBSOCKET_FIELDS = b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"


@rule("RFC6455-4.2.2", NO_UPGRADE)
def test_no_websocket_by_http11(client: Http2Client) -> str:
    return _upgrade(client, b"websocket", b"connection: upgrade\r\n" + WEBSOCKET_FIELDS + GRPC)


@rule("RFC8441-4", MALFORMED | {"HTTP 403"})
def test_no_websocket_by_http2(client: Http2Client) -> str:
    return _extended_connect(client)


@rule("RFC8441-4", MALFORMED | {"HTTP 403"})
def test_no_websocket_of_grpc(client: Http2Client) -> str:
    return _extended_connect(client, ("content-type", "application/grpc"))


def _upgrade(client: Http2Client, protocol: bytes, fields: bytes) -> str:
    with Http2Client.connect(client.address, greet=False) as raw:
        raw.send(
            b"GET /v2 HTTP/1.1\r\nhost: localhost\r\nupgrade: %b\r\n%b\r\n" % (protocol, fields)
        )
        answer = raw.status_line() or raw.outcome()
    rejected = answer.startswith("HTTP/1.1 ") and answer.split()[1] not in ("101", "500")
    return "HTTP/1.1" if rejected else answer


def _extended_connect(client: Http2Client, *fields: tuple[str, str]) -> str:
    stream_id = client.new_stream()
    pseudo_headers = {
        ":method": "CONNECT",
        ":protocol": "websocket",
        ":scheme": "http",
        ":path": "/grpc.health.v1.Health/Check",
        ":authority": "localhost",
    }
    client.headers(stream_id, [*pseudo_headers.items(), ("sec-websocket-version", "13"), *fields])
    return client.stream_outcome(stream_id)
