"""The scheduler: which requests may wait, and which of them an idle worker runs next, and when.

The scheme is admission by predicted finish, earliest deadline first and the sliding-window drop of
"Nexus" (H. Shen et al., SOSP 2019, section 6.3), with the deferral of "Symphony" (L. Chen et al.,
arXiv 2308.07470) where several workers gain by it.
"""

import bisect
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from convoy.server.batching.batch import Batch, InferenceRequest
from convoy.server.batching.latency import LatencyModel, RunningTail
from convoy.server.batching.recovery import BatchCeiling
from convoy.server.batching.request_queue import BatchingLimits, RequestQueue
from convoy.server.batching.sizes import BatchSizes
from convoy.server.batching.worker import Worker
from convoy.server.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    RequestError,
)
from convoy.server.requests import Outcome

# The share of a request's time that is reserved for the way of the reply to the caller.
_REPLY_SHARE = 0.1
# After this time without a run, an idle device runs a request whatever the prediction says: a
# prediction may prevent every run, and without a run it would never improve.
_STALE_S = 0.25
# A request is dropped when the batch that it needs would have less than this share of the
# throughput of the batch without it.
_LEAST_THROUGHPUT = 0.9
# Batches are of the largest size while so many of them per worker are queued.
_DEEP_QUEUE_BATCHES = 2
# A batch may wait to grow while one image more costs less than this share of a batch of one.
_LARGEST_MARGINAL_COST = 0.5
_NO_DEADLINE = float("inf")

Rejection = tuple[Outcome, RequestError]


@dataclass(frozen=True, slots=True)
class Decision:
    """What an idle worker does next.

    Attributes:
        batch: The batch to run; None to wait.
        dropped: Requests that were removed from the queue, since they cannot be answered in time.
        wait_s: How long to wait at most; None for until something changes.
        leave_to_other: Whether to wake another idle worker, whose device has less to do.
    """

    batch: Batch | None = None
    dropped: Sequence[InferenceRequest] = ()
    wait_s: float | None = None
    leave_to_other: bool = False


_WAIT = Decision()


