"""How a connection ends (RFC 9113, section 6.8)."""

import struct
from pathlib import Path

import pytest

from tests.edge.conformance.rules import OK, judge, rule
from tests.edge.frames import CHECK, EMPTY_MESSAGE, GOAWAY, WATCH, Http2Client, frame
from tests.processes import GRPC_FLAGS, running_server

LAST_POSSIBLE_STREAM = 2**31 - 1
OK_STATUS = "grpc-status 0"


@rule("RFC9113-6.8", OK)
def test_calls_under_way_when_the_client_says_goaway(client: Http2Client) -> str:
    stream_id = client.open()
    client.send(frame(GOAWAY, 0, 0, struct.pack(">LL", 0, 0)))
    client.data(stream_id, EMPTY_MESSAGE, end=True)
    return client.stream_outcome(stream_id)


@rule("RFC9113-6.8", {"GOAWAY names stream 3"})
def test_goaway_names_the_last_stream(client: Http2Client) -> str:
    """So that the client knows what it may repeat elsewhere."""
    assert client.works()
    client.answer(client.call())
    client.send(frame(0x6, 0, 0, bytes(7)))  # a PING of a wrong size
    client.outcome()
    last = client.goaways[-1].last_stream_id if client.goaways else None
    return f"GOAWAY names stream {last}"


@pytest.mark.parametrize("section", ["RFC9113-6.8"])
def test_goaway_in_two_steps(colors: Path, transport: str, section: str) -> None:
    """The first announces the end, calls that cross it are answered, the second names the last.

    A call that began before is served to its end. Connections close, also those without a call and
    those with a stream that would never end.
    """
    with (
        running_server(colors, "--device", "cpu", *GRPC_FLAGS[transport]) as server,
        Http2Client.connect(server.address) as client,
        Http2Client.connect(server.address) as idle,
        Http2Client.connect(server.address) as watching,
    ):
        watch = watching.call(WATCH)
        watching.wait(lambda: watching.reply(watch).data)
        begun = client.open(CHECK)
        client.data(begun, EMPTY_MESSAGE[:3])
        assert client.ping()
        server.process.terminate()
        assert client.wait(lambda: client.goaways)
        crossing = client.call()
        client.data(begun, EMPTY_MESSAGE[3:], end=True)
        outcomes = [client.stream_outcome(begun), client.stream_outcome(crossing)]
        for each in (client, idle, watching):
            each.wait(lambda: each.closed)  # noqa: B023
            assert each.goaways
    last_streams = [each.last_stream_id for each in client.goaways]
    outcome = f"{last_streams}, {outcomes[0]}, {outcomes[1]}"
    allowed = f"{[LAST_POSSIBLE_STREAM, crossing]}, {OK_STATUS}, {OK_STATUS}"
    judge(transport, "test_goaway_in_two_steps", outcome, {allowed})
