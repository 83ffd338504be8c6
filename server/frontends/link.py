"""Carries messages between two processes of the server."""

import asyncio
import pickle
import struct
from collections.abc import Callable
from typing import Any, cast

_LENGTH = struct.Struct("<I")


class Link(asyncio.Protocol):
    """One end of a stream socket on the running loop.

    Messages that are sent in one turn of the loop leave, and mostly arrive, together. They are
    pickled: both ends are this program, and nobody else has the socket.

    Args:
        receive: Takes each message, in the order they were sent.
        lost: Called once, when the other end is gone.

    Example:
        link = Link(receive, lost)
        await loop.create_unix_connection(lambda: link, sock=end)
        link.send(Ready())
    """

    def __init__(self, receive: Callable[[Any], None], lost: Callable[[], None]) -> None:
        self._receive = receive
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._outgoing: list[object] = []
        self._rest = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begins to carry."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        """Carries nothing more."""
        self._transport = None
        self._lost()

    def send(self, message: object) -> None:
        """Sends a message; it is lost where the other end is gone."""
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(message)

    def close(self) -> None:
        """Sends what is left and hangs up."""
        self._flush()
        if self._transport:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        """Takes what the other end sent."""
        data = self._rest + data if self._rest else data
        start, size = 0, len(data)
        while size - start >= _LENGTH.size:
            stop = start + _LENGTH.size + _LENGTH.unpack_from(data, start)[0]
            if stop > size:
                break
            for message in pickle.loads(memoryview(data)[start + _LENGTH.size : stop]):
                self._receive(message)
            start = stop
        self._rest = data[start:]

    def _flush(self) -> None:
        messages, self._outgoing = self._outgoing, []
        if messages and self._transport:
            data = pickle.dumps(messages, pickle.HIGHEST_PROTOCOL)
            self._transport.write(_LENGTH.pack(len(data)) + data)
