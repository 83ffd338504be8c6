"""Runs a model before the first request does, and measures how long its batches take."""

import gc
import time
from collections.abc import Callable

import numpy as np

from server.backends import Backend
from server.batcher import LatencyModel
from server.batcher.latency import HANDOVER_S

# Timed runs of each size, after one that is not timed: more of those that take little.
_LEAST_RUNS = 3
_MOST_RUNS = 10
_TIMED_S = 0.02
# Doubling the batch is given up once this many doublings in a row brought no better pace.
_FRUITLESS = 2
_GAIN = 1.03


def warm_up(
    backend: Backend,
    sample_shape: tuple[int, int, int],
    max_batch_size: int,
    clock: Callable[[], float] = time.perf_counter,
) -> LatencyModel:
    """Runs batches of 1, 2, 4 … images while larger ones are faster an image.

    Args:
        backend: The loaded model.
        sample_shape: `(H, W, 3)`.
        max_batch_size: The largest batch to try.
        clock: Seconds.

    Returns:
        What was measured. Every size in it was run, so no request pays for a first run of its size.
    """
    measured_s: dict[int, float] = {}
    best_pace = 0.0
    fruitless = 0
    size = 1
    while fruitless < _FRUITLESS:
        size = min(size, max_batch_size)
        measured_s[size] = _time(backend, np.zeros((size, *sample_shape), np.uint8), clock)
        pace = size / (measured_s[size] + HANDOVER_S)
        fruitless = 0 if pace > _GAIN * best_pace else fruitless + 1
        best_pace = max(best_pace, pace)
        if size == max_batch_size:
            break
        size *= 2
    return LatencyModel(measured_s, pads=backend.fixed_shapes)


def settle_memory() -> None:
    """Takes what was loaded out of the garbage collector's sight; call it when loading is done.

    A collection would otherwise walk all modules and models again and again, and stop every thread
    for it.
    """
    gc.collect()
    gc.freeze()


def _time(backend: Backend, images: np.ndarray, clock: Callable[[], float]) -> float:
    """The fastest run: whatever else the machine does can only lengthen one."""
    backend.run(images)
    times_s: list[float] = []
    while len(times_s) < _LEAST_RUNS or (sum(times_s) < _TIMED_S and len(times_s) < _MOST_RUNS):
        started_s = clock()
        backend.run(images)
        times_s.append(clock() - started_s)
    return min(times_s)
