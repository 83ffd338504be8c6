"""What callers may make the server hold: connections, bytes, time."""

import asyncio
import contextlib
import signal
import socket
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest

from convoy.oip.v2 import inference_pb2_grpc
from tests.edge import frames as h2
from tests.edge.floods.attacks import INFER
from tests.edge.floods.peer import Outcome, Peer, Rate, connected
from tests.edge.floods.victim import memory_mib
from tests.edge.frames import Http2Client
from tests.processes import ServerProcess, running_server
from tests.server.test_process import infer_request

MIB = 1024 * 1024
BACKLOG = 1024
MANY_IMAGES = ("--max-request-images", "20000", "--max-queue-size", "20000")
# What the tests' requests take beside the bytes that count.
SLACK_MIB = 48
FLAGS = {
    "h2corn": ("--transport", "h2corn"),
    "grpcio": ("--transport", "grpcio", "--rest-port", "0"),
}


SMALL = ("--device", "cpu", "--max-message-mib", "4", "--max-buffered-mib", "32")


@pytest.fixture(params=FLAGS)
def flags(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return ("--device", "cpu", *FLAGS[request.param])


def test_connections_beyond_the_limit_wait_for_one_to_leave(
    colors: Path, flags: tuple[str, ...]
) -> None:
    with (
        running_server(colors, *flags, "--max-connections", 8) as server,
        contextlib.ExitStack() as first,
        contextlib.ExitStack() as others,
    ):
        leaving = first.enter_context(Http2Client.connect(server.address))
        held = [others.enter_context(Http2Client.connect(server.address)) for _ in range(7)]
        surplus = [
            others.enter_context(Http2Client.connect(server.address, greet=False)) for _ in range(5)
        ]
        for client in surplus:
            client.send(h2.PREFACE, h2.settings({}))
            client.call(h2.CHECK)
        assert all(client.works() for client in (leaving, *held))
        first.close()
        assert any(str(client.answer(1)) == "grpc-status 0" for client in surplus)


def test_a_thousand_connections_wait_while_the_server_is_busy(
    colors: Path, flags: tuple[str, ...]
) -> None:
    with running_server(colors, *flags) as server, contextlib.ExitStack() as stack:
        server.process.send_signal(signal.SIGSTOP)
        try:
            waiting = [
                stack.enter_context(Http2Client.connect(server.address, greet=False))
                for _ in range(BACKLOG)
            ]
        finally:
            server.process.send_signal(signal.SIGCONT)
        for client in (waiting[0], waiting[-1]):
            client.send(h2.PREFACE, h2.settings({}))
            assert client.works()


def test_stalled_requests_end(colors: Path) -> None:
    """What is begun and not continued; other connections and streams are not ended with it."""
    http_body = b"POST /v2/models/colors/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc"
    begun = {
        "nothing": b"",
        "half a preface": h2.PREFACE[:10],
        "half a request line": b"GET /v2 HT",
        "half a head": b"GET /v2 HTTP/1.1\r\nHost: a\r\n",
        "a header block without its end": h2.PREFACE + h2.settings({}) + h2.frame(h2.HEADERS, 0, 1),
        "half a body": http_body,
    }
    with running_server(colors, "--device", "cpu") as server, contextlib.ExitStack() as stack:
        connections: dict[str, socket.socket] = {}
        host, _, port = server.address.rpartition(":")
        for name, octets in begun.items():
            connections[name] = stack.enter_context(socket.create_connection((host, int(port)), 60))
            connections[name].sendall(octets)
        client = stack.enter_context(Http2Client.connect(server.address))
        stream = client.open(INFER)
        client.data(stream, h2.message(bytes(1000))[:500])
        for connection in connections.values():
            # Fails with TimeoutError unless the server closes it.
            while connection.recv(1000):
                pass
        assert client.stream_outcome(stream) == "RST_STREAM CANCEL"
        assert client.works()


async def test_half_sent_messages_give_way_to_whole_ones(colors: Path) -> None:
    """40 streams want 160 MiB where 32 MiB are allowed; an ordinary caller is answered."""
    with running_server(colors, *SMALL) as server:
        before_mib = memory_mib(server.process.pid)
        async with _peers(server, 40) as (peers, outcome):
            half = h2.message(bytes(4 * MIB))[: 3 * MIB]
            sending = [asyncio.create_task(_send(peer, INFER, half)) for peer in peers]
            await _until(lambda: outcome.statuses["grpc-status 8"] >= 30)
            async with grpc.aio.insecure_channel(server.address) as channel:
                stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
                assert (await stub.ModelInfer(infer_request(), timeout=60)).outputs
            for task in sending:
                task.cancel()
        assert memory_mib(server.process.pid, "VmHWM") - before_mib < 32 + SLACK_MIB


async def test_inflated_messages_count(colors: Path) -> None:
    """100 messages of 4 KiB inflate to 390 MiB where 32 MiB are allowed."""
    with running_server(colors, *SMALL) as server:
        before_mib = memory_mib(server.process.pid)
        packed = h2.message(zlib.compress(bytes(4_000_000)), flag=1)
        async with _peers(server, 100) as (peers, outcome):
            for peer in peers:
                await _send(peer, INFER, packed, h2.END_STREAM, grpc_encoding="deflate")
            await _until(lambda: sum(outcome.statuses.values()) == 100)
        assert memory_mib(server.process.pid, "VmHWM") - before_mib < 32 + SLACK_MIB


async def test_unread_replies_count(colors: Path) -> None:
    """60 replies of 480 KB, each on a connection that takes none, where 16 MiB are allowed."""
    with running_server(colors, *SMALL, *MANY_IMAGES) as server:
        request = h2.message(infer_request(20_000).SerializeToString())
        async with _peers(server, 60, {h2.INITIAL_WINDOW_SIZE: 0}) as (peers, outcome):
            for number, peer in enumerate(peers, 1):
                await _send(peer, INFER, request, h2.END_STREAM)
                await _until(lambda number=number: _infers(server) == number)
            unsent = 60 * 480_000 - outcome.statuses["grpc-status 8"] * 480_000
            assert 12 * MIB < unsent < 16 * MIB
            # Small replies still find room.
            with Http2Client.connect(server.address) as client:
                assert client.works()
        # The replies are gone with the connection.
        async with _peers(server, 1, {h2.INITIAL_WINDOW_SIZE: MIB}) as ((peer,), outcome):
            await peer.send(h2.window_update(0, MIB))
            await _send(peer, INFER, request, h2.END_STREAM)
            await _until(lambda: outcome.statuses["grpc-status 0"] == 1)


def _infers(server: ServerProcess) -> float:
    return server.metric("convoy_calls_total", method="ModelInfer")


async def _send(peer: Peer, path: str, body: bytes, flags: int = 0, **fields: str) -> None:
    (stream,) = peer.streams(1)
    await peer.send(peer.request(stream, path, **fields))
    await peer.data(stream, body, flags)


@contextlib.asynccontextmanager
async def _peers(
    server: ServerProcess, count: int, values: dict[int, int] | None = None
) -> AsyncIterator[tuple[list[Peer], Outcome]]:
    outcome, rate = Outcome(), Rate(1e9)
    async with contextlib.AsyncExitStack() as stack:
        peers = [
            await stack.enter_async_context(connected(server.address, rate, outcome))
            for _ in range(count)
        ]
        for peer in peers:
            await peer.greet(values)
        yield peers, outcome


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  the counts are of what a server sends
            await asyncio.sleep(0.01)
