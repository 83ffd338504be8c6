"""Limits of the memory and time of connections and requests.

The bound on memory, `--max-buffered-mib` (B), is split in two halves:

- B/2 for the receive windows of HTTP/2 connections: bytes that a peer sent and that no request has
  read yet. Each of the `--max-connections` (C) gets a window of B/2/C, within 64 KiB and 4 MiB;
  if B/2 is less than C times 64 KiB, the minimum of HTTP/2, the latter is the bound.
- B/2 for the requests themselves, complete or not, compressed or inflated, and for the replies that
  the peer has not read (`ByteBudget`).

h2corn buffers up to 2 MiB of replies per connection before sending waits; a reply that the peer
does not read for `RESPONSE_STALL_S` is dropped.
"""

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass

# Requests are ended until this share of the bound is free, so that this happens rarely.
_FREED_PART = 8
# A unary reply up to this size is not counted: it takes no more than the state of its stream.
_UNCOUNTED_BYTES = 1024


class Holder:
    """Something that holds bytes.

    Attributes:
        held_bytes: Its share of the budget.
    """

    __slots__ = ("held_bytes",)

    def __init__(self) -> None:
        self.held_bytes = 0


class IncompleteRequest(Holder, ABC):
    """A request that holds bytes and may be ended before it is complete."""

    __slots__ = ()

    @abstractmethod
    def end(self) -> None:
        """End the request, because others need the memory."""


class UnsentBytes(bytes):
    """A reply that counts until the HTTP server has sent or dropped it.

    The HTTP server does not report that, but it keeps no copy: it refers to the object until then.
    """

    def __new__(cls, data: bytes, sent: deque[int]) -> "UnsentBytes":
        """Return a copy of the data that adds its size to `sent` when nothing refers to it."""
        unsent = super().__new__(cls, data)
        unsent.sent = sent
        return unsent

    sent: deque[int]

    def __del__(self) -> None:
        # In whichever thread drops it; appending to a deque is atomic.
        self.sent.append(len(self))


class ByteBudget:
    """Counts the bytes of requests from their first byte to their answer, and of unsent replies.

    When requests need more than is free, those that still wait for their callers' bytes are ended,
    the largest first, so that a caller that sends only half of its requests cannot block others.

    Args:
        max_bytes: The bound.

    Attributes:
        used_bytes: Bytes of requests and replies; sent replies may count for a moment longer.
        incomplete: Requests whose messages are not complete; these may be ended.

    Example:
        if not budget.take(len(chunk), request):
            …
        budget.release(request)
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self.incomplete: set[IncompleteRequest] = set()
        self._sent: deque[int] = deque()

    def take(self, size: int, holder: Holder) -> bool:
        """Take bytes for a request; return whether there was room."""
        if self.used_bytes + size > self.max_bytes and not self._make_room(size, holder):
            return False
        self.used_bytes += size
        holder.held_bytes += size
        return True

    def release(self, holder: Holder) -> None:
        """Release all bytes of a request."""
        self.incomplete.discard(holder)
        self.used_bytes -= holder.held_bytes
        holder.held_bytes = 0

    def reply(self, data: bytes, *, streams: bool = False) -> bytes | None:
        """Return the bytes to send for a reply, counted until they are sent.

        Args:
            data: The reply.
            streams: Whether more such replies may wait on the same stream.

        Returns:
            None if there is no room for it.
        """
        if len(data) <= _UNCOUNTED_BYTES and not streams:
            return data
        return UnsentBytes(data, self._sent) if self.take(len(data), Holder()) else None

    def _make_room(self, size: int, taker: Holder) -> bool:
        """Forget sent replies, then end incomplete requests that hold more than the taker."""
        while self._sent:
            self.used_bytes -= self._sent.popleft()
        if self.used_bytes + size <= self.max_bytes:
            return True
        wanted = max(size, self.max_bytes // _FREED_PART)
        for holder in sorted(self.incomplete, key=_held_bytes, reverse=True):
            if holder is taker or self.used_bytes + wanted <= self.max_bytes:
                break
            # At once, not when its task runs: others ask for room before that.
            self.release(holder)
            holder.end()
        return self.used_bytes + size <= self.max_bytes


def _held_bytes(holder: Holder) -> int:
    return holder.held_bytes


@dataclass(slots=True)
class MessageLimits:
    """The largest messages in bytes, before and after inflation; they may change.

    Attributes:
        images_bytes: Of a message that carries images.
        control_bytes: Of any other.
    """

    images_bytes: int
    control_bytes: int


_MIB = 1024 * 1024
_MIN_WINDOW_BYTES = 64 * 1024
_MAX_WINDOW_BYTES = 4 * _MIB

# Header fields of one request, as HTTP/1.1 sends them and as HPACK decodes them.
MAX_HEADER_BYTES = 32 * 1024
# As HPACK sends them. A longer block ends the connection with all its requests, whereas fields over
# MAX_HEADER_BYTES end only one request; so this limit is larger.
MAX_HEADER_BLOCK_BYTES = 2 * MAX_HEADER_BYTES
MAX_HEADER_FIELDS = 100
# From the TCP connection to the end of the TLS handshake and the first bytes of HTTP.
HANDSHAKE_S = 10.0
HEADERS_S = 10.0
# Time without any byte of a request's body, and time for the whole body.
BODY_IDLE_S = 20.0
BODY_S = 120.0
RESPONSE_STALL_S = 20.0


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits of one port.

    Attributes:
        max_connections: Connections at a time; more wait in the listen backlog.
        max_streams: Requests at a time on one HTTP/2 connection.
        window_bytes: What a peer may send before a request has taken it, for each connection.
        idle_s: Time after which a connection without requests is closed.
        age_s: Time after which a connection gets GOAWAY (gRFC A9); 0: never. All connections
            are replaced together, so each lives at most this long, plus the drain of its requests.
    """

    max_connections: int = 1024
    max_streams: int = 256
    window_bytes: int = 256 * 1024
    idle_s: float = 300.0
    age_s: float = 0.0


def window_bytes(max_buffered_bytes: int, max_connections: int) -> int:
    """Return the receive window of a connection: its share of half the buffered bytes."""
    share = max_buffered_bytes // 2 // max_connections
    return min(max(share, _MIN_WINDOW_BYTES), _MAX_WINDOW_BYTES)
