"""One RPC: its handler, its messages, its deadline and its status."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import structlog

from server.transport import frames
from server.transport.headers import Metadata, RequestHead, header_block, status_fields
from server.transport.limits import TransportLimits
from server.transport.messages import MessageError, MessageReader, framed
from server.transport.methods import Method

if TYPE_CHECKING:
    from server.transport.connection import Connection

logger = structlog.get_logger()

Fields = list[tuple[str, str | bytes]]

_CONTENT_TYPE = "application/grpc"
_HEAD_FIELDS: Fields = [(":status", "200"), ("content-type", _CONTENT_TYPE)]
_HEAD = header_block(_HEAD_FIELDS)
_OK_TRAILERS = header_block(status_fields(0, ""))
# Above this a handler that streams waits until the peer has taken what was sent.
_MAX_UNSENT_BYTES = 256 * 1024


class Call:
    """A call under way; to its handler it is the ServicerContext of grpc.aio.

    Attributes:
        arrived_at_s: When the request was there, or the call's head where requests stream; on the
            monotonic clock, and before whatever the event loop had to do first.
        send_window: Bytes that the peer will take on this stream.
        receive_window: Bytes that the peer may send on it.
        unsent: What waits for the peer's windows.
    """

    def __init__(
        self,
        connection: "Connection",
        stream_id: int,
        head: RequestHead,
        method: Method,
        limits: TransportLimits,
    ) -> None:
        self.stream_id = stream_id
        self.arrived_at_s = connection.received_at_s
        self.send_window = 0
        self.receive_window = 0
        self.unsent = bytearray()
        self._connection = connection
        self._head = head
        self._method = method
        self._reader = MessageReader(head.encoding, limits.max_message_bytes)
        self._credit_bytes = limits.stream_window_bytes // 2
        self._messages: deque[bytes] = deque()
        self._half_closed = False
        self._arrived: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._uncredited_bytes = 0
        self._deadline_s = float("inf")
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._trailing: Metadata = ()
        self._head_sent = False
        self._ended = False
        self._last_block = b""

    def start(self) -> None:
        """Starts the clock, and the handler of a call whose requests stream."""
        if self._head.timeout_s is not None:
            loop = asyncio.get_running_loop()
            self._deadline_s = self.arrived_at_s + self._head.timeout_s
            self._timer = loop.call_later(self._head.timeout_s, self._expire)
        if not self._head.content_type.startswith(_CONTENT_TYPE):
            self._ended = True
            self._finish(header_block([(":status", "415")]))
            self._stop()
        elif self._method.requests_stream:
            self._run(None)

    def receive(self, data: bytes, size: int, ended: bool) -> None:
        """Takes bytes from the peer; `size` is what they took of the window."""
        if self._ended:
            return
        self._half_closed = self._half_closed or ended
        self._uncredited_bytes += size
        try:
            if data:
                self._messages.extend(self._reader.feed(data))
        except MessageError as fault:
            self._end(fault.code, str(fault))
            return
        if self._method.requests_stream:
            self._wake()
        elif ended:
            self._serve_one()
            return
        if not ended and not (self._method.requests_stream and self._messages):
            self._credit()

    def leave(self) -> None:
        """The peer cancelled the call, or is gone: nobody wants an answer."""
        self._ended = True
        self._stop()

    def time_remaining(self) -> float | None:
        """Returns the seconds until the deadline; None without one."""
        if self._head.timeout_s is None:
            return None
        return max(0.0, self._deadline_s - time.monotonic())

    def invocation_metadata(self) -> Metadata:
        """Returns the caller's metadata."""
        return self._head.metadata

    def peer(self) -> str:
        """Returns the caller's address, such as ipv4:127.0.0.1:5000."""
        return self._connection.peer

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        """Sets what is sent with the status."""
        self._trailing = tuple(metadata)

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()
    ) -> NoReturn:
        """Ends the call with a status; nothing after it in the handler runs."""
        self._trailing = tuple(trailing_metadata) or self._trailing
        self._end(code, details)
        raise grpc.aio.AbortError(details)

    async def write(self, message: object) -> None:
        """Sends a message of a reply that streams, and waits while too much is under way."""
        if self._ended:
            raise asyncio.CancelledError
        self._send_head()
        self._connection.out.send_data(self, framed(self._serialised(message)))
        while len(self.unsent) > _MAX_UNSENT_BYTES and not self._ended:
            self._drained = asyncio.get_running_loop().create_future()
            await self._drained

    def all_sent(self) -> None:
        """The connection sent what waited for the peer's windows."""
        if self._drained and not self._drained.done():
            self._drained.set_result(None)
        if self._last_block:
            block, self._last_block = self._last_block, b""
            self._finish(block)

    def end_after_unsent(self, trailers: bytes) -> None:
        """Ends the stream once everything before was sent."""
        if self.unsent:
            self._last_block = trailers
        else:
            self._finish(trailers)

    def _serve_one(self) -> None:
        if len(self._messages) != 1 or self._reader.midway:
            self._end(grpc.StatusCode.UNIMPLEMENTED, "expected one request message")
            return
        self.arrived_at_s = self._connection.received_at_s
        self._run(self._messages.popleft())

    async def _answer(self, answer: Any) -> None:
        if self._method.replies_stream:
            await self._stream_replies(answer)
        else:
            self._reply(await answer)

    async def _stream_replies(self, replies: Any) -> None:
        if hasattr(replies, "__aiter__"):
            async for message in replies:
                await self.write(message)
        else:
            await replies
        self._end(grpc.StatusCode.OK, "")

    async def _requests(self) -> AsyncIterator[Any]:
        while True:
            while self._messages:
                message = self._messages.popleft()
                if not self._messages and not self._half_closed:
                    self._credit()
                yield self._deserialised(message)
            if self._half_closed:
                return
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived

    def _run(self, message: bytes | None) -> None:
        self._task = asyncio.get_running_loop().create_task(self._serve(message))
        # Not in the coroutine, which never starts when it is cancelled early.
        self._task.add_done_callback(self._served)

    async def _serve(self, message: bytes | None) -> None:
        """Runs the handler on one message; on all that come, without one."""
        try:
            request = self._requests() if message is None else self._deserialised(message)
            await self._answer(self._method.behaviour(request, self))
        except grpc.aio.AbortError:
            pass
        except MessageError as error:
            self._end(error.code, str(error))
        except Exception as error:  # a handler must not take the connection along
            logger.error("handler failed", method=self._head.path, exc_info=error)
            self._end(grpc.StatusCode.UNKNOWN, f"Unexpected {type(error).__name__}")

    def _served(self, task: asyncio.Task[None]) -> None:
        if self._timer:
            self._timer.cancel()
        self._connection.forget_call(self)

    def _reply(self, message: Any) -> None:
        if self._ended:
            return
        self._ended = True
        data = framed(self._serialised(message))
        trailers = _OK_TRAILERS
        if self._trailing:
            trailers = header_block([*status_fields(0, ""), *self._trailing])
        self._connection.reply(self, _HEAD, data, trailers)

    def _end(self, code: grpc.StatusCode, details: str) -> None:
        if self._ended:
            return
        self._ended = True
        self.end_after_unsent(_last_block(code, details, self._trailing, self._head_sent))
        self._stop()

    def _finish(self, block: bytes) -> None:
        self._connection.out.send_headers(self, block, ends=True)
        if not self._half_closed:
            # The caller need not send the rest (RFC 9113, section 8.1).
            self._connection.reset(self, frames.NO_ERROR)
        else:
            self._connection.forget_stream(self)

    def _expire(self) -> None:
        self._end(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
        self._stop()

    def _stop(self) -> None:
        """Cancels the handler, unless it is the one that asks."""
        if self._task is None:
            if self._timer:
                self._timer.cancel()
            self._connection.forget_call(self)
        elif self._task is not asyncio.current_task():
            self._task.cancel()

    def _send_head(self) -> None:
        if not self._head_sent:
            self._head_sent = True
            self._connection.out.send_headers(self, _HEAD, ends=False)

    def _credit(self) -> None:
        # Half a window is left to the peer, so it is not held up meanwhile.
        if self._uncredited_bytes >= self._credit_bytes:
            size, self._uncredited_bytes = self._uncredited_bytes, 0
            self._connection.read(self, size)

    def _wake(self) -> None:
        if self._arrived and not self._arrived.done():
            self._arrived.set_result(None)

    def _deserialised(self, message: bytes) -> Any:
        convert = self._method.deserialise
        if convert is None:
            return message
        try:
            return convert(message)
        except Exception as error:
            raise MessageError(
                grpc.StatusCode.INTERNAL, "Exception deserializing request!"
            ) from error

    def _serialised(self, message: Any) -> bytes:
        convert = self._method.serialise
        data: bytes = message if convert is None else convert(message)
        return data


@lru_cache(maxsize=256)
def _last_block(code: grpc.StatusCode, details: str, trailing: Metadata, head_sent: bool) -> bytes:
    """The block that ends a call; kept, for under overload most calls end with the same."""
    fields = [*status_fields(code.value[0], details), *trailing]
    return header_block(fields if head_sent else [*_HEAD_FIELDS, *fields])
