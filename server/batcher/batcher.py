"""Dynamic batching: requests that wait together run together.

There is no timer under load. Each model instance is a thread that, whenever it is free, takes what
is queued, up to the size that pays for so long a queue: the device never waits while a request
waits, and batches grow by themselves when it falls behind. A `max_queue_delay_s` above zero lets a
free instance wait for a fuller batch, counted from the oldest request.
"""

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Sequence

import structlog

from server.batcher.admission import Admission, Refusal
from server.batcher.delivery import Delivery
from server.batcher.dispatcher import Dispatcher
from server.batcher.forecast import Forecast
from server.batcher.instance import BatchResult, ModelInstance, Runner
from server.batcher.latency import LatencyModel
from server.batcher.limits import BatcherSnapshot, BatchingLimits
from server.batcher.observer import BatchObserver
from server.batcher.queue import RequestQueue
from server.batcher.watchdog import Watchdog
from server.errors import DeadlineExceededError, UnavailableError
from server.requests import Batch, Images, InferenceRequest, Outcome, Outputs, Prediction

logger = structlog.get_logger()

Clock = Callable[[], float]
Tap = Callable[[Images, Prediction], None]


class DynamicBatcher:
    """Joins requests into batches and runs them on the model's instances.

    Example:
        batcher = DynamicBatcher([Runner(backend.run)], (32, 32, 3), limits, observer)
        batcher.start()
        prediction = await batcher.infer(images)
        await batcher.drain()

    `infer`, `start` and `drain` belong to one event loop; runners are called on instance threads.

    Args:
        runners: The model on each of its devices; the instances are spread over them, and all of
            them share one queue.
        sample_shape: `(H, W, 3)`.
        limits: What may be held.
        observer: Is told what happened.
        latency: Predicts how long a batch takes on each of these devices; without one nothing is
            refused for its deadline before that has passed.
        clock: Monotonic seconds.

    Attributes:
        tap: Is shown each request that was answered, with its answer; None, which is free of cost,
            but while a newer version is tried on what this one answers.
    """

    def __init__(
        self,
        runners: Sequence[Runner],
        sample_shape: tuple[int, int, int],
        limits: BatchingLimits,
        observer: BatchObserver,
        clock: Clock = time.monotonic,
        *,
        latency: LatencyModel | None = None,
    ) -> None:
        self.tap: Tap | None = None
        self._limits = limits
        self._observer = observer
        self._clock = clock
        self._forecast = Forecast(latency or LatencyModel())
        padded = self._forecast.latency.padded
        buffer_shape = (padded(limits.max_batch_size), *sample_shape)
        self._instances = [
            ModelInstance(number, device, runner, buffer_shape, padded)
            for number, (device, runner) in zip(
                range(limits.instances), itertools.cycle(enumerate(runners)), strict=False
            )
        ]
        self._running = 0
        self._accepting = False
        self._queue = RequestQueue(limits)
        self._dispatcher = Dispatcher(self._queue, self._instances, self._forecast, limits)
        self._admission = Admission(self._queue, self._dispatcher, limits)
        # Guards all of the above that instances use too; waited on by free instances.
        self._changed = threading.Condition()
        self._delivery = Delivery(observer, self._withdraw)
        self._watchdog = Watchdog(
            self._instances, limits.hang_timeout_s, self._clock, self._abandon
        )
        self._ended: asyncio.Event
        self._loop: asyncio.AbstractEventLoop

    @property
    def limits(self) -> BatchingLimits:
        """The limits it was made with."""
        return self._limits

    @property
    def healthy(self) -> bool:
        """False while a run on the device hangs; requests are refused meanwhile."""
        return self._watchdog.healthy

    def snapshot(self) -> BatcherSnapshot:
        """Returns what it holds at this moment; may be called from any thread."""
        return BatcherSnapshot(
            queued_images=self._queue.images,
            queued_bytes=self._queue.bytes,
            busy_instances=sum(not instance.is_idle for instance in self._instances),
            max_batch_size=self._dispatcher.max_batch_size,
            healthy=self._watchdog.healthy,
            batch_latency_s=self._forecast.latency.table_s,
        )

    def start(self, on_health: Callable[[bool], None] = lambda healthy: None) -> None:
        """Starts the instances; call it on the event loop that will call `infer`.

        Args:
            on_health: Is told when a run on the device hangs, and when it came back after all.
        """
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._accepting = True
        self._forecast.ran(self._clock())
        self._running = len(self._instances)
        for instance in self._instances:
            instance.start(self._serve)
        self._watchdog.start(on_health)

    def stop_delaying(self) -> None:
        """From now on runs what waits without a delay: nobody will come to fill the batch."""
        with self._changed:
            self._dispatcher.delay_s = 0.0
            self._changed.notify_all()

    async def drain(self) -> None:
        """Refuses new requests, answers those accepted and ends the instances.

        An instance whose run hangs is left behind; its requests were answered by the watchdog.
        """
        self.stop_delaying()
        with self._changed:
            self._accepting = False
            self._changed.notify_all()
        self._watchdog.look()
        self._end_when_done()
        await self._ended.wait()
        self._watchdog.stop()

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
            self._delivery.forget(request)
            raise
        finally:
            # It knows an error that knows this frame; see `_enqueue`.
            del request
        if self.tap is not None:
            self.tap(images, prediction)
        return prediction

    def _enqueue(self, request: InferenceRequest) -> None:
        with self._changed:
            refusal = self._not_serving() or self._admission.refusal(request)
            if refusal is None:
                self._queue.add(request)
                self._changed.notify()
                return
        outcome, error = refusal
        self._observer.request_refused(outcome)
        try:
            raise error
        finally:
            # The error knows this frame; a frame that knows the error as well keeps the request
            # until the garbage collector comes.
            del error, refusal

    def _not_serving(self) -> Refusal | None:
        if not self._accepting:
            return Outcome.UNAVAILABLE, UnavailableError("the model is being shut down")
        if not self._watchdog.healthy:
            return Outcome.UNAVAILABLE, _hang_error()
        return None

    def _withdraw(self, request: InferenceRequest) -> None:
        with self._changed:
            self._queue.remove(request)

    def _serve(self, instance: ModelInstance) -> None:
        """What an instance's thread does."""
        while (batch := self._next_batch(instance)) is not None:
            self._finish(instance, batch, instance.run(batch))
        self._post(self._instance_ended)

    def _next_batch(self, instance: ModelInstance) -> Batch | None:
        """Blocks until there is a batch to run; None when draining is done."""
        dispatcher = self._dispatcher
        with self._changed:
            while True:
                now_s = self._clock()
                self._give_up(dispatcher.pop_late(now_s))
                wait_s = dispatcher.wait_s(instance, now_s)
                if wait_s is not None and self._accepting and dispatcher.leaves_it(instance):
                    # Whoever waits longest wakes, and so on until it is the one that is meant.
                    self._changed.notify()
                    wait_s = None
                if wait_s == 0 or (wait_s and not self._accepting):
                    batch, dropped = dispatcher.seal(instance, now_s)
                    self._give_up(dropped)
                    if batch and len(self._queue):
                        self._changed.notify()
                    if batch:
                        return batch
                    continue
                if not len(self._queue) and not self._accepting:
                    return None
                self._changed.wait(wait_s)

    def _give_up(self, requests: list[InferenceRequest]) -> None:
        if requests:
            self._post(self._delivery.refuse, requests, Outcome.DEADLINE, _late_error)

    def _finish(self, instance: ModelInstance, batch: Batch, result: BatchResult) -> None:
        now_s = self._clock()
        with self._changed:
            instance.end(now_s)
            self._forecast.ran(now_s)
            if len(result.pieces) == 1 and isinstance(result.pieces[0].result, Outputs):
                size = batch.size + result.padded_images
                self._forecast.latency.observe(size, now_s - batch.sealed_at_s, instance.device)
            if result.largest_run is not None:
                self._dispatcher.shrink_batches(result.largest_run)
        # One wake-up of the event loop per batch, however many requests it held.
        self._post(self._deliver, batch, result, now_s)

    def _deliver(self, batch: Batch, result: BatchResult, now_s: float) -> None:
        self._delivery.deliver(batch, result, now_s)
        # After those that were answered with this batch: they go on before it is their turn.
        self._loop.call_soon(self._observe_lag, now_s)

    def _observe_lag(self, since_s: float) -> None:
        with self._changed:
            self._forecast.observe_lag(self._clock() - since_s)

    def _instance_ended(self) -> None:
        self._running -= 1
        self._end_when_done()

    def _end_when_done(self) -> None:
        if not self._accepting and self._running <= len(self._watchdog.hung()):
            self._ended.set()

    def _abandon(self, hung: list[ModelInstance]) -> None:
        """Answers whoever waits for a device that hangs."""
        with self._changed:
            requests = self._queue.pop_all()
        for instance in hung:
            if batch := instance.batch:
                requests += [part.request for part in batch.parts]
        self._delivery.refuse(requests, Outcome.UNAVAILABLE, _hang_error)
        self._end_when_done()

    def _post(self, callback: Callable[..., None], *arguments: object) -> None:
        """Calls back on the event loop."""
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            # The loop is closed: this run hung, and nobody waited for it any more.
            logger.warning("a run came back after the batcher was drained")


def _late_error() -> DeadlineExceededError:
    return DeadlineExceededError("the deadline passed while the request waited")


def _hang_error() -> UnavailableError:
    return UnavailableError("the model's device hangs")
