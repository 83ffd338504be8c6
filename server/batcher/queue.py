"""The queue: bounded, earliest deadline first inside priority levels, and nobody starves.

Requests stand in the order of an *urgency*, a point in time that is fixed when they arrive:

    min(deadline, arrival + PATIENCE_S) + (level - 1) * LEVEL_S

So inside a level the earliest deadline goes first, and a level goes before the next as long as
deadlines are shorter than LEVEL_S. The ageing rule follows: whoever arrives more than
PATIENCE_S + (level - 1) * LEVEL_S after a request stands behind it, whatever its deadline and
level, because time moves on and an urgency does not. A request without a deadline is one whose turn
comes after PATIENCE_S.
"""

import bisect
import itertools

from server.batcher.limits import BatchingLimits
from server.requests import InferenceRequest, Part

PATIENCE_S = 1.0
LEVEL_S = 1.0
DEFAULT_LEVEL = 2
LOWEST_LEVEL = 8


def urgency(request: InferenceRequest) -> float:
    """Returns the point in time that a request is queued by."""
    level = min(request.priority or DEFAULT_LEVEL, LOWEST_LEVEL)
    due_s = min(request.deadline_s, request.enqueued_at_s + PATIENCE_S)
    return due_s + (level - 1) * LEVEL_S


class RequestQueue:
    """Requests in the order they are to be run; not safe to share between threads without a lock.

    Attributes:
        images: How many images wait.
        bytes: How many bytes of pixels wait.
    """

    def __init__(self, limits: BatchingLimits) -> None:
        self._limits = limits
        # Sorted; the counter keeps the order of arrival between equals.
        self._entries: list[tuple[float, int, InferenceRequest]] = []
        self._entry_of: dict[InferenceRequest, tuple[float, int, InferenceRequest]] = {}
        self._arrivals = itertools.count()
        self._images_of: dict[str, int] = {}
        # No deadline in the queue is earlier; saves looking for late requests.
        self._earliest_deadline_s = float("inf")
        self.images = 0
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def head(self) -> InferenceRequest:
        """The request to be run next."""
        return self._entries[0][2]

    @property
    def oldest_at_s(self) -> float:
        """When the request that waits longest was queued."""
        return min(request.enqueued_at_s for _, _, request in self._entries)

    @property
    def has_deadlines(self) -> bool:
        """Whether a request with a deadline may wait."""
        return self._earliest_deadline_s != float("inf")

    def refusal(self, request: InferenceRequest) -> str | None:
        """Returns why there is no room for a request, or None."""
        limits, size = self._limits, request.size
        if self.images + size > limits.max_queue_size:
            return (
                f"the queue is full: {self.images} of {limits.max_queue_size} images wait, "
                f"the request brings {size}"
            )
        if self.bytes + request.images.nbytes > limits.max_queue_bytes:
            return (
                f"the queue is full: {self.bytes} of {limits.max_queue_bytes} bytes wait, "
                f"the request brings {request.images.nbytes}"
            )
        share = int(limits.max_client_share * limits.max_queue_size)
        if request.client and self._images_of.get(request.client, 0) + size > share:
            return (
                f"the client's share of the queue is full: {share} images, "
                f"the request brings {size}"
            )
        return None

    def add(self, request: InferenceRequest) -> None:
        """Queues a request that `refusal` had nothing against."""
        entry = (urgency(request), next(self._arrivals), request)
        bisect.insort(self._entries, entry)
        self._entry_of[request] = entry
        self._earliest_deadline_s = min(self._earliest_deadline_s, request.deadline_s)
        self._count(request, request.waiting)

    def remove(self, request: InferenceRequest) -> bool:
        """Takes out what waits of a request; returns whether anything did."""
        entry = self._entry_of.pop(request, None)
        if entry is None:
            return False
        del self._entries[bisect.bisect_left(self._entries, entry)]
        self._count(request, -request.waiting)
        if not self._entries:
            self._earliest_deadline_s = float("inf")
        return True

    def images_before(self, request: InferenceRequest) -> int:
        """Returns how many waiting images would run before those of a request that comes now."""
        position = bisect.bisect(self._entries, (urgency(request), float("inf")))
        behind = self._entries[position:]
        return self.images - sum(other.waiting for _, _, other in behind)

    def window(self, images: int) -> list[InferenceRequest]:
        """Returns the requests that the next so many images belong to."""
        found: list[InferenceRequest] = []
        for _, _, request in self._entries:
            if images <= 0:
                break
            found.append(request)
            images -= request.waiting
        return found

    def pop_late(self, before_s: float) -> list[InferenceRequest]:
        """Takes out the requests whose deadline is before a point in time."""
        if before_s <= self._earliest_deadline_s:
            return []
        late = [request for _, _, request in self._entries if request.deadline_s < before_s]
        for request in late:
            self.remove(request)
        self._earliest_deadline_s = min(
            (request.deadline_s for _, _, request in self._entries), default=float("inf")
        )
        return late

    def pop_all(self) -> list[InferenceRequest]:
        """Takes out every request."""
        requests = [request for _, _, request in self._entries]
        for request in requests:
            self.remove(request)
        return requests

    def take(self, room: int, max_batch_size: int) -> list[Part]:
        """Takes up to `room` images from the head.

        Only a request that no batch could hold is split; the others stay together. What a caller
        left is dropped on the way.
        """
        parts: list[Part] = []
        while self._entries and room > 0:
            request = self.head
            waiting = request.waiting
            if request.future.done():
                self.remove(request)
                continue
            if waiting > room and waiting <= max_batch_size:
                break
            size = min(waiting, room)
            parts.append(Part(request, request.taken, request.taken + size))
            room -= size
            if size == waiting:
                self.remove(request)
            else:
                self._count(request, -size)
            request.taken += size
        return parts

    def _count(self, request: InferenceRequest, images: int) -> None:
        self.images += images
        self.bytes += images * (request.images.nbytes // request.size)
        if request.client:
            left = self._images_of.get(request.client, 0) + images
            if left:
                self._images_of[request.client] = left
            else:
                self._images_of.pop(request.client, None)
