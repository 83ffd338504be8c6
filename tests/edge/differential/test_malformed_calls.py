"""Both transports answer malformed calls alike, or as `DIFFERENCES` says."""

import socket
import time
from collections.abc import Callable

import pytest

from tests.edge.conftest import TRANSPORTS, ServerOf
from tests.edge.differential.differences import DIFFERENCES
from tests.edge.differential.probes import PROBES, UNFINISHED, Probe
from tests.edge.frames import TIMEOUT_S, Http2Client

REFERENCE = "grpcio"


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("transport", [name for name in TRANSPORTS if name != REFERENCE])
def test_malformed_call(server_of: ServerOf, transport: str, name: str) -> None:
    answers = [answer_to(PROBES[name], server_of(each).address) for each in (transport, REFERENCE)]
    compare(name, *answers)


@pytest.mark.parametrize("name", UNFINISHED)
@pytest.mark.parametrize("transport", [name for name in TRANSPORTS if name != REFERENCE])
def test_unfinished_call(server_of: ServerOf, transport: str, name: str) -> None:
    """h2corn's transport answers long before the deadline; the C core waits for it."""
    h2corn = answer_to(UNFINISHED[name]("1H"), server_of(transport).address)
    grpcio = answer_to(UNFINISHED[name]("1S"), server_of(REFERENCE).address)
    compare(name, h2corn, grpcio)


HTTP11_PROBES = {
    "HTTP/1.1 with application/grpc": b"POST /grpc.health.v1.Health/Check HTTP/1.1\r\n"
    b"host: localhost\r\ncontent-type: application/grpc\r\ncontent-length: 5\r\n\r\n\0\0\0\0\0",
    "HTTP/1.1 without application/grpc": b"GET /grpc.health.v1.Health/Check HTTP/1.1\r\n"
    b"host: localhost\r\n\r\n",
}


@pytest.mark.parametrize("name", HTTP11_PROBES)
@pytest.mark.parametrize("transport", [name for name in TRANSPORTS if name != REFERENCE])
def test_http11(server_of: ServerOf, transport: str, name: str) -> None:
    answers = [
        first_line(HTTP11_PROBES[name], server_of(each).address) for each in (transport, REFERENCE)
    ]
    compare(name, *answers)


def test_malformed_calls_are_counted(server_of: ServerOf) -> None:
    """Each that reaches the endpoint, once: all but those that h2corn answers by itself."""
    server = server_of("h2corn")
    _wait_until(lambda: server.metric("convoy_open_calls") == 0)
    before, answered = server.metric("convoy_calls_total"), 0
    for probe in (*PROBES.values(), *(unfinished("1H") for unfinished in UNFINISHED.values())):
        with Http2Client.connect(server.address) as client:
            client.answer(probe(client))
            statuses = [reply.get(":status") for reply in client.replies.values()]
            answered += sum(status not in (None, "431") for status in statuses)
    _wait_until(lambda: server.metric("convoy_calls_total") - before == answered)


def test_differences_are_of_probes() -> None:
    assert DIFFERENCES.keys() <= PROBES.keys() | UNFINISHED.keys() | HTTP11_PROBES.keys()


def compare(name: str, h2corn: str, grpcio: str) -> None:
    """Fail unless the answers are equal, or are those that `DIFFERENCES` has for the probe."""
    difference = DIFFERENCES.get(name)
    if difference is None:
        assert h2corn == grpcio
    else:
        assert (h2corn, grpcio) == (difference.h2corn, difference.grpcio), difference.reason
        assert h2corn != grpcio, f"{name} is answered alike now: take it out of DIFFERENCES"


def answer_to(probe: Probe, address: str) -> str:
    """Send a call on a connection of its own.

    Returns:
        HTTP status, gRPC status or the code of a reset, and what became of the connection, such as
        "HTTP 200, grpc-status 13, connection works".
    """
    with Http2Client.connect(address) as client:
        stream_id = probe(client)
        outcome = client.stream_outcome(stream_id)
        status = client.reply(stream_id).get(":status")
        http = f"HTTP {status}, " if outcome.startswith("grpc-status") else ""
        works = client.works()
        return f"{http}{outcome}, connection {'works' if works else 'ends'}"


def first_line(request: bytes, address: str) -> str:
    """Send an HTTP/1.1 request; return version and status of the answer, or "no HTTP/1.1"."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), TIMEOUT_S) as connection:
        connection.sendall(request)
        start = connection.makefile("rb").readline(100)
    return start.decode()[: len("HTTP/1.1 200")] if start.startswith(b"HTTP/1.") else "no HTTP/1.1"


def _wait_until(holds: Callable[[], bool]) -> None:
    """Wait until the server's metrics say something, which calls do a moment after they end."""
    for _ in range(3000):
        if holds():
            return
        time.sleep(0.01)
    assert holds()