class Scheduler:
    """Makes the decisions of a batcher. The batcher's lock guards it, the queue and the workers.

    It predicts in two ways. A request is admitted if it finishes in time by a bound that nearly no
    run exceeds (tail), and it is run if it finishes in time as expected (mean). Dropping every
    request above the bound would leave the device idle after a stall, and only a run shows that the
    stall is over.

    Args:
        queue: The queued requests.
        workers: The workers that share the queue.
        latency: Predicts the duration of runs.
        limits: The limits of the batcher.
        sizes: The sizes that batches are filled up to.

    Attributes:
        memory_batch_size: The largest batch that may be formed; it falls for a while when a batch
            does not fit into a device's memory.
        max_batch_size: The largest batch that is formed, but for tries of other sizes.
        delay_s: How long an idle worker waits for a batch to fill.
        latency: What batches of each size take.
    """

    def __init__(
        self,
        queue: RequestQueue,
        workers: Sequence[Worker],
        latency: LatencyModel,
        limits: BatchingLimits,
        sizes: BatchSizes,
    ) -> None:
        self._sizes = sizes
        self.memory_batch_size = limits.max_batch_size
        self.max_batch_size = min(limits.max_batch_size, sizes.largest.size)
        self.delay_s = limits.max_queue_delay_s
        self.latency = latency
        self._max_request_images = limits.max_request_images
        self._queue = queue
        self._all_workers = self._workers = workers
        self._ceiling = BatchCeiling(limits.max_batch_size)
        self._grows_at_s = _NO_DEADLINE
        self._has_several_devices = len({worker.device for worker in workers}) > 1
        self._busy = 0
        self._lag = RunningTail()
        self._ran_at_s = float("-inf")

    # Admission

    def reject(self, request: InferenceRequest) -> Rejection | None:
        """Return why a request may not wait; None if it may."""
        if not 0 < request.size <= self._max_request_images:
            message = f"batch: expected 1 to {self._max_request_images} images, got {request.size}"
            return Outcome.INVALID, InvalidRequestError(message)
        if full := self._queue.rejection(request):
            return Outcome.FULL, OverloadedError(full, self._retry_after_s(request))
        if request.deadline_s != _NO_DEADLINE and not self._meets_deadline(request):
            message = "the deadline is before the answer could be there"
            return Outcome.DEADLINE, DeadlineExceededError(message)
        return None

    def _meets_deadline(self, request: InferenceRequest) -> bool:
        now_s = request.enqueued_at_s
        # An idle worker loses nothing by a request that is merely expected to be in time.
        runs_at_once = not self._queue.images and self._busy < len(self._workers)
        if runs_at_once and self._is_stale(now_s):
            return request.deadline_s > now_s
        finish_s = self._predicted_finish_s(request, by_tail=not runs_at_once)
        reply_s = 0.0 if runs_at_once else _REPLY_SHARE * (request.deadline_s - now_s)
        return finish_s + reply_s <= request.deadline_s

    def _predicted_finish_s(self, request: InferenceRequest, by_tail: bool) -> float:
        """Return when a request that arrives now would be answered.

        Args:
            request: The request.
            by_tail: Whether its own batch takes as long as nearly none does.
        """
        now_s, largest = request.enqueued_at_s, self.max_batch_size
        images = self._queue.images_before(request) + request.size
        full_batches = (images - 1) // largest
        # Requests that arrive later fill the batch that a request in a long queue runs in.
        last_size = largest if full_batches else images
        rounds, turn = divmod(full_batches, len(self._workers))
        idle_at_s = sorted([max(now_s, worker.idle_at_s) for worker in self._workers])
        start_s = idle_at_s[turn]
        if rounds:
            start_s += rounds * self.latency.mean_s(largest)
        return start_s + (self._tail_s(last_size) if by_tail else self._mean_s(last_size))

    def _retry_after_s(self, request: InferenceRequest) -> float:
        """Return when the queue is expected to have room for a request."""
        batches = -(-request.size // self.max_batch_size)
        return batches * self.latency.mean_s(self.max_batch_size) / len(self._workers)

    # Dispatch

    def next_batch(self, worker: Worker, now_s: float, draining: bool) -> Decision:
        """Decide what an idle worker does next.

        Args:
            worker: The worker; a batch that is returned counts as started on it.
            now_s: The time.
            draining: Whether no request will arrive any more, so that waiting for one is useless.
        """
        queue = self._queue
        if now_s >= self._grows_at_s:
            self._resize_batches(now_s)
        dropped = self._pop_late(now_s)
        if not queue.images:
            return Decision(None, dropped) if dropped else _WAIT
        if not draining:
            if self._has_several_devices and self._leaves_to_other(worker):
                return Decision(None, dropped, leave_to_other=True)
            if wait_s := self._wait_s(worker, now_s):
                return Decision(None, dropped, wait_s)
        size, hopeless = self._next_size(now_s)
        dropped += hopeless
        slices = queue.take(size, self.max_batch_size)
        if not slices:
            return Decision(None, dropped, 0.0) if queue.images else Decision(None, dropped)
        images = slices[0].size if len(slices) == 1 else sum(each.size for each in slices)
        predicted_s = self.latency.mean_on_s(worker.device, images)
        self._busy += 1
        under_load = self._busy == len(self._workers)
        batch = Batch(tuple(slices), images, now_s, predicted_s, under_load)
        worker.begin(batch)
        return Decision(batch, dropped)

    def started(self, now_s: float) -> None:
        """Note that the workers start."""
        self._ran_at_s = now_s

    def finished(self, worker: Worker, now_s: float, run_images: int) -> bool:
        """Note that a worker's run ended, and learn from it.

        Args:
            worker: The worker; it is idle from now on.
            now_s: The time.
            run_images: Rows of the run, padding included; 0 for a run that failed or was split.

        Returns:
            Whether the sizes that batches are filled up to changed.
        """
        changed = False
        if run_images and worker.batch:
            run_s = now_s - worker.batch.sealed_at_s
            self.latency.observe(run_images, run_s, worker.device)
            if worker.batch.under_load and self._sizes.ran(run_images, run_s):
                changed = True
                self._resize_batches(now_s)
        worker.end(now_s)
        self._busy -= 1
        self._ran_at_s = now_s
        return changed

    def observe_lag(self, seconds: float) -> None:
        """Record the time from the end of a run until its requests were answered."""
        self._lag.observe(seconds)

    def begin_probe(self, worker: Worker, now_s: float) -> None:
        """Note that a worker probes its device."""
        worker.begin_probe(now_s)
        self._busy += 1

    def use_devices(self, failing: Collection[int]) -> None:
        """Give batches to the workers of all devices but these."""
        usable = [worker for worker in self._all_workers if worker.device not in failing]
        # Without any, no request is accepted.
        self._workers = usable or self._all_workers

    def shrink_batches(self, largest: int, now_s: float) -> None:
        """Form no larger batches for a while."""
        self._ceiling.lower(largest, now_s)
        self._resize_batches(now_s)

    def largest_batch(self, now_s: float) -> int:
        """Return the size of the largest batch that may be formed now; any thread may call it."""
        return min(self._ceiling.size(now_s), self._sizes.largest.size)

    def _resize_batches(self, now_s: float) -> None:
        self.memory_batch_size = self._ceiling.size(now_s)
        self.max_batch_size = min(self.memory_batch_size, self._sizes.largest.size)
        self._grows_at_s = self._ceiling.grows_at_s(now_s)

    def _pop_late(self, now_s: float) -> list[InferenceRequest]:
        """Remove the requests that would be late even in a batch of their own."""
        if self._queue.earliest_deadline_s == _NO_DEADLINE:
            return []
        needed_s = 0.0 if self._is_stale(now_s) else self._mean_s(1)
        return self._queue.pop_late(now_s + needed_s)

    def _wait_s(self, worker: Worker, now_s: float) -> float:
        """Return how long to wait for a larger batch."""
        queue = self._queue
        full_size = self._fill_size()
        if queue.images >= full_size:
            return 0.0
        if self.delay_s:
            return max(0.0, queue.oldest_at_s + self.delay_s - now_s)
        if self._busy < len(self._workers) - 1 or len(self._workers) == 1:
            return 0.0
        return self._deferral_s(worker, now_s, full_size)

    def _deferral_s(self, worker: Worker, now_s: float, full_size: int) -> float:
        """Return how long the only idle worker leaves a small batch to grow.

        It waits until another worker is idle again or the tightest deadline is close, and only
        where larger batches have a higher throughput: on a CPU, whose time is proportional to the
        batch size, they have not.
        """
        queue, latency, size = self._queue, self.latency, self._queue.images
        deadline_s = min(request.deadline_s for request in queue.window(size))
        if deadline_s == _NO_DEADLINE:
            return 0.0
        marginal_s = latency.mean_s(size + 1) - latency.mean_s(size)
        if marginal_s >= _LARGEST_MARGINAL_COST * latency.mean_s(1):
            return 0.0
        latest_s = deadline_s - latency.tail_s(size + 1)
        next_idle_s = min(other.idle_at_s for other in self._workers if other is not worker)
        return max(0.0, min(latest_s, next_idle_s) - now_s)

    def _leaves_to_other(self, worker: Worker) -> bool:
        """Return whether an idle worker on another device, which has less to do, shall run."""
        running = Counter(each.device for each in self._workers if not each.is_idle)
        return any(
            running[each.device] < running[worker.device] for each in self._workers if each.is_idle
        )

    def _fill_size(self, *, shares: bool = False) -> int:
        """Return up to how many images the next batch is filled.

        A larger batch costs fewer hand-overs, but while it runs, its callers and the event loop
        have nothing to do, and the other workers have only what it left. So it is formed only where
        the queue keeps all of them busy meanwhile.

        Args:
            shares: Whether a batch that would leave too little to the others is smaller, unless it
                tries a size.
        """
        largest, queue = self.max_batch_size, self._queue
        is_deep = queue.images >= _DEEP_QUEUE_BATCHES * len(self._workers) * largest
        chosen = self._sizes.largest if is_deep else self._sizes.preferred
        if chosen.due and self._can_try(chosen.due):
            return chosen.due
        if is_deep:
            return largest
        size = min(largest, max(chosen.size, queue.head.waiting))
        shares = shares and 1 < queue.images < len(self._workers) * size
        return self._shared(size) if shares else size

    def _shared(self, size: int) -> int:
        """Return the part of a worker in what is in flight, if that is less than a size.

        The others finish theirs meanwhile. That helps where time is proportional to the batch size;
        elsewhere the size stays.
        """
        queue, workers = self._queue, self._workers
        running = sum(worker.batch.size for worker in workers if worker.batch)
        part = max(queue.head.waiting, -(-(queue.images + running) // len(workers)))
        if part >= size:
            return size
        saved_s = self.latency.mean_s(size) - self.latency.mean_s(part)
        least_s = _LARGEST_MARGINAL_COST * (size - part) * self.latency.mean_s(1)
        return part if saved_s > least_s else size

    def _can_try(self, size: int) -> bool:
        """Return whether the next batch could be of this size and run under load."""
        queue = self._queue
        return (
            queue.head.waiting <= size <= min(queue.images, self.memory_batch_size)
            and self._busy >= len(self._workers) - 1
        )

    def _next_size(self, now_s: float) -> tuple[int, list[InferenceRequest]]:
        """Decide how many images the next batch holds.

        Returns:
            The size, 0 for none, and the requests that were removed from the queue, since they are
            not expected to be answered in time, or only by a batch so small that the requests
            behind them would be late for it.
        """
        queue = self._queue
        dropped: list[InferenceRequest] = []
        trusts_predictions = not self._is_stale(now_s)
        while queue.images:
            full_size = self._fill_size(shares=True)
            size = min(queue.images, full_size)
            if queue.earliest_deadline_s == _NO_DEADLINE or not trusts_predictions:
                return size, dropped
            window = queue.window(size)
            tightest = min(window, key=_deadline_s)
            needed = sum(other.waiting for other in window[: window.index(tightest) + 1])
            budget_s = tightest.deadline_s - now_s
            if needed > full_size:
                rounds = math.ceil(needed / full_size / len(self._workers))
                if rounds * self._mean_s(full_size) <= budget_s:
                    return size, dropped
            elif fitting := self._fitting_size(budget_s, needed, size):
                return fitting, dropped
            queue.remove(tightest)
            dropped.append(tightest)
        return 0, dropped

    def _fitting_size(self, budget_s: float, needed: int, size: int) -> int:
        """Return the largest batch that is in time by tail or else by mean; 0 if none is worth it.

        Args:
            budget_s: The time that the batch may take.
            needed: The fewest images it must hold.
            size: The most images it may hold.
        """
        throughput = self.latency.throughput
        for predicted_s in (self._tail_s, self._mean_s):
            if predicted_s(size) <= budget_s:
                return size
            fitting = bisect.bisect_right(range(1, size + 1), budget_s, key=predicted_s)
            if fitting >= needed and throughput(fitting) >= _LEAST_THROUGHPUT * throughput(size):
                return fitting
        return 0

    # Prediction

    def _mean_s(self, size: int) -> float:
        """Return the expected time from the start of a run until its requests are answered."""
        return self.latency.mean_s(size) + 2 * self._lag.mean_s

    def _tail_s(self, size: int) -> float:
        """Return a bound of that time, which nearly no run exceeds."""
        return self.latency.tail_s(size) + 2 * self._lag.tail_s

    def _is_stale(self, now_s: float) -> bool:
        """Return whether nothing has run for a while, so that predictions may no longer hold."""
        return not self._busy and now_s - self._ran_at_s > _STALE_S


def _deadline_s(request: InferenceRequest) -> float:
    return request.deadline_s
