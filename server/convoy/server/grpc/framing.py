"""gRPC's messages in the body of a request: a flag byte, four bytes of length, then the message.

Source: github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md.
"""

import asyncio
import struct
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from convoy.server.edge.limits import BODY_S, ByteBudget, IncompleteRequest
from convoy.server.protocol.calls import DisconnectedError

Receive = Callable[[], Awaitable[Any]]

_PREFIX = struct.Struct(">BL")
_PREFIX_BYTES = _PREFIX.size
# zlib's window bits for the formats of RFC 1952 and RFC 1950.
_WINDOW_BITS = {b"gzip": 31, b"deflate": 15}
_IDENTITY = b"identity"
# Input and output of one step of inflation; after each step other calls get their turn.
_INFLATE_INPUT_BYTES = 64 * 1024
_INFLATE_OUTPUT_BYTES = 256 * 1024


class MessageError(Exception):
    """The bytes of a request are not a message that this server accepts.

    Attributes:
        code: The status to end the call with.
    """

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class MessageReader(IncompleteRequest):
    """Read the messages of one call.

    Args:
        receive: The ASGI channel.
        encoding: How messages with the flag are compressed (grpc-encoding).
        max_bytes: Of one message, before and after inflation.
        budget: Counts what the call holds.
        interrupt: Ends the call, with a status, from outside its task.
    """

    __slots__ = (
        *("_budget", "_buffer", "_encoding", "_ended", "_interrupt", "_max_bytes"),
        *("_receive", "_timer"),
    )

    def __init__(
        self,
        receive: Receive,
        encoding: bytes,
        max_bytes: int,
        budget: ByteBudget,
        interrupt: Callable[[grpc.StatusCode, str], None],
    ) -> None:
        super().__init__()
        self._receive = receive
        self._encoding = encoding
        self._max_bytes = max_bytes
        self._budget = budget
        self._interrupt = interrupt
        self._timer: asyncio.TimerHandle | None = None
        self._buffer: bytes | bytearray = b""
        self._ended = False

    async def only(self) -> bytes:
        """Return the one message of a unary request, once the caller has ended the request.

        Raises:
            MessageError: There is none, more than one, or one that is rejected.
            DisconnectedError: The caller disconnected before the end.
        """
        while not self._ended:
            await self._fill()
            if len(self._buffer) >= _PREFIX_BYTES:
                size = _PREFIX.unpack_from(self._buffer)[1]
                if size > self._max_bytes:
                    raise self._too_large(size)
                if len(self._buffer) > _PREFIX_BYTES + size:
                    raise _not_one_message()
                if len(self._buffer) < _PREFIX_BYTES + size and not self._timer:
                    self._timer = asyncio.get_running_loop().call_later(BODY_S, self._end_late)
        if not self._buffer:
            raise _not_one_message()
        self._budget.incomplete.discard(self)
        return await self._message(self._buffer)

    async def next(self) -> bytes | None:
        """Return the next message of a stream; None after the last.

        Raises:
            MessageError: The message is rejected.
            DisconnectedError: The caller disconnected before the end.
        """
        while (whole := self._whole_message()) is None:
            if self._ended:
                if self._buffer:
                    raise MessageError(
                        grpc.StatusCode.INTERNAL, "message: the body ended inside it"
                    )
                return None
            await self._fill()
        message = await self._message(whole)
        # The servicer bounds its requests in flight; here only the next message counts.
        self._budget.release(self)
        self._take(len(self._buffer))
        return message

    def close(self) -> None:
        """Release the bytes of the call."""
        if self._timer:
            self._timer.cancel()
        self._budget.release(self)

    def end(self) -> None:
        """End the call while its message is not complete, because others need the memory."""
        self._interrupt(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "the server's memory for requests is full, and this one was not complete",
        )

    async def _fill(self) -> None:
        if self._buffer:
            self._budget.incomplete.add(self)
        event = await self._receive()
        if event["type"] != "http.request":
            raise DisconnectedError
        self._ended = not event.get("more_body")
        chunk = event.get("body")
        if not chunk:
            return
        self._take(len(chunk))
        if not self._buffer:
            self._buffer = chunk
            return
        if isinstance(self._buffer, bytes):
            self._buffer = bytearray(self._buffer)
        self._buffer += chunk

    def _whole_message(self) -> bytes | None:
        """Remove the next message, prefix included, from the buffer; None if it is incomplete."""
        if len(self._buffer) < _PREFIX_BYTES:
            return None
        size = _PREFIX.unpack_from(self._buffer)[1]
        if size > self._max_bytes:
            raise self._too_large(size)
        end = _PREFIX_BYTES + size
        if len(self._buffer) < end:
            return None
        if len(self._buffer) == end:
            whole, self._buffer = self._buffer, b""
            return bytes(whole)
        if isinstance(self._buffer, bytes):
            # The rest is moved once, not for every message.
            self._buffer = bytearray(self._buffer)
        whole = bytes(self._buffer[:end])
        del self._buffer[:end]
        return whole

    async def _message(self, whole: bytes | bytearray) -> bytes:
        if len(whole) < _PREFIX_BYTES:
            raise MessageError(
                grpc.StatusCode.INTERNAL, "message: the body ended inside its prefix"
            )
        flag, size = _PREFIX.unpack_from(whole)
        if len(whole) < _PREFIX_BYTES + size:
            raise MessageError(
                grpc.StatusCode.INTERNAL,
                f"message: expected {size} bytes, got {len(whole) - _PREFIX_BYTES}",
            )
        if flag == 0:
            return bytes(whole[_PREFIX_BYTES:])
        if flag == 1:
            return await self._inflate(memoryview(whole)[_PREFIX_BYTES:]) if size else b""
        raise MessageError(
            grpc.StatusCode.INTERNAL, f"message: expected the compressed flag 0 or 1, got {flag}"
        )

    async def _inflate(self, data: memoryview) -> bytes:
        bits = _WINDOW_BITS.get(self._encoding)
        if bits is None:
            raise self._no_compression()
        self._budget.incomplete.add(self)
        inflater = zlib.decompressobj(bits)
        chunks: list[bytes] = []
        size = 0
        for start in range(0, len(data), _INFLATE_INPUT_BYTES):
            pending: bytes | memoryview = data[start : start + _INFLATE_INPUT_BYTES]
            while True:
                chunk = self._inflate_chunk(inflater, pending)
                size += len(chunk)
                if size > self._max_bytes:
                    raise self._too_large(size)
                self._take(len(chunk))
                chunks.append(chunk)
                pending = inflater.unconsumed_tail
                if not pending and len(chunk) < _INFLATE_OUTPUT_BYTES:
                    break
                await asyncio.sleep(0)
        if not inflater.eof or inflater.unused_data:
            fault = "has bytes after its end" if inflater.eof else "ends too early"
            raise self._not_compressed(fault)
        self._budget.incomplete.discard(self)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _inflate_chunk(self, inflater: Any, data: bytes | memoryview) -> bytes:
        try:
            chunk: bytes = inflater.decompress(data, _INFLATE_OUTPUT_BYTES)
        except zlib.error as error:
            raise self._not_compressed(str(error)) from error
        return chunk

    def _take(self, size: int) -> None:
        if not self._budget.take(size, self):
            raise MessageError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "the server's memory for requests is full",
            )

    def _end_late(self) -> None:
        self._interrupt(
            grpc.StatusCode.CANCELLED, f"message: expected all of it within {BODY_S:.0f} s"
        )

    def _too_large(self, size: int) -> MessageError:
        return MessageError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"message: expected at most {self._max_bytes} bytes, got {size}",
        )

    def _no_compression(self) -> MessageError:
        if self._encoding == _IDENTITY:
            return MessageError(
                grpc.StatusCode.INTERNAL,
                "message: expected grpc-encoding to name the compression of a compressed message",
            )
        encoding = self._encoding[:16].decode("ascii", "replace")
        return MessageError(
            grpc.StatusCode.UNIMPLEMENTED,
            f"grpc-encoding: expected gzip or deflate, got {encoding!r}",
        )

    def _not_compressed(self, fault: str) -> MessageError:
        encoding = self._encoding.decode("ascii", "replace")
        return MessageError(grpc.StatusCode.INTERNAL, f"message: expected {encoding} data: {fault}")


def framed(message: bytes) -> bytes:
    """Return a message as it is sent, uncompressed."""
    return _PREFIX.pack(0, len(message)) + message


def _not_one_message() -> MessageError:
    return MessageError(grpc.StatusCode.UNIMPLEMENTED, "expected one request message")
