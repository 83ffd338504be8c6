"""Dynamic batching: requests that wait together run together.

There is no timer under load. Each model instance is a thread that, whenever it is free, takes what
is queued, up to `max_batch_size` images: the device never waits while a request waits, and batches
grow by themselves when it falls behind. A `max_queue_delay_s` above zero lets a free instance wait
for a fuller batch, counted from the oldest request.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import numpy as np
import structlog

from server.batcher.answers import Answers
from server.batcher.instance import BatchResult, ModelInstance, Run
from server.batcher.latency import LatencyModel, RunningTail
from server.batcher.limits import BatcherSnapshot, BatchingLimits
from server.batcher.observer import BatchObserver, BatchReport
from server.batcher.queue import RequestQueue
from server.batcher.scheduling import deferral_s, finish_s, next_size
from server.errors import (
    DeadlineExceededError,
    InferenceError,
    InvalidRequestError,
    OverloadedError,
    RequestError,
    UnavailableError,
)
from server.requests import (
    Batch,
    Images,
    InferenceRequest,
    Outcome,
    Outputs,
    Part,
    Prediction,
)

logger = structlog.get_logger()

Clock = Callable[[], float]
Allocate = Callable[[tuple[int, ...]], Images]
Tap = Callable[[Images, Prediction], None]

# The watchdog looks this many times in the time that a run may take.
_WATCHES = 4
# So long after the last run an idle device is tried against the predictions.
_STALE_S = 0.25
_UNKNOWN = LatencyModel()


def _allocate(shape: tuple[int, ...]) -> Images:
    return np.empty(shape, np.uint8)


class DynamicBatcher:
    """Joins requests into batches and runs them on the model's instances.

    Example:
        batcher = DynamicBatcher(backend.run, (32, 32, 3), limits, observer)
        batcher.start()
        prediction = await batcher.infer(images)
        await batcher.drain()

    `infer`, `start` and `drain` belong to one event loop; `run` is called on instance threads and
    must be safe to call from several at once when there are several. It returns arrays of its own,
    which it does not write to again.

    Args:
        run: Runs a batch.
        sample_shape: `(H, W, 3)`.
        limits: What may be held.
        observer: Is told what happened.
        latency: Predicts how long a batch takes; without one nothing is refused for its deadline
            before that has passed.
        clock: Monotonic seconds.
        allocate: Makes an instance's batch buffer of a shape.

    Attributes:
        tap: Is shown each request that was answered, with its answer; None, which is free of cost,
            but while a newer version is tried on what this one answers.
    """

    def __init__(
        self,
        run: Run,
        sample_shape: tuple[int, int, int],
        limits: BatchingLimits,
        observer: BatchObserver,
        clock: Clock = time.monotonic,
        *,
        latency: LatencyModel | None = None,
        allocate: Allocate = _allocate,
    ) -> None:
        self.tap: Tap | None = None
        self._limits = limits
        self._observer = observer
        self._clock = clock
        self._latency = latency or LatencyModel()
        # How far the event loop is behind: what a batch waited for it. A request waited about as
        # long before it was seen here, and its answer will.
        self._loop_lag = RunningTail()
        self._ran_at_s = float("-inf")
        self._max_batch_size = limits.max_batch_size
        self._queue = RequestQueue(limits)
        self._answers = Answers()
        self._accepting = False
        self._delay_s = limits.max_queue_delay_s
        self._healthy = True
        # Guards all of the above that instances use too; waited on by free instances.
        self._changed = threading.Condition()
        buffer_shape = (self._latency.padded(limits.max_batch_size), *sample_shape)
        self._instances = [
            ModelInstance(number, run, allocate(buffer_shape), self._latency.padded)
            for number in range(limits.instances)
        ]
        self._running = 0
        self._ended: asyncio.Event
        self._loop: asyncio.AbstractEventLoop
        self._on_health: Callable[[bool], None]
        self._watchdog: asyncio.TimerHandle | None = None

    @property
    def limits(self) -> BatchingLimits:
        """The limits it was made with."""
        return self._limits

    @property
    def healthy(self) -> bool:
        """False while a run on the device hangs; requests are refused meanwhile."""
        return self._healthy

    def snapshot(self) -> BatcherSnapshot:
        """Returns what it holds at this moment; may be called from any thread."""
        return BatcherSnapshot(
            queued_images=self._queue.images,
            queued_bytes=self._queue.bytes,
            busy_instances=sum(instance.started_at_s is not None for instance in self._instances),
            max_batch_size=self._max_batch_size,
            healthy=self._healthy,
            batch_latency_s=self._latency.table_s,
        )

    def start(self, on_health: Callable[[bool], None] = lambda healthy: None) -> None:
        """Starts the instances; call it on the event loop that will call `infer`.

        Args:
            on_health: Is told when a run on the device hangs, and when it came back after all.
        """
        self._on_health = on_health
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._accepting = True
        self._ran_at_s = self._clock()
        self._running = len(self._instances)
        for instance in self._instances:
            instance.start(self._serve)
        self._watch()

    def stop_delaying(self) -> None:
        """From now on runs what waits without a delay: nobody will come to fill the batch."""
        with self._changed:
            self._delay_s = 0.0
            self._changed.notify_all()

    async def drain(self) -> None:
        """Refuses new requests, answers those accepted and ends the instances.

        An instance whose run hangs is left behind; its requests were answered by the watchdog.
        """
        self.stop_delaying()
        with self._changed:
            self._accepting = False
            self._changed.notify_all()
        self._check_instances()
        self._end_when_done()
        await self._ended.wait()
        if self._watchdog:
            self._watchdog.cancel()
            self._watchdog = None

    async def infer(
        self,
        images: Images,
        deadline_s: float = float("inf"),
        priority: int = 0,
        client: str = "",
    ) -> Prediction:
        """Runs images in the next batch that has room for them, or in several.

        Cancelling the call takes the request out of the queue; it never disturbs a batch-mate.

        Args:
            images: `[N, H, W, 3]`, of the size the model takes.
            deadline_s: On the batcher's clock; what cannot be answered by then is not run.
            priority: 1 is the highest, larger is lower, 0 the default level.
            client: Who asks; bounds the part of the queue that one of them holds.

        Raises:
            InvalidRequestError: There are no images, or more than a request may bring.
            OverloadedError: The queue has no room for them.
            DeadlineExceededError: The deadline cannot be met, or passed while they waited.
            UnavailableError: The batcher is not running, or its device hangs.
            InferenceError: The model failed on them.
        """
        request = InferenceRequest(
            images, self._loop.create_future(), self._clock(), deadline_s, priority, client
        )
        self._enqueue(request)
        try:
            prediction = await request.future
        except asyncio.CancelledError:
            self._discard(request)
            raise
        if self.tap is not None:
            self.tap(images, prediction)
        return prediction

    def _enqueue(self, request: InferenceRequest) -> None:
        limits = self._limits
        if not 0 < request.size <= limits.max_request_images:
            message = f"batch: expected 1 to {limits.max_request_images} images, got {request.size}"
            self._refuse(Outcome.INVALID, InvalidRequestError(message))
        with self._changed:
            if not self._accepting:
                self._refuse(Outcome.UNAVAILABLE, UnavailableError("the model is being shut down"))
            if not self._healthy:
                self._refuse(Outcome.UNAVAILABLE, UnavailableError("the model's device hangs"))
            if full := self._queue.refusal(request):
                self._refuse(Outcome.FULL, OverloadedError(full, self._retry_after_s(request)))
            if not self._can_make_it(request):
                message = "the deadline is before the answer could be there"
                self._refuse(Outcome.DEADLINE, DeadlineExceededError(message))
            self._queue.add(request)
            self._changed.notify()

    def _refuse(self, outcome: Outcome, error: RequestError) -> NoReturn:
        self._observer.request_refused(outcome)
        raise error

    def _retry_after_s(self, request: InferenceRequest) -> float:
        """When the queue is expected to have room for a request."""
        size = self._max_batch_size
        batches = -(-request.size // size)
        return batches * self._latency.mean_s(size) / len(self._instances)

    def _can_make_it(self, request: InferenceRequest) -> bool:
        if request.deadline_s == float("inf"):
            return True
        now_s = request.enqueued_at_s
        if not len(self._queue) and self._is_stale(now_s):
            return request.deadline_s > now_s
        answered_s = finish_s(
            self._latency,
            [max(now_s, instance.free_at_s) for instance in self._instances],
            self._queue.images_before(request),
            request.size,
            self._max_batch_size,
        )
        return answered_s + 2 * self._loop_lag.tail_s <= request.deadline_s

    def _is_stale(self, now_s: float) -> bool:
        """Whether predictions are too old to refuse by.

        After a stall they may forbid every run, and without a run they would never improve; so a
        request that comes to an idle device after a while is run, whatever they say.
        """
        idle = all(instance.started_at_s is None for instance in self._instances)
        return idle and now_s - self._ran_at_s > _STALE_S

    def _discard(self, request: InferenceRequest) -> None:
        with self._changed:
            self._queue.remove(request)
        self._answers.forget(request)
        self._observer.request_refused(Outcome.CANCELLED)

    def _serve(self, instance: ModelInstance) -> None:
        while (batch := self._next_batch(instance)) is not None:
            result = instance.run(batch)
            self._finish(instance, batch, result)
        self._post(self._instance_ended)

    def _next_batch(self, instance: ModelInstance) -> Batch | None:
        """Blocks until there is a batch to run; None when draining is done."""
        with self._changed:
            while True:
                now_s = self._clock()
                needed_s = self._loop_lag.tail_s + self._latency.tail_s(1)
                needed_s = 0.0 if self._is_stale(now_s) else needed_s
                self._give_up(self._queue.pop_late(now_s + needed_s))
                wait_s = self._wait_s(instance, now_s)
                if wait_s == 0:
                    if batch := self._seal(instance, now_s):
                        return batch
                    continue
                if not len(self._queue) and not self._accepting:
                    return None
                self._changed.wait(wait_s)

    def _wait_s(self, instance: ModelInstance, now_s: float) -> float | None:
        """How long a free instance shall wait; None means until something changes."""
        queue = self._queue
        if not len(queue):
            return None
        if queue.images >= self._max_batch_size or not self._accepting:
            return 0.0
        if self._delay_s:
            return max(0.0, queue.oldest_at_s + self._delay_s - now_s)
        others_s = [other.free_at_s for other in self._instances if other is not instance]
        return deferral_s(queue, self._latency, now_s, self._max_batch_size, others_s)

    def _seal(self, instance: ModelInstance, now_s: float) -> Batch | None:
        latency, lag_s = self._latency, self._loop_lag.tail_s
        if self._is_stale(now_s):
            latency, lag_s = _UNKNOWN, 0.0
        size, dropped = next_size(
            self._queue, latency, now_s + lag_s, self._max_batch_size, len(self._instances)
        )
        self._give_up(dropped)
        parts = self._queue.take(size, self._max_batch_size)
        if not parts:
            return None
        images = sum(part.size for part in parts)
        batch = Batch(tuple(parts), now_s, self._latency.mean_s(images))
        instance.batch = batch
        instance.started_at_s = now_s
        instance.free_at_s = now_s + batch.predicted_s
        if len(self._queue):
            self._changed.notify()
        return batch

    def _give_up(self, requests: list[InferenceRequest]) -> None:
        if requests:
            self._post(self._answer_late, requests)

    def _answer_late(self, requests: list[InferenceRequest]) -> None:
        for request in requests:
            error = DeadlineExceededError("the deadline passed while the request waited")
            if self._answers.fail(request, error):
                self._observer.request_refused(Outcome.DEADLINE)

    def _finish(self, instance: ModelInstance, batch: Batch, result: BatchResult) -> None:
        now_s = self._clock()
        with self._changed:
            instance.started_at_s = instance.batch = None
            instance.free_at_s = self._ran_at_s = now_s
            if len(result.pieces) == 1 and isinstance(result.pieces[0].result, Outputs):
                size = batch.size + result.padded_images
                self._latency.observe(size, now_s - batch.sealed_at_s)
            if result.largest_run is not None:
                self._max_batch_size = min(self._max_batch_size, result.largest_run)
        # One wake-up of the event loop per batch, however many requests it held.
        self._post(self._deliver, batch, result, now_s)

    def _deliver(self, batch: Batch, result: BatchResult, now_s: float) -> None:
        self._loop_lag.observe(self._clock() - now_s)
        for piece in result.pieces:
            if isinstance(piece.result, Outputs):
                self._answer(batch, piece.parts, piece.result, result.padded_images, now_s)
            else:
                self._fail(piece.parts[0].request, piece.result)
        errors = [piece.result for piece in result.pieces if isinstance(piece.result, Exception)]
        if errors:
            self._observer.batch_failed(errors[0])
        if result.largest_run is not None:
            logger.warning("device memory did not suffice", max_batch_size=self._max_batch_size)

    def _answer(
        self,
        batch: Batch,
        parts: tuple[Part, ...],
        outputs: Outputs,
        padded_images: int,
        now_s: float,
    ) -> None:
        end = answered = wasted = 0
        for part in parts:
            start, end = end, end + part.size
            wasted += part.size if part.request.future.done() else 0
            if self._answers.give(part, outputs.rows(start, end), batch, now_s):
                answered += 1
        self._observer.batch_finished(
            BatchReport(
                size=end,
                padded_images=padded_images,
                wasted_images=wasted,
                outputs=outputs,
                queue_s=tuple(batch.sealed_at_s - part.request.enqueued_at_s for part in parts),
                answered=answered,
                inference_s=now_s - batch.sealed_at_s,
                predicted_s=batch.predicted_s,
            )
        )

    def _fail(self, request: InferenceRequest, error: Exception) -> None:
        failure = InferenceError("the model failed on this request")
        failure.__cause__ = error
        with self._changed:
            self._queue.remove(request)
        self._answers.fail(request, failure)

    def _instance_ended(self) -> None:
        self._running -= 1
        self._end_when_done()

    def _end_when_done(self) -> None:
        if not self._accepting and self._running <= len(self._hung()):
            self._ended.set()

    def _watch(self) -> None:
        """Looks for a run that takes too long, every now and then."""
        delay_s = self._limits.hang_timeout_s / _WATCHES
        self._watchdog = self._loop.call_later(delay_s, self._watch)
        self._check_instances()

    def _check_instances(self) -> None:
        hung = self._hung()
        if bool(hung) is self._healthy:
            self._healthy = not hung
            if hung:
                logger.error("a run on the device hangs", limit_s=self._limits.hang_timeout_s)
            else:
                logger.info("the run on the device came back")
            self._on_health(self._healthy)
        if hung:
            self._abandon(hung)

    def _hung(self) -> list[ModelInstance]:
        since_s = self._clock() - self._limits.hang_timeout_s
        return [
            instance
            for instance in self._instances
            if (started_at_s := instance.started_at_s) is not None and started_at_s < since_s
        ]

    def _abandon(self, hung: list[ModelInstance]) -> None:
        """Answers whoever waits for a device that hangs."""
        with self._changed:
            requests = self._queue.pop_all()
        for instance in hung:
            if batch := instance.batch:
                requests += [part.request for part in batch.parts]
        for request in requests:
            if self._answers.fail(request, UnavailableError("the model's device hangs")):
                self._observer.request_refused(Outcome.UNAVAILABLE)
        self._end_when_done()

    def _post(self, callback: Callable[..., None], *arguments: object) -> None:
        """Calls back on the event loop."""
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            # The loop is closed: this run hung, and nobody waited for it any more.
            logger.warning("a run came back after the batcher was drained")
