"""What goes to one peer: frames gathered for one write, and the windows that govern data."""

import asyncio
from typing import TYPE_CHECKING

from server.transport import frames
from server.transport.frames import Http2Error

if TYPE_CHECKING:
    from server.transport.call import Call


class Outgoing:
    """The sending half of a connection.

    Frames wait until the event loop has done all that was due, and then leave in one write: a
    system call costs more than most of what a call does here, and answers come by the batch.

    Args:
        transport: Takes the bytes.
        max_unsent_bytes: A peer that lets more pile up is disconnected.
    """

    def __init__(self, transport: asyncio.Transport, max_unsent_bytes: int) -> None:
        self._transport = transport
        self._max_unsent_bytes = max_unsent_bytes
        self._loop = asyncio.get_running_loop()
        self._frames: list[bytes] = []
        self._window = frames.DEFAULT_WINDOW_BYTES
        self._frame_bytes = frames.DEFAULT_FRAME_BYTES
        self._blocked: set[Call] = set()
        # What a stream's window is at its start.
        self.stream_window = frames.DEFAULT_WINDOW_BYTES

    def write(self, data: bytes) -> None:
        """Sends frames that no window governs."""
        if not self._frames:
            self._loop.call_soon(self.flush)
        self._frames.append(data)

    def flush(self) -> None:
        """Writes what was gathered."""
        gathered, self._frames = self._frames, []
        if not gathered or self._transport.is_closing():
            return
        if self._transport.get_write_buffer_size() > self._max_unsent_bytes:
            # The peer asks and does not listen.
            self._transport.abort()
            return
        self._transport.write(b"".join(gathered))

    def close(self) -> None:
        """Writes what was gathered and closes the connection."""
        self.flush()
        self._transport.close()

    def send_headers(self, call: "Call", block: bytes, ends: bool) -> None:
        """Sends a header block, which ends the stream or not."""
        flags = frames.END_HEADERS | (frames.END_STREAM if ends else 0)
        self.write(frames.frame(frames.HEADERS, flags, call.stream_id, block))

    def send_data(self, call: "Call", message: bytes) -> None:
        """Sends a message's bytes as far as the windows let it; the rest waits in the call."""
        size = len(message)
        if call.unsent or size > self._room(call):
            call.unsent += message
            self._send_unsent(call)
            return
        self._window -= size
        call.send_window -= size
        self.write(frames.frame(frames.DATA, 0, call.stream_id, message))

    def send_whole(self, call: "Call", head: bytes, message: bytes, trailers: bytes) -> bool:
        """Sends all of a reply; returns False, with nothing sent, where the windows forbid it."""
        size, stream_id = len(message), call.stream_id
        if size > self._room(call):
            return False
        self._window -= size
        whole = (
            frames.frame(frames.HEADERS, frames.END_HEADERS, stream_id, head),
            frames.frame(frames.DATA, 0, stream_id, message),
            frames.frame(
                frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, stream_id, trailers
            ),
        )
        self.write(b"".join(whole))
        return True

    def forget(self, call: "Call") -> None:
        """Sends nothing more of what waits in a call."""
        self._blocked.discard(call)

    def widen(self, increment: int) -> None:
        """The peer takes more bytes on all streams together.

        Raises:
            Http2Error: The window leaves its range.
        """
        self._window += increment
        if self._window > frames.LARGEST_WINDOW:
            raise Http2Error(frames.FLOW_CONTROL_ERROR, "a window out of range")
        self._unblock()

    def widen_stream(self, call: "Call", increment: int) -> bool:
        """The peer takes more bytes of a call; returns False where its window leaves the range."""
        call.send_window += increment
        if call.send_window > frames.LARGEST_WINDOW:
            return False
        if call in self._blocked:
            self._send_unsent(call)
        return True

    def settle(self, values: dict[int, int], calls: "list[Call]") -> None:
        """Keeps to the peer's settings and acknowledges them.

        Args:
            values: By setting.
            calls: Those whose windows change with the initial one.
        """
        self._frame_bytes = values.get(frames.MAX_FRAME_SIZE, self._frame_bytes)
        window = values.get(frames.INITIAL_WINDOW_SIZE, self.stream_window)
        change, self.stream_window = window - self.stream_window, window
        for call in calls:
            call.send_window += change
        self.write(frames.frame(frames.SETTINGS, frames.ACK, 0))
        self._unblock()

    def _room(self, call: "Call") -> int:
        return min(self._window, call.send_window, self._frame_bytes)

    def _unblock(self) -> None:
        for call in list(self._blocked):
            self._send_unsent(call)

    def _send_unsent(self, call: "Call") -> None:
        while call.unsent:
            size = min(len(call.unsent), self._room(call))
            if size <= 0:
                self._blocked.add(call)
                return
            piece = bytes(call.unsent[:size])
            del call.unsent[:size]
            self._window -= size
            call.send_window -= size
            self.write(frames.frame(frames.DATA, 0, call.stream_id, piece))
        self._blocked.discard(call)
        call.all_sent()
