"""A listener replaces its h2corn server; no call is lost to a new certificate."""

import asyncio
import contextlib
import os
import socket
import ssl
import sys
from pathlib import Path

import grpc
import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from convoy.server.edge.listener import Listener
from convoy.server.metrics.requests import ServerMetrics
from convoy.server.security.tls import Tls, TlsFiles
from tests.server.certificates import Authority
from tests.server.grpc.conftest import RETRIES, Echo, Limits, listener_of


async def call_until(stop: asyncio.Event, channel: grpc.aio.Channel) -> int:
    """Calls without a pause and returns how many calls were answered; a failure raises."""
    answered = 0
    call = channel.unary_unary("/test.Echo/Unary")
    while not stop.is_set():
        assert await call(b"%d" % answered) == b"%d" % answered
        answered += 1
    return answered


class Peers(Echo):
    """Notes the connections that calls come by."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.another = asyncio.Event()

    async def unary(self, request, context):
        if context.peer() not in self.seen:
            self.seen.add(context.peer())
            self.another.set()
        return await super().unary(request, context)

    async def wait_for(self, count: int) -> None:
        while len(self.seen) < count:
            self.another.clear()
            await self.another.wait()


async def shown_certificate(port: int, authority: Authority) -> bytes:
    """Returns the certificate that the port shows on a new connection."""
    context = ssl.create_default_context(cadata=authority.pem.decode())
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return shown


async def while_calling(waiting, calling: list[asyncio.Task[int]]) -> None:
    """Waits for something, or until a caller fails."""
    task = asyncio.create_task(waiting)
    await asyncio.wait({task, *calling}, return_when=asyncio.FIRST_COMPLETED)
    task.cancel()


async def test_connections_that_reached_their_age_lose_no_call_that_is_retried():
    peers = Peers()
    listener = listener_of(peers, Limits(age_s=0.6), ServerMetrics(CollectorRegistry()))
    await listener.start()
    stop = asyncio.Event()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{listener.port}", options=RETRIES) as channel:
        calling = [asyncio.create_task(call_until(stop, channel)) for _ in range(8)]
        await while_calling(peers.wait_for(3), calling)
        stop.set()
        await asyncio.gather(*calling)
    await listener.stop()


async def test_a_replaced_certificate_loses_no_call(tmp_path):
    authority = Authority()
    certificate, key = authority.issue_into(tmp_path)
    peers = Peers()
    listener = listener_of(
        peers, Limits(), ServerMetrics(CollectorRegistry()), tls=Tls(TlsFiles(certificate, key))
    )
    await listener.start()
    stop = asyncio.Event()
    credentials = grpc.ssl_channel_credentials(authority.pem)
    address = f"127.0.0.1:{listener.port}"
    options = [("grpc.enable_retries", 0)]
    async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
        calling = [asyncio.create_task(call_until(stop, channel)) for _ in range(8)]
        await while_calling(peers.wait_for(1), calling)
        for _ in range(3):
            shown = await shown_certificate(listener.port, authority)
            authority.issue_into(tmp_path)
            while await shown_certificate(listener.port, authority) == shown:
                assert not any(task.done() for task in calling)
        stop.set()
        await asyncio.gather(*calling)
    # The callers' connection stayed with the generation that it began with.
    assert len(peers.seen) == 1
    await listener.stop()


async def test_a_generation_that_opens_while_the_listener_stops_is_ended_too(monkeypatch):
    opening = asyncio.Event()
    begun, opened = [], []
    really_open = Listener._open

    async def noted_open(self):
        begun.append(self)
        if len(begun) == 2:
            opening.set()
        generation = await really_open(self)
        opened.append(generation)
        return generation

    monkeypatch.setattr(Listener, "_open", noted_open)
    listener = listener_of(Echo(), Limits(age_s=0.01), ServerMetrics(CollectorRegistry()))
    await listener.start()
    await opening.wait()
    await listener.stop()
    assert len(begun) == len(opened) == 2
    assert all(generation.has_ended for generation in opened)


async def test_a_socket_that_h2corn_finds_shut_down_is_logged_and_stops_without_an_error():
    listener = listener_of(Echo(), Limits(), ServerMetrics(CollectorRegistry()))
    await listener.start()
    serving = listener._current._serving
    with capture_logs() as lines:
        listener._socket.shutdown(socket.SHUT_RD)
        await asyncio.wait({serving})
        assert isinstance(serving.exception(), OSError)
        await listener.stop()
    assert [line["event"] for line in lines] == [
        "a port is no longer served",
        "h2corn ended with an error while it was stopped",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such policy")
async def test_a_sandbox_that_forbids_the_policy_is_logged_and_no_error(monkeypatch):
    def forbid(*arguments):
        raise PermissionError("not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", forbid)
    listener = listener_of(Echo(), Limits(), ServerMetrics(CollectorRegistry()))
    with capture_logs() as logs:
        await listener.start()
    await listener.stop()
    (line,) = logs
    assert line["event"] == "the network's threads keep their scheduling policy"


def threads() -> dict[int, str]:
    """The threads of this process, with their names."""
    return {
        int(thread.name): (thread / "comm").read_text().strip()
        for thread in Path("/proc/self/task").iterdir()
    }


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such policy")
async def test_threads_of_the_network_wait_for_the_thread_that_wakes_them():
    listener = listener_of(Echo(), Limits(), ServerMetrics(CollectorRegistry()))
    await listener.start()
    names = threads()
    waiting = {thread for thread in names if os.sched_getscheduler(thread) == os.SCHED_BATCH}
    await listener.stop()
    assert len(waiting) >= 2
    assert waiting == {thread for thread, name in names.items() if name == "tokio-rt-worker"}
