"""Warm up a model: run every batch size before the first request, and measure how long it takes."""

import gc
import heapq
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from functools import partial

import structlog

from convoy.server.backends.base import Backend
from convoy.server.batching import Allocate, InstanceThread, LatencyModel
from convoy.server.batching.latency import HANDOVER_S, throughput
from convoy.server.errors import DeviceMemoryError
from convoy.server.requests import Images

logger = structlog.get_logger()

Clock = Callable[[], float]

# The first run of a size prepares the device and does not count. A device that prepares itself for
# each size may do so in its first two runs.
_PREPARING_RUNS = 1
_PREPARING_FIXED_RUNS = 2
# A time is clear once so many runs agree on it to this share of it, hand-over included: whatever
# disturbs a run makes it longer, and seldom two or three times by the same amount.
_AGREEMENT = {2: 0.005, 3: 0.02}
# Runs of a size that is not clear, and their share of the budget, before a larger size runs.
_FIRST_RUNS = 10
_FIRST_SHARE = 1 / 8
# The batch size stops growing once this many doublings in a row gained no throughput.
_USELESS_DOUBLINGS = 2
_LEAST_GAIN = 1.03


def warm_up(
    backends: Sequence[Backend],
    threads: Sequence[InstanceThread],
    sample_shape: tuple[int, int, int],
    max_batch_size: int,
    clock: Clock = time.perf_counter,
    *,
    allocate: Allocate,
    elapsed: Clock = time.perf_counter,
    budget_s: float = 1.0,
    whole_range: bool = False,
) -> LatencyModel:
    """Run batches of 1, 2, 4 … images while larger ones have a higher throughput.

    Then the sizes whose times are not clear run in turn, until they are or the budget is spent. A
    size that a device has no memory for ends the growth; the sizes before it serve.

    Args:
        backends: The loaded model, on each of its devices.
        threads: Those of the instances that run at the same time, spread over the devices: as many
            as share them under load, since a batch that runs alone is faster.
        sample_shape: `(H, W, 3)`.
        max_batch_size: The largest batch to run.
        clock: Seconds that a run takes, read on its thread before and after.
        allocate: Allocates batch buffers, like those of the workers.
        elapsed: Seconds that count towards the budget, read on this thread, so that handing a run
            over counts too. For a tiny net it takes longer than the run.
        budget_s: The time to measure in, beyond the preparing runs of each size and two others.
        whole_range: Whether to run all sizes up to the largest, whatever they gain.

    Returns:
        The times that were measured on each device. Every size in it has run there, so no request
        waits for a first run of its size.
    """
    rounds = _Rounds(backends, threads, clock, elapsed)
    times = _Times(rounds, sample_shape, max_batch_size, allocate, whole_range)
    times.grow(budget_s)
    while times.spent_s < budget_s and not times.are_clear():
        times.run_unclear(budget_s)
        # A size that seemed useless may have been disturbed.
        times.grow(budget_s)
    if not times.are_clear():
        logger.info("batch sizes are measured under disturbance", spent_s=round(times.spent_s, 3))
    return LatencyModel(*times.fastest_s(), pads=backends[0].fixed_shapes)


def settle_memory() -> None:
    """Exclude all that is loaded now from garbage collection.

    A collection would otherwise traverse all modules again and again, and stop every thread
    meanwhile.
    """
    gc.collect()
    gc.freeze()


