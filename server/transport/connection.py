"""One peer: frames in, frames out, streams and their flow control (RFC 9113)."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import cast

from server.transport import frames
from server.transport.call import Call
from server.transport.frames import FrameReader, Http2Error
from server.transport.headers import HeaderReader, RequestHead
from server.transport.limits import TransportLimits
from server.transport.outgoing import Outgoing

# What a peer gets to close a drained connection itself.
_LINGER_S = 1.0

OpenCall = Callable[["Connection", int, RequestHead], Call]


class Connection(asyncio.Protocol):
    """The server's side of a connection.

    Args:
        open_call: Makes the call for the headers of a stream.
        limits: What the peer may take.
        on_made: Is told when the connection is there.
        on_lost: Is told when the connection is gone.

    Attributes:
        out: What goes to the peer.
        peer: Its address, as grpcio writes it.
        received_at_s: When bytes last came, on the monotonic clock.
    """

    def __init__(
        self,
        open_call: OpenCall,
        limits: TransportLimits,
        on_made: Callable[["Connection"], None],
        on_lost: Callable[["Connection"], None],
    ) -> None:
        self._open_call = open_call
        self._limits = limits
        self._on_made = on_made
        self._on_lost = on_lost
        self.out: Outgoing
        self.peer = ""
        self.received_at_s = 0.0
        self._headers = HeaderReader(limits.max_header_bytes)
        self._frames = FrameReader(limits.max_frame_bytes)
        # Streams whose frames are taken, and calls whose handlers run: a cancelled call leaves the
        # first at once and the second when its handler has ended.
        self._streams: dict[int, Call] = {}
        self._calls: set[Call] = set()
        self._last_stream_id = 0
        self._draining = False
        self._lingering = False
        # Set while a header block is spread over several frames: (stream, flags, its parts).
        self._unfinished: tuple[int, int, bytearray] | None = None
        self._receive_window = limits.connection_window_bytes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greets the peer with this side's settings."""
        # uvloop's transports are none of asyncio's by type.
        self.out = Outgoing(cast(asyncio.Transport, transport), self._limits.max_unsent_bytes)
        self.peer = _peer_name(transport.get_extra_info("peername"))
        self._on_made(self)
        limits = self._limits
        greeting = frames.settings(
            {
                frames.MAX_CONCURRENT_STREAMS: limits.max_calls,
                frames.INITIAL_WINDOW_SIZE: limits.stream_window_bytes,
                frames.MAX_FRAME_SIZE: limits.max_frame_bytes,
                frames.MAX_HEADER_LIST_SIZE: limits.max_header_bytes,
            }
        )
        extra = limits.connection_window_bytes - frames.DEFAULT_WINDOW_BYTES
        self.out.write(greeting + frames.window_update(0, extra))

    def connection_lost(self, error: Exception | None) -> None:
        """Cancels what the peer will not hear of."""
        self._on_lost(self)
        for call in list(self._streams.values()):
            call.leave()
        self._streams.clear()

    def data_received(self, data: bytes) -> None:
        """Takes what the peer sent."""
        self.received_at_s = time.monotonic()
        try:
            for kind, flags, stream_id, payload in self._frames.read(data):
                self._frame(kind, flags, stream_id, payload)
        except Http2Error as fault:
            self._abort(fault)

    def drain(self) -> None:
        """Takes no new calls and closes when those under way have ended."""
        if not self._draining:
            self._draining = True
            self.out.write(frames.goaway(self._last_stream_id, frames.NO_ERROR))
        self._close_if_done()

    def close(self) -> None:
        """Ends the calls under way and the connection."""
        for call in list(self._calls):
            call.leave()
        self.out.close()

    def reply(self, call: Call, head: bytes, message: bytes, trailers: bytes) -> None:
        """Sends a whole reply, in one piece where the windows let it."""
        if self.out.send_whole(call, head, message, trailers):
            self.forget_stream(call)
            return
        self.out.send_headers(call, head, ends=False)
        self.out.send_data(call, message)
        call.end_after_unsent(trailers)

    def reset(self, call: Call, code: int) -> None:
        """Ends a stream without a reply."""
        self.out.write(frames.rst_stream(call.stream_id, code))
        self.forget_stream(call)

    def read(self, call: Call, size: int) -> None:
        """Tells the peer that so many bytes of a stream were read."""
        if call.stream_id in self._streams:
            call.receive_window += size
            self.out.write(frames.window_update(call.stream_id, size))

    def forget_stream(self, call: Call) -> None:
        """Takes no more frames for a call."""
        self._streams.pop(call.stream_id, None)
        self.out.forget(call)
        self._close_if_done()

    def forget_call(self, call: Call) -> None:
        """A call's handler has ended."""
        self._calls.discard(call)
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._lingering or not self._draining or self._calls or self._streams:
            return
        # To close at once, with bytes of the peer's unread, would reset the connection and take
        # from the peer the answers that it has not read yet. A client that was told to go away
        # closes when it has read them.
        self._lingering = True
        asyncio.get_running_loop().call_later(_LINGER_S, self.out.close)

    def _abort(self, fault: Http2Error) -> None:
        self.out.write(frames.goaway(self._last_stream_id, fault.code, str(fault)))
        self.close()

    def _frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if self._unfinished is not None and kind != frames.CONTINUATION:
            raise Http2Error(frames.PROTOCOL_ERROR, "a frame inside a header block")
        if kind == frames.DATA:
            self._data(flags, stream_id, payload)
        elif kind == frames.HEADERS:
            self._header_frame(flags, stream_id, payload)
        elif kind == frames.WINDOW_UPDATE:
            self._window_update(stream_id, frames.read_word(payload))
        elif kind == frames.PING:
            self._ping(flags, payload)
        elif kind == frames.RST_STREAM:
            self._rst_stream(stream_id, payload)
        elif kind == frames.SETTINGS:
            self._settings(flags, payload)
        elif kind == frames.CONTINUATION:
            self._continuation(flags, stream_id, payload)
        elif kind == frames.PUSH_PROMISE:
            raise Http2Error(frames.PROTOCOL_ERROR, "a client cannot push")
        # PRIORITY is advice, GOAWAY precedes the end of the connection, unknown kinds are ignored.

    def _data(self, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        self._receive_window -= size
        if self._receive_window < 0:
            raise Http2Error(frames.FLOW_CONTROL_ERROR, "more than the connection's window")
        if self._receive_window < self._limits.connection_window_bytes // 2:
            increment = self._limits.connection_window_bytes - self._receive_window
            self._receive_window += increment
            self.out.write(frames.window_update(0, increment))
        call = self._streams.get(stream_id)
        if call is None:
            self._check_was_open(stream_id)
            return
        call.receive_window -= size
        if call.receive_window < 0:
            raise Http2Error(frames.FLOW_CONTROL_ERROR, "more than the stream's window")
        call.receive(frames.without_padding(flags, payload), size, bool(flags & frames.END_STREAM))

    def _header_frame(self, flags: int, stream_id: int, payload: bytes) -> None:
        payload = frames.without_padding(flags, payload)
        if flags & frames.HAS_PRIORITY:
            payload = payload[5:]
        if flags & frames.END_HEADERS:
            self._header_block(flags, stream_id, payload)
        else:
            self._unfinished = (stream_id, flags, bytearray(payload))

    def _continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        if self._unfinished is None or self._unfinished[0] != stream_id:
            raise Http2Error(frames.PROTOCOL_ERROR, "CONTINUATION of no header block")
        _, first_flags, block = self._unfinished
        block += payload
        if len(block) > self._limits.max_header_bytes or not payload:
            # Endless or empty continuations cost a server more than the peer.
            raise Http2Error(frames.ENHANCE_YOUR_CALM, "a header block without end")
        if flags & frames.END_HEADERS:
            self._unfinished = None
            self._header_block(first_flags, stream_id, bytes(block))

    def _header_block(self, flags: int, stream_id: int, block: bytes) -> None:
        head: RequestHead | None = None
        # A block that makes no sense ends its stream; it was decoded, so the table is in step.
        with contextlib.suppress(ValueError):
            head = self._headers.read(block)
        ends = bool(flags & frames.END_STREAM)
        open_call = self._streams.get(stream_id)
        if open_call is not None:
            # Trailers, which mean nothing in a request but its end.
            if not ends:
                raise Http2Error(frames.PROTOCOL_ERROR, "headers in the middle of a stream")
            open_call.receive(b"", 0, ended=True)
            return
        if stream_id % 2 == 0 or stream_id <= self._last_stream_id:
            raise Http2Error(frames.PROTOCOL_ERROR, f"a new stream {stream_id}")
        if self._draining:
            return  # above the GOAWAY frame's last stream: the peer sends it elsewhere
        self._last_stream_id = stream_id
        if head is None:
            self.out.write(frames.rst_stream(stream_id, frames.PROTOCOL_ERROR))
        elif max(len(self._calls), len(self._streams)) >= 2 * self._limits.max_calls:
            self.out.write(frames.rst_stream(stream_id, frames.REFUSED_STREAM))
        else:
            self._start(self._open_call(self, stream_id, head), ends)

    def _start(self, call: Call, ends: bool) -> None:
        call.send_window = self.out.stream_window
        call.receive_window = self._limits.stream_window_bytes
        self._streams[call.stream_id] = call
        self._calls.add(call)
        call.start()
        if ends:
            call.receive(b"", 0, ended=True)

    def _rst_stream(self, stream_id: int, payload: bytes) -> None:
        frames.read_word(payload)
        self._check_was_open(stream_id)
        call = self._streams.get(stream_id)
        if call is not None:
            self.forget_stream(call)
            call.leave()

    def _check_was_open(self, stream_id: int) -> None:
        # A peer opens streams until it has read the GOAWAY frame.
        if (stream_id > self._last_stream_id and not self._draining) or stream_id % 2 == 0:
            raise Http2Error(frames.PROTOCOL_ERROR, f"stream {stream_id} was never opened")

    def _settings(self, flags: int, payload: bytes) -> None:
        if flags & frames.ACK:
            return
        self.out.settle(frames.read_settings(payload), list(self._streams.values()))

    def _ping(self, flags: int, payload: bytes) -> None:
        if len(payload) != 8:
            raise Http2Error(frames.FRAME_SIZE_ERROR, "PING: expected 8 bytes")
        if not flags & frames.ACK:
            self.out.write(frames.frame(frames.PING, frames.ACK, 0, payload))

    def _window_update(self, stream_id: int, increment: int) -> None:
        if not increment:
            raise Http2Error(frames.PROTOCOL_ERROR, "WINDOW_UPDATE by nothing")
        call = self._streams.get(stream_id)
        if stream_id == 0:
            self.out.widen(increment)
        elif call is not None and not self.out.widen_stream(call, increment):
            self.reset(call, frames.FLOW_CONTROL_ERROR)
            call.leave()


def _peer_name(address: object) -> str:
    """The peer as grpcio writes it."""
    if isinstance(address, tuple):
        kind = "ipv6" if ":" in address[0] else "ipv4"
        host = f"[{address[0]}]" if kind == "ipv6" else address[0]
        return f"{kind}:{host}:{address[1]}"
    return f"unix:{address or ''}"
