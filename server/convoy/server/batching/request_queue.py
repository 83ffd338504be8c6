"""The queue: bounded, ordered by deadline within priority levels, and free of starvation.

Requests are ordered by their *urgency*, a point in time that is fixed when they arrive:

    min(deadline, arrival + PATIENCE_S) + (level - 1) * LEVEL_S

Within a level the earliest deadline runs first, and a level runs before the next as long as
deadlines are shorter than LEVEL_S. The aging rule follows: a request that arrives more than
PATIENCE_S + (level - 1) * LEVEL_S after another one queues behind it, whatever its deadline and
level, because time advances and an urgency does not. A request without a deadline is queued as if
its deadline were PATIENCE_S after its arrival.
"""

import bisect
import itertools
from dataclasses import dataclass

from convoy.server.batching.batch import InferenceRequest, RequestSlice

_MIB = 1024 * 1024
_NONE = float("inf")
PATIENCE_S = 1.0
LEVEL_S = 1.0
DEFAULT_LEVEL = 2
LOWEST_LEVEL = 8


@dataclass(frozen=True, slots=True)
class BatchingLimits:
    """The limits of a batcher.

    Attributes:
        max_batch_size: Images in one batch.
        max_queue_size: Images in the queue; the batcher rejects a request beyond them at once.
        max_queue_delay_s: How long an idle worker waits for a batch to fill; 0 for not at all.
        instances: Workers that run batches at the same time, on all devices together.
        max_queue_bytes: Bytes of pixels in the queue.
        max_request_images: Images in one request; it may be split over batches.
        max_client_share: The share of the queue, 0 to 1, for requests of one identified client.
        hang_timeout_s: A run on the device that takes longer is considered hung.
        preferred_batch_size: Images in one batch while fewer than two batches of `max_batch_size`
            per instance are queued; None for `max_batch_size`.
    """

    max_batch_size: int
    max_queue_size: int
    max_queue_delay_s: float = 0.0
    instances: int = 1
    max_queue_bytes: int = 256 * _MIB
    max_request_images: int = 256
    max_client_share: float = 1.0
    hang_timeout_s: float = 60.0
    preferred_batch_size: int | None = None


def urgency(request: InferenceRequest) -> float:
    """Return the point in time that a request is ordered by."""
    level = min(request.priority or DEFAULT_LEVEL, LOWEST_LEVEL)
    due_s = min(request.deadline_s, request.enqueued_at_s + PATIENCE_S)
    return due_s + (level - 1) * LEVEL_S


class RequestQueue:
    """The queued requests in the order in which they run; threads that share it need a lock.

    Attributes:
        images: Number of queued images.
        bytes: Bytes of their pixels.
        earliest_deadline_s: No queued request has an earlier deadline; infinity for no deadlines.
    """

    def __init__(self, limits: BatchingLimits) -> None:
        self._limits = limits
        # Sorted; the counter keeps the order of arrival between equal urgencies.
        self._entries: list[tuple[float, int, InferenceRequest]] = []
        self._entry_of: dict[InferenceRequest, tuple[float, int, InferenceRequest]] = {}
        self._arrivals = itertools.count()
        self._images_of: dict[str, int] = {}
        self.earliest_deadline_s = _NONE
        self.images = 0
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def head(self) -> InferenceRequest:
        """The next request to run."""
        return self._entries[0][2]

    @property
    def oldest_at_s(self) -> float:
        """When the oldest request was enqueued."""
        return min(request.enqueued_at_s for _, _, request in self._entries)

    def rejection(self, request: InferenceRequest) -> str | None:
        """Return why there is no room for a request, or None."""
        limits, size = self._limits, request.size
        if self.images + size > limits.max_queue_size:
            return (
                f"the queue is full: {self.images} of {limits.max_queue_size} images wait, "
                f"the request has {size}"
            )
        if self.bytes + request.images.nbytes > limits.max_queue_bytes:
            return (
                f"the queue is full: {self.bytes} of {limits.max_queue_bytes} bytes wait, "
                f"the request has {request.images.nbytes}"
            )
        if not request.client:
            return None
        share = int(limits.max_client_share * limits.max_queue_size)
        if self._images_of.get(request.client, 0) + size > share:
            return (
                f"the client's share of the queue is full: {share} images, the request has {size}"
            )
        return None

    def add(self, request: InferenceRequest) -> None:
        """Enqueue a request that `rejection` returned None for."""
        entry = (urgency(request), next(self._arrivals), request)
        bisect.insort(self._entries, entry)
        self._entry_of[request] = entry
        self.earliest_deadline_s = min(self.earliest_deadline_s, request.deadline_s)
        self._count(request, request.waiting)

    def remove(self, request: InferenceRequest) -> bool:
        """Remove the queued images of a request; return whether there were any."""
        entry = self._entry_of.pop(request, None)
        if entry is None:
            return False
        del self._entries[bisect.bisect_left(self._entries, entry)]
        self._count(request, -request.waiting)
        if not self._entries:
            self.earliest_deadline_s = _NONE
        return True

    def images_before(self, request: InferenceRequest) -> int:
        """Return how many queued images would run before those of a request that arrives now."""
        if not self._entries:
            return 0
        position = bisect.bisect(self._entries, (urgency(request), float("inf")))
        behind = self._entries[position:]
        return self.images - sum(other.waiting for _, _, other in behind)

    def window(self, images: int) -> list[InferenceRequest]:
        """Return the requests of the next `images` images."""
        found: list[InferenceRequest] = []
        for _, _, request in self._entries:
            if images <= 0:
                break
            found.append(request)
            images -= request.waiting
        return found

    def pop_late(self, before_s: float) -> list[InferenceRequest]:
        """Remove the requests whose deadline is before a point in time, and return them."""
        if before_s <= self.earliest_deadline_s:
            return []
        late = [request for _, _, request in self._entries if request.deadline_s < before_s]
        for request in late:
            self.remove(request)
        self.earliest_deadline_s = min(
            (request.deadline_s for _, _, request in self._entries), default=_NONE
        )
        return late

    def pop_all(self) -> list[InferenceRequest]:
        """Remove every request, and return them."""
        requests = [request for _, _, request in self._entries]
        for request in requests:
            self.remove(request)
        return requests

    def take(self, room: int, max_batch_size: int) -> list[RequestSlice]:
        """Remove up to `room` images from the head.

        Only a request that no batch could hold is split; all others stay whole. Cancelled requests
        are dropped.
        """
        slices: list[RequestSlice] = []
        while self._entries and room > 0:
            request = self._entries[0][2]
            waiting = request.waiting
            if request.future.done():
                self.remove(request)
                continue
            if room < waiting <= max_batch_size:
                break
            size = min(waiting, room)
            start = request.size - waiting
            slices.append(RequestSlice(request, start, start + size))
            room -= size
            if size == waiting:
                self.remove(request)
            else:
                self._count(request, -size)
            request.waiting -= size
        return slices

    def _count(self, request: InferenceRequest, images: int) -> None:
        self.images += images
        self.bytes += images * (request.images.nbytes // request.size)
        if request.client:
            left = self._images_of.get(request.client, 0) + images
            if left:
                self._images_of[request.client] = left
            else:
                self._images_of.pop(request.client, None)