class _Times:
    """The times of the sizes that have run.

    Attributes:
        spent_s: The time that the counted runs took.
    """

    def __init__(
        self,
        rounds: "_Rounds",
        sample_shape: tuple[int, int, int],
        max_batch_size: int,
        allocate: Allocate,
        whole_range: bool,
    ) -> None:
        self._rounds = rounds
        self._sample_shape = sample_shape
        self._max_batch_size = max_batch_size
        self._allocate = allocate
        self._whole_range = whole_range
        self._runs: dict[int, int] = {}
        # By size, then by device: the fastest runs, the first one first.
        self._fastest_s: dict[int, list[list[float]]] = {}
        self.spent_s = 0.0

    def grow(self, budget_s: float) -> None:
        """Run larger sizes while they gain throughput, each of them some times."""
        while (size := self._next_size()) and (size == 1 or self.spent_s <= budget_s):
            try:
                self._first_runs(size, budget_s)
            except DeviceMemoryError:
                if size == 1:
                    raise
                logger.warning("the device has no memory for larger batches", images=size)
                self._runs.pop(size, None)
                self._fastest_s.pop(size, None)
                self._max_batch_size = max(self._runs)

    def run_unclear(self, budget_s: float) -> None:
        """Run each size whose time is not clear once, within the budget."""
        for size in self._runs:
            if self.spent_s < budget_s and not self._is_clear(size):
                self._run(self._images(size))

    def are_clear(self) -> bool:
        """Return whether the time of each size is clear, on each device."""
        return all(map(self._is_clear, self._runs))

    def fastest_s(self) -> list[dict[int, float]]:
        """Return for each device the time of each size.

        A smaller batch takes no longer than a larger one, since it could be padded: where it seems
        to, it was disturbed.
        """
        tables_s = []
        for device in range(self._rounds.devices):
            least_s, table_s = float("inf"), {}
            for size in reversed(self._fastest_s):
                table_s[size] = least_s = min(least_s, self._fastest_s[size][device][0])
            tables_s.append(dict(reversed(table_s.items())))
        return tables_s

    def _next_size(self) -> int:
        """Return the next size to run; 0 for none."""
        last = max(self._runs, default=0)
        if last == self._max_batch_size:
            return 0
        useless, best = 0, 0.0
        for size, devices_s in self._fastest_s.items():
            gained = throughput(size, max(fastest_s for fastest_s, *_ in devices_s))
            useless = 0 if gained > _LEAST_GAIN * best else useless + 1
            best = max(best, gained)
        if useless >= _USELESS_DOUBLINGS and not self._whole_range:
            return 0
        return min(max(1, 2 * last), self._max_batch_size)

    def _first_runs(self, size: int, budget_s: float) -> None:
        images = self._images(size)
        for _ in range(_PREPARING_FIXED_RUNS if self._rounds.prepares else _PREPARING_RUNS):
            self._rounds.run(images)
        end_s = self.spent_s + _FIRST_SHARE * budget_s
        for _ in range(min(_AGREEMENT)):
            self._run(images)
        while not self._is_clear(size) and self._runs[size] < _FIRST_RUNS and self.spent_s < end_s:
            self._run(images)

    def _run(self, images: Images) -> None:
        times_s, spent_s = self._rounds.run(images)
        size = len(images)
        self._runs[size] = self._runs.get(size, 0) + 1
        # A tiny net runs ten thousand times, and only the fastest count.
        before_s = self._fastest_s.get(size, [[]] * len(times_s))
        self._fastest_s[size] = [
            heapq.nsmallest(max(_AGREEMENT), (*fastest_s, time_s))
            for fastest_s, time_s in zip(before_s, times_s, strict=True)
        ]
        self.spent_s += spent_s

    def _is_clear(self, size: int) -> bool:
        def agree(fastest_s: Sequence[float]) -> bool:
            whole_s = fastest_s[0] + HANDOVER_S
            return any(
                len(fastest_s) >= runs and fastest_s[runs - 1] - fastest_s[0] <= share * whole_s
                for runs, share in _AGREEMENT.items()
            )

        return all(map(agree, self._fastest_s[size]))

    def _images(self, size: int) -> Images:
        images = self._allocate((size, *self._sample_shape))
        images.fill(0)
        return images


class _Rounds:
    """Runs several batches at the same time.

    Args:
        backends: The model on each of its devices.
        threads: As many threads; the first runs the first backend, and so on around.
        clock: Seconds that a run takes, read on its thread.
        elapsed: Seconds that a round takes, read on the caller's thread.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        threads: Sequence[InstanceThread],
        clock: Clock,
        elapsed: Clock,
    ) -> None:
        self._backends = backends
        self._threads = threads
        self._clock = clock
        self._elapsed = elapsed
        self._all_ready = threading.Barrier(len(threads))

    @property
    def devices(self) -> int:
        """The number of devices."""
        return len(self._backends)

    @property
    def prepares(self) -> bool:
        """Whether the devices prepare themselves for each size."""
        return self._backends[0].fixed_shapes

    def run(self, images: Images) -> tuple[list[float], float]:
        """Return for each device the time of its slowest run, and the time of the round."""

        def take_s(number: int) -> float:
            backend = self._backends[number % len(self._backends)]
            self._all_ready.wait()
            started_s = self._clock()
            backend.run(images)
            return self._clock() - started_s

        before_s = self._elapsed()
        runs = [thread.call(partial(take_s, n)) for n, thread in enumerate(self._threads)]
        # A run that fails must not leave others behind, which would hold up the next round.
        wait(runs)
        times_s = [run.result() for run in runs]
        spent_s = self._elapsed() - before_s
        devices = len(self._backends)
        return [max(times_s[device::devices]) for device in range(devices)], spent_s
