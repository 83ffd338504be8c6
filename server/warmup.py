"""Runs a model before the first request does, and measures how long its batches take."""

import gc
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from server.backends import Backend
from server.batcher import Allocate, LatencyModel
from server.batcher.latency import HANDOVER_S
from server.requests import Images

Clock = Callable[[], float]

# Timed runs of each size: more of those that take little.
_LEAST_RUNS = 2
# A device that prepares itself for each size may do so in its first two runs (CUDA graphs do).
_PREPARING_RUNS = 2
_MOST_RUNS = 10
_TIMED_S = 0.02
# Doubling the batch is given up once this many doublings in a row brought no better pace.
_FRUITLESS = 2
_GAIN = 1.03


def warm_up(
    backends: Sequence[Backend],
    at_once: int,
    sample_shape: tuple[int, int, int],
    max_batch_size: int,
    clock: Clock = time.perf_counter,
    *,
    allocate: Allocate,
) -> LatencyModel:
    """Runs batches of 1, 2, 4 … images while larger ones are faster an image.

    Args:
        backends: The loaded model, on each of its devices.
        at_once: Batches to run at the same time, spread over the devices: as many as share them
            under load, since what one alone takes would promise too much.
        sample_shape: `(H, W, 3)`.
        max_batch_size: The largest batch to try.
        clock: Seconds.
        allocate: Makes batch buffers, like those of the instances.

    Returns:
        What was measured on each device. Every size in it was run there, so no request pays for a
        first run of its size.
    """
    measured_s: list[dict[int, float]] = [{} for _ in backends]
    best_pace = 0.0
    fruitless = 0
    size = 1
    with ThreadPoolExecutor(at_once, thread_name_prefix="warm-up") as threads:
        rounds = _Rounds(backends, at_once, threads, clock)
        while fruitless < _FRUITLESS:
            size = min(size, max_batch_size)
            images = allocate((size, *sample_shape))
            images.fill(0)
            times_s = rounds.fastest_s(images)
            for table_s, time_s in zip(measured_s, times_s, strict=True):
                table_s[size] = time_s
            pace = size / (max(times_s) + HANDOVER_S)
            fruitless = 0 if pace > _GAIN * best_pace else fruitless + 1
            best_pace = max(best_pace, pace)
            if size == max_batch_size:
                break
            size *= 2
    return LatencyModel(*measured_s, pads=backends[0].fixed_shapes)


def settle_memory() -> None:
    """Takes what was loaded out of the garbage collector's sight; call it when loading is done.

    A collection would otherwise walk all modules and models again and again, and stop every thread
    for it.
    """
    gc.collect()
    gc.freeze()


class _Rounds:
    """Runs a batch several times at once.

    Args:
        backends: The model on each of its devices.
        at_once: How often, on all of them.
        threads: As many.
        clock: Seconds.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        at_once: int,
        threads: ThreadPoolExecutor,
        clock: Clock,
    ) -> None:
        self._backends = backends
        self._at_once = at_once
        self._threads = threads
        self._clock = clock
        self._all_there = threading.Barrier(at_once)

    def fastest_s(self, images: Images) -> list[float]:
        """Returns for each device the fastest of some rounds.

        Preparations and whatever else the machine does can only lengthen one.
        """
        least_runs = _LEAST_RUNS + (_PREPARING_RUNS if self._backends[0].fixed_shapes else 0)
        rounds_s: list[list[float]] = []
        spent_s = 0.0
        while len(rounds_s) < least_runs or (spent_s < _TIMED_S and len(rounds_s) < _MOST_RUNS):
            rounds_s.append(self._run(images))
            spent_s += max(rounds_s[-1])
        return [min(times_s) for times_s in zip(*rounds_s, strict=True)]

    def _run(self, images: Images) -> list[float]:
        """Returns for each device what the slowest of its runs took."""

        def take_s(number: int) -> float:
            backend = self._backends[number % len(self._backends)]
            self._all_there.wait()
            started_s = self._clock()
            backend.run(images)
            return self._clock() - started_s

        times_s = list(self._threads.map(take_s, range(self._at_once)))
        return [
            max(times_s[device :: len(self._backends)]) for device in range(len(self._backends))
        ]
