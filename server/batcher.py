"""Dynamic batching: requests that wait together run together.

There is no timer under load. Each model instance is a thread that, whenever it is free, takes what
is queued, up to `max_batch_size` images: the device never waits while a request waits, and batches
grow by themselves when it falls behind. A `max_queue_delay_s` above zero lets a free instance wait
for a fuller batch, counted from the oldest request.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from server.errors import (
    DeadlineExceededError,
    InferenceError,
    InvalidRequestError,
    OverloadedError,
    RequestError,
    UnavailableError,
)
from server.requests import Batch, Images, InferenceRequest, Outputs, Prediction

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class BatchingLimits:
    """What a batcher may hold.

    Attributes:
        max_batch_size: Images in one batch; also the most that one request may bring.
        max_queue_size: Images that may wait; a request beyond them is refused at once.
        max_queue_delay_s: How long a free instance waits for a batch to fill; 0 for not at all.
        instances: Threads that run batches side by side.
    """

    max_batch_size: int
    max_queue_size: int
    max_queue_delay_s: float = 0.0
    instances: int = 1


class BatchObserver(Protocol):
    """Is told what the batcher did; called on the event loop."""

    def batch_finished(self, batch: Batch, inference_s: float) -> None:
        """A batch was run and its requests were answered."""

    def batch_failed(self) -> None:
        """The model failed on a batch."""

    def queue_changed(self, images: int) -> None:
        """So many images wait now."""


class DynamicBatcher:
    """Joins requests into batches and runs them on the model's instances.

    Example:
        batcher = DynamicBatcher(backend.run, (32, 32, 3), limits, observer)
        batcher.start()
        prediction = await batcher.infer(images)
        await batcher.drain()

    `infer`, `start` and `drain` belong to one event loop; `run` is called on instance threads and
    must be safe to call from several at once when there are several.
    """

    def __init__(
        self,
        run: Callable[[Images], Outputs],
        sample_shape: tuple[int, int, int],
        limits: BatchingLimits,
        observer: BatchObserver,
        clock: Clock = time.monotonic,
    ) -> None:
        self._run = run
        self._sample_shape = sample_shape
        self._limits = limits
        self._observer = observer
        self._clock = clock
        self._queue: deque[InferenceRequest] = deque()
        self._queued_images = 0
        self._accepting = False
        self._delay_s = limits.max_queue_delay_s
        # Guards the four fields above; waited on by free instances.
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._loop: asyncio.AbstractEventLoop

    @property
    def limits(self) -> BatchingLimits:
        """The limits it was made with."""
        return self._limits

    def start(self) -> None:
        """Starts the instances; call it on the event loop that will call `infer`."""
        self._loop = asyncio.get_running_loop()
        self._accepting = True
        for number in range(self._limits.instances):
            thread = threading.Thread(
                target=self._serve_instance, name=f"model-instance-{number}", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def stop_delaying(self) -> None:
        """From now on runs what waits without a delay: nobody will come to fill the batch."""
        with self._changed:
            self._delay_s = 0.0
            self._changed.notify_all()

    async def drain(self) -> None:
        """Refuses new requests, answers those accepted and ends the instances."""
        self.stop_delaying()
        with self._changed:
            self._accepting = False
            self._changed.notify_all()
        await asyncio.gather(*(asyncio.to_thread(thread.join) for thread in self._threads))
        self._threads.clear()

    async def infer(self, images: Images, deadline_s: float = float("inf")) -> Prediction:
        """Runs images in the next batch that has room for them.

        Cancelling the call takes the request out of the queue; it never disturbs a batch-mate.

        Args:
            images: `[N, H, W, 3]`, of the size the model takes.
            deadline_s: On the batcher's clock; a request still queued then is not run.

        Raises:
            InvalidRequestError: There are no images, or more than a batch holds.
            OverloadedError: The queue has no room for them.
            DeadlineExceededError: The deadline passed while they waited.
            UnavailableError: The batcher is not running.
            InferenceError: The model failed on their batch.
        """
        request = InferenceRequest(images, self._loop.create_future(), self._clock(), deadline_s)
        self._enqueue(request)
        try:
            return await request.future
        except asyncio.CancelledError:
            self._discard(request)
            raise

    def _enqueue(self, request: InferenceRequest) -> None:
        if not 0 < request.size <= self._limits.max_batch_size:
            raise InvalidRequestError(
                f"batch: expected 1 to {self._limits.max_batch_size} images, got {request.size}"
            )
        with self._changed:
            if not self._accepting:
                raise UnavailableError("the model is being shut down")
            if self._queued_images + request.size > self._limits.max_queue_size:
                raise OverloadedError(
                    f"the queue is full: {self._queued_images} of {self._limits.max_queue_size} "
                    f"images wait, the request brings {request.size}"
                )
            self._queue.append(request)
            self._queued_images += request.size
            self._changed.notify()
        self._observer.queue_changed(self._queued_images)

    def _discard(self, request: InferenceRequest) -> None:
        with self._changed:
            if request in self._queue:
                self._queue.remove(request)
                self._queued_images -= request.size
        self._observer.queue_changed(self._queued_images)

    def _serve_instance(self) -> None:
        # Requests are copied into one reused buffer, the only copy between the wire and the device.
        buffer = np.empty((self._limits.max_batch_size, *self._sample_shape), np.uint8)
        while (batch := self._next_batch()) is not None:
            self._run_batch(batch, buffer)

    def _next_batch(self) -> Batch | None:
        """Blocks until there is a batch to run; None when draining is done."""
        with self._changed:
            while True:
                self._expire()
                wait_s = self._wait_s()
                if wait_s == 0:
                    return self._seal()
                if not self._queue and not self._accepting:
                    return None
                self._changed.wait(wait_s)

    def _wait_s(self) -> float | None:
        """How long a free instance shall wait; None means until something changes."""
        if not self._queue:
            return None
        if self._queued_images >= self._limits.max_batch_size:
            return 0.0
        waited_s = self._clock() - self._queue[0].enqueued_at_s
        return max(0.0, self._delay_s - waited_s)

    def _expire(self) -> None:
        """Takes out the requests whose deadline has passed and those whose caller has left."""
        now_s = self._clock()
        gone = [r for r in self._queue if r.deadline_s < now_s or r.future.done()]
        for request in gone:
            self._queue.remove(request)
            self._queued_images -= request.size
            error = DeadlineExceededError(
                "the deadline passed while the request waited for a batch"
            )
            self._loop.call_soon_threadsafe(_fail, request, error)

    def _seal(self) -> Batch:
        room = self._limits.max_batch_size
        taken: list[InferenceRequest] = []
        while self._queue and self._queue[0].size <= room:
            request = self._queue.popleft()
            self._queued_images -= request.size
            taken.append(request)
            room -= request.size
        return Batch(tuple(taken), self._clock())

    def _run_batch(self, batch: Batch, buffer: Images) -> None:
        try:
            outputs = self._run(_gather(batch, buffer))
        except Exception as error:  # whatever the model raises ends this batch only
            failure = InferenceError("the model failed on this batch")
            failure.__cause__ = error
            self._loop.call_soon_threadsafe(self._fail_batch, batch, failure)
            return
        # One wake-up of the event loop per batch, however many requests it held.
        inference_s = self._clock() - batch.sealed_at_s
        self._loop.call_soon_threadsafe(self._deliver, batch, outputs, inference_s)

    def _deliver(self, batch: Batch, outputs: Outputs, inference_s: float) -> None:
        end = 0
        for request in batch.requests:
            start, end = end, end + request.size
            if not request.future.done():
                queue_s = batch.sealed_at_s - request.enqueued_at_s
                rows = outputs.rows(start, end)
                request.future.set_result(Prediction(rows, queue_s, inference_s, batch.size))
        self._observer.batch_finished(batch, inference_s)
        self._observer.queue_changed(self._queued_images)

    def _fail_batch(self, batch: Batch, error: RequestError) -> None:
        for request in batch.requests:
            _fail(request, error)
        self._observer.batch_failed()


def _gather(batch: Batch, buffer: Images) -> Images:
    end = 0
    for request in batch.requests:
        start, end = end, end + request.size
        buffer[start:end] = request.images
    return buffer[:end]


def _fail(request: InferenceRequest, error: RequestError) -> None:
    if not request.future.done():
        request.future.set_exception(error)
