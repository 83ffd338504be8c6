"""The messages between a front end and its owner, and the shared memory for the pixels.

Messages of every request are tuples, which pickle in about a microsecond.
"""

import asyncio
import mmap
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
from prometheus_client.samples import Exemplar

from convoy.server.backends.device import Runtime
from convoy.server.batching import BatchingLimits, Health
from convoy.server.errors import OverloadedError, RequestError
from convoy.server.metrics.batches import ModelStatistics
from convoy.server.metrics.requests import RunsOn
from convoy.server.models.manifest import Manifest
from convoy.server.models.readiness import ServerState
from convoy.server.requests import Images, Scores
from convoy.server.rest.traffic import Interval
from convoy.server.settings import ServerSettings

_LEAST_BITS = 12


class Arena:
    """Places images in memory that another process maps as well.

    Blocks are powers of two, split and joined again as buddies (Knowlton, "A fast storage
    allocator", CACM 8, 1965), so that no mix of sizes leaves gaps.

    Args:
        memory: Its size is a power of two, of 4 KiB at least.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._orders = len(memory).bit_length() - _LEAST_BITS
        self._free: list[set[int]] = [set() for _ in range(self._orders)]
        self._free[-1].add(0)
        self._taken: dict[int, int] = {}

    def place(self, images: Images) -> int:
        """Copy images into the memory and return where they begin.

        Raises:
            OverloadedError: There is no room for them.
        """
        offset = self._take(images.nbytes)
        view = np.frombuffer(self._memory, np.uint8, images.nbytes, offset)
        view.reshape(images.shape)[:] = images
        return offset

    def free(self, offset: int) -> None:
        """Release the block that begins there."""
        order = self._taken.pop(offset)
        while order + 1 < self._orders:
            buddy = offset ^ (1 << order + _LEAST_BITS)
            if buddy not in self._free[order]:
                break
            self._free[order].discard(buddy)
            offset = min(offset, buddy)
            order += 1
        self._free[order].add(offset)

    def _take(self, size_bytes: int) -> int:
        order = max(0, (size_bytes - 1).bit_length() - _LEAST_BITS)
        found = next((each for each in range(order, self._orders) if self._free[each]), None)
        if found is None:
            raise OverloadedError(f"the front end has no room for {size_bytes} bytes of pixels")
        offset = self._free[found].pop()
        while found > order:
            found -= 1
            self._free[found].add(offset + (1 << found + _LEAST_BITS))
        self._taken[offset] = order
        return offset


_LENGTH = struct.Struct("<I")


class Link(asyncio.Protocol):
    """One end of a stream socket on the running loop.

    Messages of one turn of the loop are sent, and mostly arrive, together. They are
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
        """Start to carry messages."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        """Stop carrying messages."""
        self._transport = None
        self._lost()

    def send(self, message: object) -> None:
        """Send a message; it is lost if the other end is gone."""
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(message)

    def close(self) -> None:
        """Send the remaining messages and close the connection."""
        self._flush()
        if self._transport:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        """Receive the messages of the other end."""
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


# A metric's sample: its name and its labels, sorted.
SampleKey = tuple[str, tuple[tuple[str, str], ...]]


class Infer(NamedTuple):
    """A front end asks for a prediction.

    Attributes:
        number: Names the request in the answer.
        model: The key of the version.
        offset: Where the pixels begin in the memory.
        shape: `(N, H, W, 3)`.
        deadline_s: On the clock `time.monotonic`, which all processes share.
    """

    number: int
    model: int
    offset: int
    shape: tuple[int, ...]
    deadline_s: float
    priority: int
    client: str


class Cancel(NamedTuple):
    """The caller of a request has disconnected; the reply only frees its pixels."""

    number: int


class Answered(NamedTuple):
    """The prediction that a front end asked for."""

    number: int
    logits: Scores
    probabilities: Scores
    queue_s: float
    inference_s: float
    batch_size: int


class InferFailed(NamedTuple):
    """The error instead of a prediction."""

    number: int
    error: RequestError


@dataclass(frozen=True, slots=True)
class Setup:
    """The first message to a front end.

    Attributes:
        processors: That it may use for decoding.
    """

    settings: ServerSettings
    processors: int


@dataclass(frozen=True, slots=True)
class Listening:
    """A front end accepts calls."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A front end cannot start; `reason` is for the operator."""

    reason: str


@dataclass(frozen=True, slots=True)
class Admitted:
    """A version accepts requests; `key` identifies it from now on."""

    key: int
    manifest: Manifest
    runtime: Runtime
    runs_on: RunsOn
    limits: BatchingLimits
    health: Health
    examples: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class MadeDefault:
    """A version answers requests that name none."""

    key: int


@dataclass(frozen=True, slots=True)
class Removed:
    """A version no longer accepts requests."""

    key: int


@dataclass(frozen=True, slots=True)
class Released:
    """No call of a front end still holds a removed version."""

    key: int


@dataclass(frozen=True, slots=True)
class HealthChanged:
    """The health of a version changed."""

    key: int
    health: Health


@dataclass(frozen=True, slots=True)
class StateChanged:
    """The state of the server changed, or callers can no longer reach it."""

    state: ServerState
    reachable: bool


@dataclass(frozen=True, slots=True)
class AllProcessed:
    """A front end has processed all messages before the owner's request of the same type."""


@dataclass(frozen=True, slots=True)
class Reload:
    """A front end must read the files of tokens and TLS again."""


@dataclass(frozen=True, slots=True)
class Drain:
    """A front end must answer accepted requests within the drain time-out, then end."""


@dataclass(frozen=True, slots=True)
class RecentTraffic:
    """The newest traffic, for the page of every front end; all of the last minutes at first."""

    intervals: tuple[Interval, ...]


@dataclass(frozen=True, slots=True)
class AskStatistics:
    """A front end asks for the statistics of a version's batcher."""

    number: int
    model: int


@dataclass(frozen=True, slots=True)
class StatisticsRead:
    """The answer."""

    number: int
    statistics: ModelStatistics


@dataclass(frozen=True, slots=True)
class Samples:
    """The counts of a front end so far; they also show that it is alive.

    Attributes:
        counts: Of counters and histograms, which stay when the process ends.
        gauges: Of this moment.
        exemplars: Of the buckets of histograms.
    """

    counts: dict[SampleKey, float]
    gauges: dict[SampleKey, float]
    exemplars: dict[SampleKey, Exemplar]
