"""One connection of an attacker: raw bytes, paced, within the server's flow-control windows."""

import asyncio
import contextlib
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import hpack

from tests.edge import frames as h2

# How many bytes may be sent ahead of the rate.
_AHEAD_S = 0.005


class DisconnectedError(Exception):
    """The server closed the connection."""


@dataclass
class Outcome:
    """What an attack did and how the server reacted.

    Attributes:
        connections: That were accepted.
        unconnected: Attempts to connect that failed.
        closed: Connections that the server closed.
        sent_bytes: Over all connections.
        goaways: GOAWAY frames by error code.
        resets: RST_STREAM frames by error code.
        statuses: Answers by "grpc-status N" or "status N", without the 200 of gRPC replies.
    """

    connections: int = 0
    unconnected: int = 0
    closed: int = 0
    sent_bytes: int = 0
    goaways: Counter[str] = field(default_factory=Counter)
    resets: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)


class Rate:
    """Spreads the bytes of all connections over time."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._due_s = time.monotonic()

    async def spend(self, size_bytes: int) -> None:
        """Waits until so many bytes more are within the rate."""
        self._due_s = max(self._due_s, time.monotonic()) + size_bytes / self._bytes_per_s
        ahead_s = self._due_s - time.monotonic()
        if ahead_s > _AHEAD_S:
            await asyncio.sleep(ahead_s)
        else:
            await asyncio.sleep(0)


class Peer:
    """One connection of an attacker.

    Attributes:
        address: Of the server.
        extra: Header fields of every request.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        rate: Rate,
        outcome: Outcome,
        extra: h2.Fields,
    ) -> None:
        self.address = writer.get_extra_info("peername")
        self.extra = extra
        self._reader = reader
        self._writer = writer
        self._rate = rate
        self._outcome = outcome
        self._windows = {0: h2.DEFAULT_WINDOW_BYTES}
        self._initial_window = h2.DEFAULT_WINDOW_BYTES
        self._changed = asyncio.Event()
        self._decoder = hpack.Decoder()
        self._gone = False
        self._streams = iter(range(1, 2**31, 2))

    async def send(self, *chunks: bytes) -> None:
        """Sends bytes as they are.

        Raises:
            DisconnectedError: The server closed the connection.
        """
        octets = b"".join(chunks)
        if self._gone:
            raise DisconnectedError
        self._writer.write(octets)
        self._outcome.sent_bytes += len(octets)
        try:
            await self._writer.drain()
        except OSError as error:
            raise DisconnectedError from error
        await self._rate.spend(len(octets))

    async def greet(self, values: dict[int, int] | None = None) -> None:
        """Sends the preface and SETTINGS."""
        await self.send(h2.PREFACE, h2.settings(values or {}))

    def streams(self, count: int) -> list[int]:
        """Returns so many fresh stream identifiers."""
        return [next(self._streams) for _ in range(count)]

    def request(self, stream: int, path: str, flags: int = 0, **fields: str) -> bytes:
        """Returns the HEADERS frame of a gRPC call; its stream stays open unless flags end it."""
        block = h2.literal_block([*h2.request_fields(path, **fields), *self.extra])
        return h2.frame(h2.HEADERS, flags | h2.END_HEADERS, stream, block)

    async def data(self, stream: int, content: bytes, flags: int = 0) -> None:
        """Sends DATA frames as fast as the server's windows allow."""
        view = memoryview(content)
        self._windows.setdefault(stream, self._initial_window)
        while view:
            size = min(len(view), self._windows[0], self._windows[stream], h2.DEFAULT_FRAME_BYTES)
            if size <= 0:
                await self._window_change()
                continue
            part, view = view[:size], view[size:]
            self._windows[0] -= size
            self._windows[stream] -= size
            last = flags if not view else 0
            await self.send(h2.frame(h2.DATA, last, stream, bytes(part)))

    async def hold(self) -> None:
        """Stays connected until the attack's time is over or the server closes the connection."""
        while not self._gone:
            await self._window_change()
        raise DisconnectedError

    async def follow(self) -> None:
        """Reads frames until the server closes the connection."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await self._reader.readexactly(9)
                if head.startswith(b"HTTP/1.1 "):
                    await self._follow_http(head)
                    break
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                self._take(head[3], int.from_bytes(head[5:9], "big"), payload)
        self._gone = True
        self._changed.set()

    async def _follow_http(self, head: bytes) -> None:
        while True:
            line = head + await self._reader.readline()
            head = b""
            if not line:
                return
            if line.startswith(b"HTTP/1.1 "):
                self._outcome.statuses[f"status {line.split()[1].decode()}"] += 1

    def _take(self, kind: int, stream: int, payload: bytes) -> None:
        if kind == h2.WINDOW_UPDATE:
            (increment,) = struct.unpack(">L", payload)
            self._windows[stream] = self._windows.get(stream, self._initial_window) + increment
            self._changed.set()
        elif kind == h2.SETTINGS:
            for number, value in struct.iter_unpack(">HL", payload):
                if number == h2.INITIAL_WINDOW_SIZE:
                    for open_stream in self._windows.keys() - {0}:
                        self._windows[open_stream] += value - self._initial_window
                    self._initial_window = value
                    self._changed.set()
        elif kind == h2.RST_STREAM:
            self._outcome.resets[h2.ErrorCode(int.from_bytes(payload, "big")).name] += 1
            # Nothing holds back what nobody reads any more.
            self._windows[stream] = h2.MAX_WINDOW_BYTES
            self._changed.set()
        elif kind == h2.GOAWAY:
            self._outcome.goaways[h2.ErrorCode(int.from_bytes(payload[4:8], "big")).name] += 1
        elif kind == h2.HEADERS:
            for name, value in self._decoder.decode(payload):
                if name == "grpc-status" or (name == ":status" and value != "200"):
                    self._outcome.statuses[f"{name.strip(':')} {value}"] += 1

    async def _window_change(self) -> None:
        if self._gone:
            raise DisconnectedError
        self._changed.clear()
        await self._changed.wait()


@contextlib.asynccontextmanager
async def connected(
    address: str,
    rate: Rate,
    outcome: Outcome,
    extra: h2.Fields | None = None,
    reads: bool = True,
) -> AsyncIterator[Peer]:
    """Connects an attacker; `reads` returns whether it takes what the server sends."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    outcome.connections += 1
    peer = Peer(reader, writer, rate, outcome, extra or [])
    reading = asyncio.create_task(peer.follow()) if reads else None
    try:
        yield peer
    except DisconnectedError:
        outcome.closed += 1
        raise
    finally:
        if reading:
            reading.cancel()
        writer.transport.abort()
