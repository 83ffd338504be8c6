"""Who may wait for a batch."""

from server.batcher.dispatcher import Dispatcher
from server.batcher.limits import BatchingLimits
from server.batcher.queue import RequestQueue
from server.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    RequestError,
)
from server.requests import InferenceRequest, Outcome

Refusal = tuple[Outcome, RequestError]


class Admission:
    """Refuses on arrival what cannot be served; the batcher's lock guards it.

    Args:
        queue: Where a request would wait.
        dispatcher: Knows when it would be answered.
        limits: What a request may bring.
    """

    def __init__(self, queue: RequestQueue, dispatcher: Dispatcher, limits: BatchingLimits) -> None:
        self._queue = queue
        self._dispatcher = dispatcher
        self._most = limits.max_request_images

    def refusal(self, request: InferenceRequest) -> Refusal | None:
        """Returns why a request may not wait; None if it may."""
        if not 0 < request.size <= self._most:
            message = f"batch: expected 1 to {self._most} images, got {request.size}"
            return Outcome.INVALID, InvalidRequestError(message)
        if full := self._queue.refusal(request):
            retry_after_s = self._dispatcher.retry_after_s(request)
            return Outcome.FULL, OverloadedError(full, retry_after_s)
        if not self._dispatcher.can_make_it(request):
            message = "the deadline is before the answer could be there"
            return Outcome.DEADLINE, DeadlineExceededError(message)
        return None
