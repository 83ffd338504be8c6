"""The batcher: queued requests run together.

There is no timer under load. Whenever a worker is idle, it takes the queued requests, up to the
batch size that the length of the queue justifies: the device never idles while a request waits, and
batches grow when the device falls behind. With a `max_queue_delay_s` above zero an idle worker
waits for a fuller batch, counted from the oldest request.
"""

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import structlog

from convoy.server.batching.batch import Batch, InferenceRequest
from convoy.server.batching.delivery import BatchObserver, Delivery
from convoy.server.batching.latency import LatencyModel
from convoy.server.batching.recovery import DeviceHealth, Health
from convoy.server.batching.request_queue import BatchingLimits, RequestQueue
from convoy.server.batching.scheduler import Rejection, Scheduler
from convoy.server.batching.sizes import BatchSizes
from convoy.server.batching.worker import BatchResult, InstanceThread, Runner, Worker, text_of
from convoy.server.errors import DeadlineExceededError, UnavailableError
from convoy.server.requests import Images, Outcome, Outputs, Prediction

logger = structlog.get_logger()

Clock = Callable[[], float]
Mirror = Callable[[Images, Prediction], None]
OnHealth = Callable[[Health], None]
OnBatchSize = Callable[[int], None]
OnCorrection = Callable[[int, int], None]

# How often, within the time that a run may take, the batcher checks for hung runs.
_HANG_CHECKS = 4


@dataclass(frozen=True, slots=True)
class BatcherSnapshot:
    """The state of a batcher at a moment.

    Attributes:
        queued_images: Images in the queue.
        queued_bytes: Bytes of their pixels.
        busy_instances: Workers that run a batch.
        preferred_batch_size: Images that a batch is filled up to while little is queued.
        max_batch_size: The same while much is queued; falls for a while when a device runs out of
            memory.
        health: Whether the model works.
        batch_latency_s: The expected duration of a run for each measured batch size.
    """

    queued_images: int
    queued_bytes: int
    busy_instances: int
    preferred_batch_size: int
    max_batch_size: int
    health: Health
    batch_latency_s: dict[int, float]


class _Probe:
    """A run without requests, to find out whether the model works."""


_PROBE = _Probe()


