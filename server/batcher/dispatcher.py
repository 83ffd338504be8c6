"""What a free instance runs next, and who may wait for it."""

from collections import Counter
from collections.abc import Sequence

import structlog

from server.batcher.forecast import Forecast
from server.batcher.instance import ModelInstance
from server.batcher.latency import LatencyModel
from server.batcher.limits import BatchingLimits
from server.batcher.queue import RequestQueue
from server.batcher.scheduling import deferral_s, fill_size, finish_s, next_size
from server.requests import Batch, InferenceRequest

logger = structlog.get_logger()

# The part of a request's time that is kept for what nobody here sees: the way to the caller.
_WAY_BACK = 0.1
_NOTHING_KNOWN = Forecast(LatencyModel())


class Dispatcher:
    """Applies the decisions of scheduling.py to a queue and the instances that share it.

    The batcher's lock guards it.

    Args:
        queue: What waits.
        instances: Who runs it.
        forecast: Predicts.
        limits: What was set.

    Attributes:
        max_batch_size: Falls when the device's memory did not suffice.
        delay_s: How long a free instance waits for a batch to fill.
    """

    def __init__(
        self,
        queue: RequestQueue,
        instances: Sequence[ModelInstance],
        forecast: Forecast,
        limits: BatchingLimits,
    ) -> None:
        self.max_batch_size = limits.max_batch_size
        self.delay_s = limits.max_queue_delay_s
        self._preferred_batch_size = limits.preferred_batch_size or limits.max_batch_size
        self._queue = queue
        self._instances = instances
        self._has_several_devices = len({instance.device for instance in instances}) > 1
        self._forecast = forecast

    def can_make_it(self, request: InferenceRequest) -> bool:
        """Whether a request that arrives will be answered by its deadline."""
        if request.deadline_s == float("inf"):
            return True
        now_s = request.enqueued_at_s
        # An idle instance loses nothing by a request that is only likely in time.
        tries = not len(self._queue) and any(each.is_idle for each in self._instances)
        if tries and self._is_stale(now_s):
            return request.deadline_s > now_s
        finished_s = finish_s(
            self._forecast.latency,
            [max(now_s, instance.free_at_s) for instance in self._instances],
            self._queue.images_before(request),
            request.size,
            self.max_batch_size,
            last_s=self._forecast.likely_s if tries else self._forecast.surely_s,
        )
        way_back_s = 0.0 if tries else _WAY_BACK * (request.deadline_s - now_s)
        return finished_s + way_back_s <= request.deadline_s

    def retry_after_s(self, request: InferenceRequest) -> float:
        """When the queue is expected to have room for a request."""
        batches = -(-request.size // self.max_batch_size)
        return batches * self._forecast.latency.mean_s(self.max_batch_size) / len(self._instances)

    def shrink_batches(self, largest: int) -> None:
        """Forms no larger batches from now on."""
        self.max_batch_size = min(self.max_batch_size, largest)
        logger.warning("device memory did not suffice", max_batch_size=self.max_batch_size)

    def pop_late(self, now_s: float) -> list[InferenceRequest]:
        """Takes out those that even a batch of their own would be too late for."""
        needed_s = 0.0 if self._is_stale(now_s) else self._forecast.likely_s(1)
        return self._queue.pop_late(now_s + needed_s)

    def wait_s(self, instance: ModelInstance, now_s: float) -> float | None:
        """How long a free instance shall wait; None means until something changes."""
        queue = self._queue
        if not len(queue):
            return None
        full_size = self._fill_size()
        if queue.images >= full_size:
            return 0.0
        if self.delay_s:
            return max(0.0, queue.oldest_at_s + self.delay_s - now_s)
        others_s = [other.free_at_s for other in self._instances if other is not instance]
        return deferral_s(queue, self._forecast.latency, now_s, full_size, others_s)

    def leaves_it(self, instance: ModelInstance) -> bool:
        """Whether another idle instance shall run what waits, since its device has less to do."""
        if not self._has_several_devices:
            return False
        running = Counter(each.device for each in self._instances if not each.is_idle)
        return any(
            running[each.device] < running[instance.device]
            for each in self._instances
            if each.is_idle
        )

    def seal(
        self, instance: ModelInstance, now_s: float
    ) -> tuple[Batch | None, list[InferenceRequest]]:
        """Gives an instance its next batch.

        Returns:
            The batch, None where nothing is left to run, and the requests that were given up.
        """
        forecast = _NOTHING_KNOWN if self._is_stale(now_s) else self._forecast
        size, dropped = next_size(
            self._queue, forecast, now_s, self._fill_size, len(self._instances)
        )
        parts = self._queue.take(size, self.max_batch_size)
        if not parts:
            return None, dropped
        images = sum(part.size for part in parts)
        takes_s = self._forecast.latency.mean_on_s(instance.device, images)
        batch = Batch(tuple(parts), now_s, takes_s)
        instance.begin(batch)
        return batch, dropped

    def _fill_size(self) -> int:
        return fill_size(
            self._queue, self._preferred_batch_size, self.max_batch_size, len(self._instances)
        )

    def _is_stale(self, now_s: float) -> bool:
        idle = all(instance.is_idle for instance in self._instances)
        return idle and self._forecast.is_stale(now_s)
