"""What the kernel tells of a port's connections, over IPv4 and IPv6."""

import asyncio
import socket

import pytest

from convoy.server.edge.connections import DisconnectWatch, connected_peers


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_peers_are_those_that_have_not_closed(host):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listening:
        port = listening.getsockname()[1]
        assert connected_peers(port) == frozenset()
        with socket.create_connection((host, port)) as caller:
            accepted, _ = listening.accept()
            with accepted:
                assert connected_peers(port) == {caller.getsockname()[:2]}
                caller.shutdown(socket.SHUT_WR)
                assert accepted.recv(1) == b""
                assert connected_peers(port) == frozenset()


def test_ipv4_peers_of_a_port_of_both_families():
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listening:
        port = listening.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as caller, listening.accept()[0]:
            assert connected_peers(port) == {caller.getsockname()}


async def test_only_the_request_whose_caller_disconnects_is_cancelled():
    departures = DisconnectWatch()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = listening.getsockname()

        async def wait(client: socket.socket, version: str = "1.1") -> None:
            scope = {"http_version": version, "client": client.getsockname(), "server": server}
            with departures.watching(scope):
                await asyncio.Event().wait()

        callers = [socket.create_connection(server) for _ in range(2)]
        accepted = [listening.accept()[0] for _ in callers]
        waiting = [asyncio.create_task(wait(each)) for each in callers]
        over_http2 = asyncio.create_task(wait(callers[0], "2"))
        await asyncio.sleep(0)
        callers[0].close()
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        assert not waiting[1].done()
        assert not over_http2.done()
        for each in (*callers, *accepted):
            each.close()
        for task in (waiting[1], over_http2):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
