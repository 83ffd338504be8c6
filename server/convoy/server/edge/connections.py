"""The TCP connections of a port, as the kernel sees them.

h2corn reports neither their number nor, during an HTTP/1.1 request, that the caller has closed the
connection. On Linux /proc/net/tcp has both; on other systems they are unknown.
"""

import asyncio
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

# An address and a port, as in an ASGI scope.
Peer = tuple[str, int]

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_ESTABLISHED = "01"
_POLL_S = 0.25


def connected_peers(port: int) -> frozenset[Peer] | None:
    """Return the peers of a local port that have not closed; None if they are unknown."""
    peers = set()
    local_port = f":{port:04X}"
    for table in _TABLES:
        try:
            lines = table.read_text(encoding="ascii").splitlines()[1:]
        except FileNotFoundError:
            return None
        for line in lines:
            _, local, remote, state, *_ = line.split(maxsplit=4)
            if state == _ESTABLISHED and local.endswith(local_port):
                peers.add(_peer(remote))
    return frozenset(peers)


class ConnectionGauge(Collector):
    """Show how many connections the port for callers has, those of all front ends together.

    Args:
        registry: Shows it.
        port: The port.
    """

    def __init__(self, registry: CollectorRegistry, port: int) -> None:
        self._port = port
        registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Count them; yield nothing if the kernel does not report them."""
        peers = connected_peers(self._port)
        if peers is not None:
            yield GaugeMetricFamily(
                "convoy_connections", "Open connections of callers.", value=len(peers)
            )


class DisconnectWatch:
    """Cancels HTTP/1.1 requests whose callers close their connections.

    Example:
        with disconnects.watching(request.scope):
            await answer()
    """

    def __init__(self) -> None:
        self._watched: dict[asyncio.Task[Any], tuple[int, Peer]] = {}
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def watching(self, scope: Mapping[str, Any]) -> Iterator[None]:
        """Cancel the current task if the caller disconnects; HTTP/2 reports it by itself."""
        task = asyncio.current_task()
        client = scope.get("client")
        if scope["http_version"] == "2" or client is None or task is None:
            yield
            return
        self._watched[task] = scope["server"][1], _normalized(*client)
        if self._timer is None:
            self._arm()
        try:
            yield
        finally:
            del self._watched[task]

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_POLL_S, self._look)

    def _look(self) -> None:
        self._timer = None
        if not self._watched:
            return
        ports = {port for port, _ in self._watched.values()}
        connected = {port: connected_peers(port) for port in ports}
        for task, (port, peer) in self._watched.items():
            peers = connected[port]
            if peers is not None and peer not in peers:
                task.cancel()
        self._arm()


def _peer(text: str) -> Peer:
    """Read "0100007F:1F90": words in the machine's byte order, then the port."""
    address, port = text.split(":")
    octets = b"".join(
        struct.pack("=L", int(address[start : start + 8], 16))
        for start in range(0, len(address), 8)
    )
    family = socket.AF_INET if len(octets) == 4 else socket.AF_INET6
    return _normalized(socket.inet_ntop(family, octets), int(port, 16))


def _normalized(host: str, port: int) -> Peer:
    if ":" in host and (mapped := IPv6Address(host.partition("%")[0]).ipv4_mapped):
        return str(mapped), port
    return host, port
