"""SIGTERM under load: every accepted call is answered, and the server ends in time."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import grpc
import pytest

from convoy.oip.v2 import inference_pb2_grpc
from tests.edge import frames as h2
from tests.edge.floods.attacks import INFER, METADATA, STREAM
from tests.edge.frames import Http2Client
from tests.processes import ServerProcess, running_server
from tests.server.test_process import infer_request

DRAIN_S = 6.0
# For processes to begin and to end on a machine with other work; two drains in a row take more.
SLACK_S = 5.0
LOADS = 4
# gRPC's C core ends calls with CANCELLED that reach it in the moment when it stops.
NOT_ANSWERED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
FLAGS = {
    "h2corn": (),
    "grpcio": ("--transport", "grpcio", "--rest-port", "0"),
    "front ends": ("--front-ends", "2"),
}


@pytest.fixture
def drain_timeout_s() -> float:
    return DRAIN_S


@pytest.fixture(params=FLAGS)
def draining_server(
    request: pytest.FixtureRequest, colors: Path, drain_timeout_s: float
) -> Iterator[ServerProcess]:
    """A server of its own, for a test that ends it."""
    flags = ("--device", "cpu", "--drain-timeout-s", drain_timeout_s, *FLAGS[request.param])
    with running_server(colors, *flags) as server:
        yield server


@dataclass
class Load:
    """Callers that call one after the other until their connection is refused.

    Attributes:
        answered: Calls that were answered.
        failed: Status codes of the others, with the time when each began.
    """

    address: str
    answered: int = 0
    failed: list[tuple[float, grpc.StatusCode, str]] = field(default_factory=list)

    def call(self) -> None:
        """Calls until a call fails."""
        with grpc.insecure_channel(self.address) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            while not self.failed:
                began_s = time.monotonic()
                try:
                    stub.ModelInfer(infer_request(), timeout=60)
                    self.answered += 1
                except grpc.RpcError as error:
                    self.failed.append((began_s, error.code(), error.details()))


def test_calls_under_way_are_answered(draining_server: ServerProcess) -> None:
    loads = [Load(draining_server.address) for _ in range(LOADS)]
    threads = [threading.Thread(target=load.call) for load in loads]
    for thread in threads:
        thread.start()
    _wait(lambda: all(load.answered > 20 for load in loads))
    output_s = time.monotonic()
    draining_server.process.terminate()
    assert draining_server.process.wait(timeout=60) == 0
    assert _drain_s(draining_server) < DRAIN_S + SLACK_S
    for thread in threads:
        thread.join()
    for load in loads:
        began_s, code, details = load.failed[0]
        assert code in NOT_ANSWERED, details
        assert began_s > output_s, "a call from before the signal is answered"


def test_a_request_of_the_last_moment_is_answered(draining_server: ServerProcess) -> None:
    """It is in the server's sockets when the signal comes, on connections that it knows or not."""
    with contextlib.ExitStack() as stack:
        known = [_client(stack, draining_server) for _ in range(10)]
        fresh = [_client(stack, draining_server, greet=False) for _ in range(10)]
        for client in fresh:
            client.send(h2.PREFACE, h2.settings({}))
        streams = [client.call(h2.CHECK) for client in (*known, *fresh)]
        draining_server.process.terminate()
        answers = [
            str(client.answer(stream))
            for client, stream in zip((*known, *fresh), streams, strict=True)
        ]
        assert answers == ["grpc-status 0"] * 20
        assert draining_server.process.wait(timeout=60) == 0


def test_stuck_callers_do_not_hold_it_up(draining_server: ServerProcess) -> None:
    server = draining_server
    with contextlib.ExitStack() as stack:
        half_message = _client(stack, server)
        half_message.data(half_message.open(INFER), h2.message(bytes(1000))[:500])
        idle_stream = _client(stack, server)
        idle_stream.open(STREAM)
        blocked = _client(stack, server, {h2.INITIAL_WINDOW_SIZE: 0})
        blocked.call(METADATA)
        watch = _client(stack, server)
        watch.call(h2.CHECK.replace("Check", "Watch"))
        half_frame = _client(stack, server)
        half_frame.send(h2.frame(h2.HEADERS, h2.END_HEADERS, 1, bytes(100))[:50])
        _client(stack, server, greet=False)
        for request in (
            b"",
            b"POST /v2/models/colors/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nabc",
            b"GET /v2 HTTP/1.1\r\nHost: a\r\n",
        ):
            host, _, port = server.url.removeprefix("http://").rpartition(":")
            connection = stack.enter_context(socket.create_connection((host, int(port)), 60))
            connection.sendall(request)
        # All of them have arrived when these calls are answered.
        assert _client(stack, server).works()
        server.process.terminate()
        assert server.process.wait(timeout=60) == 0
        assert _drain_s(server) < DRAIN_S + SLACK_S


@pytest.mark.parametrize("drain_timeout_s", [100.0])
def test_a_drain_without_callers_takes_no_time(draining_server: ServerProcess) -> None:
    with contextlib.ExitStack() as stack:
        assert _client(stack, draining_server).works()
        draining_server.process.terminate()
        assert draining_server.process.wait(timeout=60) == 0
    assert _drain_s(draining_server) < 30


def _client(
    stack: contextlib.ExitStack,
    server: ServerProcess,
    values: dict[int, int] | None = None,
    greet: bool = True,
) -> Http2Client:
    return stack.enter_context(Http2Client.connect(server.address, values, greet))


def _drain_s(server: ServerProcess) -> float:
    """Returns how long the drain of a server took that has ended, by its log."""
    begun, ended = (
        datetime.fromisoformat(str(server.wait_for(event)["timestamp"]))
        for event in ("draining", "stopped")
    )
    return (ended - begun).total_seconds()


def _wait(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s, "nothing happened for a minute"
        time.sleep(0.01)