class DynamicBatcher:
    """Joins requests into batches and runs them on the model's workers.

    Example:
        batcher = DynamicBatcher([Runner(backend.run)], (32, 32, 3), limits, observer)
        batcher.start()
        prediction = await batcher.infer(images)
        await batcher.drain()

    `infer`, `start` and `drain` belong to one event loop; workers call the runners on threads.

    Args:
        runners: The model on each of its devices; the workers are spread over them, and all of them
            share one queue.
        sample_shape: `(H, W, 3)`.
        limits: The limits of the queue and the batches.
        observer: Receives reports on batches and requests.
        latency: Predicts the duration of a batch on each of these devices; without it no request is
            rejected for its deadline before that has passed.
        sizes: The sizes that batches are filled up to, which runs in service correct; without them
            always those of the limits.
        clock: Monotonic seconds.
        threads: The threads that warmed the model up, one for each instance; the first runs the
            first runner, and so on around. By default new ones.
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
        sizes: BatchSizes | None = None,
        threads: Sequence[InstanceThread] = (),
    ) -> None:
        self._limits = limits
        self._observer = observer
        self._clock = clock
        latency = latency or LatencyModel()
        buffer_shape = (latency.padded(limits.max_batch_size), *sample_shape)
        self._workers = [
            Worker(number, device, runner, buffer_shape, latency.padded, thread=thread)
            for number, (device, runner), thread in zip(
                range(limits.instances),
                itertools.cycle(enumerate(runners)),
                itertools.chain(threads, itertools.repeat(None)),
                strict=False,
            )
        ]
        self._running = 0
        self._accepting = False
        self._health = Health.HEALTHY
        self._queue = RequestQueue(limits)
        largest = limits.max_batch_size
        self._sizes = sizes or BatchSizes(limits.preferred_batch_size or largest, largest)
        self._scheduler = Scheduler(self._queue, self._workers, latency, limits, self._sizes)
        self._devices = [DeviceHealth() for _ in runners]
        self._max_batch_size = limits.max_batch_size
        # Guards the queue, the scheduler, and the state of workers and devices; idle workers wait
        # on it, and those of a device that fails every run on the other.
        lock = threading.RLock()
        self._changed = threading.Condition(lock)
        self._recovery = threading.Condition(lock)
        self._delivery = Delivery(observer)
        self._mirror: Mirror | None = None
        self._on_health: OnHealth | None = None
        self._on_batch_size: OnBatchSize | None = None
        self._on_correction: OnCorrection | None = None
        self._hang_check: asyncio.TimerHandle | None = None
        self._ended: asyncio.Event
        self._loop: asyncio.AbstractEventLoop

    @property
    def limits(self) -> BatchingLimits:
        """The limits of the queue and the batches."""
        return self._limits

    @property
    def health(self) -> Health:
        """Whether the model works; unless it is healthy, requests are rejected."""
        return self._health

    @property
    def fault(self) -> str:
        """Why the model is not healthy; empty while it is."""
        if self._health is Health.HUNG:
            return f"a run on the device takes more than {self._limits.hang_timeout_s:g} s"
        if self._health is Health.FAILING:
            return f"every run fails: {self._devices[0].error}"
        return ""

    def snapshot(self) -> BatcherSnapshot:
        """Return the state of this moment; any thread may call it."""
        return BatcherSnapshot(
            queued_images=self._queue.images,
            queued_bytes=self._queue.bytes,
            busy_instances=sum(not worker.is_idle for worker in self._workers),
            preferred_batch_size=self._sizes.preferred.size,
            max_batch_size=self._scheduler.largest_batch(self._clock()),
            health=self._health,
            batch_latency_s=self._scheduler.latency.table_s,
        )

    @contextmanager
    def mirror_to(self, mirror: Mirror) -> Iterator[None]:
        """Call `mirror` with the images and the prediction of each request answered in the block.

        Only one mirror is active at a time.
        """
        self._mirror = mirror
        try:
            yield
        finally:
            self._mirror = None

    def start(
        self,
        on_health: OnHealth | None = None,
        on_batch_size: OnBatchSize | None = None,
        on_correction: OnCorrection | None = None,
    ) -> None:
        """Start the workers; call it on the event loop that will call `infer`.

        Args:
            on_health: Called when the model's health changes.
            on_batch_size: Called with the largest size that the devices have memory for, when it
                changes.
            on_correction: Called with the preferred and the largest batch size when runs in service
                changed one of them.
        """
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._accepting = True
        self._scheduler.started(self._clock())
        self._running = len(self._workers)
        for worker in self._workers:
            worker.start(self._serve)
        self._on_health, self._on_batch_size = on_health, on_batch_size
        self._on_correction = on_correction
        self._check_health_later()

    def stop_delaying(self) -> None:
        """From now on run queued requests without a delay: no others will arrive."""
        with self._changed:
            self._scheduler.delay_s = 0.0
            self._changed.notify_all()

    async def drain(self) -> None:
        """Reject new requests, answer the accepted ones and end the workers.

        A worker whose run hangs is abandoned; its requests have been answered with an error.
        """
        self.stop_delaying()
        with self._changed:
            self._accepting = False
            self._changed.notify_all()
            self._recovery.notify_all()
        self._check_health()
        self._end_when_done()
        await self._ended.wait()
        if self._hang_check:
            self._hang_check.cancel()
        # They refer back to this batcher, which must not wait for the garbage collector.
        self._hang_check = self._on_health = self._on_batch_size = self._on_correction = None

    async def infer(
        self,
        images: Images,
        deadline_s: float = float("inf"),
        priority: int = 0,
        client: str = "",
    ) -> Prediction:
        """Run images in the next batch that has room for them, or in several.

        Cancelling the call removes the request from the queue and affects no other in its batch.

        Args:
            images: `[N, H, W, 3]` uint8, of the model's size.
            deadline_s: On the batcher's clock; a request that would be late does not run.
            priority: 1 is the highest, 0 the default level.
            client: Identifies the caller, whose share of the queue is limited.

        Raises:
            InvalidRequestError: There are no images, or more than a request may hold.
            OverloadedError: The queue has no room for them.
            DeadlineExceededError: The deadline cannot be met, or passed while they waited.
            UnavailableError: The batcher is not running, or its device is not healthy.
            InferenceError: The model failed on them.
        """
        request = InferenceRequest(
            images, self._loop.create_future(), self._clock(), deadline_s, priority, client
        )
        self._enqueue(request)
        try:
            prediction = await request.future
        except asyncio.CancelledError:
            self._remove(request)
            self._delivery.cancel(request)
            raise
        finally:
            # It refers to an error that refers to this frame; see `_enqueue`.
            del request
        if self._mirror is not None:
            self._mirror(images, prediction)
        return prediction

    def _enqueue(self, request: InferenceRequest) -> None:
        with self._changed:
            rejection: Rejection | None
            if self._accepting and self._health is Health.HEALTHY:
                rejection = self._scheduler.reject(request)
            else:
                rejection = Outcome.UNAVAILABLE, self._unavailable_error()
            if rejection is None:
                self._queue.add(request)
                self._changed.notify()
                return
        outcome, error = rejection
        self._observer.request_rejected(outcome)
        try:
            raise error
        finally:
            # The error refers to this frame; if the frame referred to the error as well, the
            # request would wait for the garbage collector.
            del error, rejection

    def _unavailable_error(self) -> UnavailableError:
        if not self._accepting:
            return UnavailableError("the model is shutting down")
        return self._health_error()

    def _health_error(self) -> UnavailableError:
        what = "the model's device hangs"
        if self._health is Health.FAILING:
            what = "the model fails every run; the server retries it in the background"
        return UnavailableError(what)

    def _remove(self, request: InferenceRequest) -> None:
        with self._changed:
            self._queue.remove(request)

    # On the threads of the workers

    def _serve(self, worker: Worker) -> None:
        while self._run_next_batch(worker):
            pass
        self._post(self._worker_ended)

    def _run_next_batch(self, worker: Worker) -> bool:
        """Wait for a batch, or for the time of a probe, and run it.

        Returns:
            False when the queue is drained.
        """
        work = self._next_work(worker)
        if work is None:
            return False
        if isinstance(work, Batch):
            self._finish(worker, work, worker.run(work))
        else:
            self._finish_probe(worker, worker.probe())
        return True

    def _next_work(self, worker: Worker) -> Batch | _Probe | None:
        """Wait until there is a batch or a probe to run; None when the queue is drained."""
        device = self._devices[worker.device]
        with self._changed:
            while True:
                now_s = self._clock()
                if device.probe_at_s <= now_s and self._accepting:
                    device.begin_probe()
                    self._scheduler.begin_probe(worker, now_s)
                    return _PROBE
                if device.failing:
                    if not self._accepting:
                        return None
                    self._wait_for_probe(device, now_s)
                    continue
                decision = self._scheduler.next_batch(worker, now_s, draining=not self._accepting)
                if decision.dropped:
                    self._post(
                        self._delivery.reject, decision.dropped, Outcome.DEADLINE, _late_error
                    )
                if decision.batch:
                    if self._queue.images:
                        self._changed.notify()
                    return decision.batch
                if not self._accepting and not self._queue.images:
                    return None
                if decision.leave_to_other:
                    # Wakes the worker that waited longest; it may wake the next one.
                    self._changed.notify()
                wait_s = decision.wait_s
                # It must not keep the dropped requests during the wait.
                del decision
                if wait_s != 0.0:
                    self._changed.wait(wait_s)

    def _wait_for_probe(self, device: DeviceHealth, now_s: float) -> None:
        if self._queue.images:
            # This worker may have been woken instead of a worker of another device.
            self._changed.notify()
        wait_s = device.probe_at_s - now_s
        self._recovery.wait(None if wait_s == float("inf") else wait_s)

    def _finish(self, worker: Worker, batch: Batch, result: BatchResult) -> None:
        now_s = self._clock()
        succeeded = len(result.runs) == 1 and isinstance(result.runs[0].result, Outputs)
        device = self._devices[worker.device]
        with self._changed:
            corrected = self._scheduler.finished(
                worker, now_s, batch.size + result.padded_images if succeeded else 0
            )
            if corrected:
                self._post(self._corrected, self._sizes.preferred.size, self._sizes.largest.size)
            if result.largest_run is not None:
                self._scheduler.shrink_batches(result.largest_run, now_s)
            if not succeeded or device.error:
                _note_runs(device, result, now_s)
            if self._scheduler.memory_batch_size != self._max_batch_size:
                self._max_batch_size = self._scheduler.memory_batch_size
                self._post(self._batch_size_changed, self._max_batch_size)
        # One wake-up of the event loop per batch, however many requests it holds.
        self._post(self._deliver, batch, result, now_s)

    def _finish_probe(self, worker: Worker, error: str) -> None:
        now_s = self._clock()
        with self._changed:
            self._devices[worker.device].probed(error, now_s)
            self._scheduler.finished(worker, now_s, 0)
            self._scheduler.use_devices({n for n, each in enumerate(self._devices) if each.failing})
            # Workers of a device that failed or recovered now wait on another condition.
            self._changed.notify_all()
            self._recovery.notify_all()
        self._post(self._check_health)

    def _post(self, callback: Callable[..., None], *arguments: object) -> None:
        """Call back on the event loop."""
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            # The loop is closed: this run hung, and nobody waits for it.
            logger.warning("a run ended after the batcher was drained")

    # On the event loop

    def _deliver(self, batch: Batch, result: BatchResult, now_s: float) -> None:
        for failed in self._delivery.deliver(batch, result, now_s):
            self._remove(failed)
        # After the callers of this batch have continued.
        self._loop.call_soon(self._observe_lag, now_s)

    def _observe_lag(self, since_s: float) -> None:
        with self._changed:
            self._scheduler.observe_lag(self._clock() - since_s)

    def _worker_ended(self) -> None:
        self._running -= 1
        self._end_when_done()

    def _end_when_done(self) -> None:
        if not self._accepting and self._running <= len(self._hung_workers()):
            self._ended.set()

    def _hung_workers(self) -> list[Worker]:
        since_s = self._clock() - self._limits.hang_timeout_s
        return [worker for worker in self._workers if worker.hangs(since_s)]

    def _batch_size_changed(self, size: int) -> None:
        if self._on_batch_size:
            self._on_batch_size(size)

    def _corrected(self, preferred: int, largest: int) -> None:
        if self._on_correction:
            self._on_correction(preferred, largest)

    def _check_health_later(self) -> None:
        delay_s = self._limits.hang_timeout_s / _HANG_CHECKS
        self._hang_check = self._loop.call_later(delay_s, self._check_health_later)
        self._check_health()

    def _check_health(self) -> None:
        """Update the model's health; if it fails, answer the waiting requests with an error."""
        hung = self._hung_workers()
        health = Health.HEALTHY
        if hung:
            health = Health.HUNG
        elif all(device.failing for device in self._devices):
            health = Health.FAILING
        if health is not self._health:
            self._health = health
            if self._on_health:
                self._on_health(health)
        if health is Health.HEALTHY:
            return
        with self._changed:
            requests = self._queue.pop_all()
        for worker in hung:
            if batch := worker.batch:
                requests += [each.request for each in batch.slices]
        self._delivery.reject(requests, Outcome.UNAVAILABLE, self._health_error)
        self._end_when_done()


def _late_error() -> DeadlineExceededError:
    return DeadlineExceededError("the deadline passed while the request waited")


def _note_runs(device: DeviceHealth, result: BatchResult, now_s: float) -> None:
    errors = [run.result for run in result.runs if isinstance(run.result, Exception)]
    if len(errors) == len(result.runs):
        device.failed(text_of(errors[-1]), now_s)
    else:
        device.succeeded()
