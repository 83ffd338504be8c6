"""The cost of a model: multiply-adds per image, time by batch size, and threads to run it on."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convoy.export.servable import Images, Run
from convoy.training.cpus import usable_cpus

LATENCY_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""The batch sizes to time."""

LARGE_MULTIPLY_ADDS = 500_000_000
"""Per image; a net of this size takes tens of milliseconds for one."""

_LONGEST_CALL_S = 0.1
"""Above this, time grows with the batch size, and larger sizes need no measurement."""

_ROUNDS = 5
_WARM_UP_CALLS = 2


@dataclass(frozen=True, slots=True)
class BatchLatency:
    """Median time of one call."""

    batch_size: int
    median_s: float


def count_multiply_adds(net: nn.Module, height_px: int, width_px: int, channels: int = 3) -> int:
    """Count the multiply-adds of convolutions and matrix products for one image.

    A net that does not run in torch provides its own count.
    """
    known = getattr(net, "multiply_adds", None)
    if isinstance(known, int):
        return known
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, channels, height_px, width_px))
    # The counter counts two operations for each multiply-add, as papers do.
    return int(counter.get_total_flops()) // 2


def measure_latencies(
    run: Run,
    image: Images,
    clock: Callable[[], float] = time.perf_counter,
    batch_sizes: Sequence[int] = LATENCY_BATCH_SIZES,
) -> tuple[BatchLatency, ...]:
    """Time an artifact on copies of one image `[H, W, 3]`, after warm-up calls at each size.

    The last size measured is the first whose calls take more than a tenth of a second.
    """
    measured: list[BatchLatency] = []
    for size in batch_sizes:
        latency_s = _median_s(run, np.repeat(image[None], size, axis=0), clock)
        measured.append(BatchLatency(size, latency_s))
        if latency_s > _LONGEST_CALL_S:
            break
    return tuple(measured)


def _median_s(run: Run, batch: Images, clock: Callable[[], float]) -> float:
    for _ in range(_WARM_UP_CALLS):
        run(batch)
    times_s = []
    for _ in range(_ROUNDS):
        start_s = clock()
        run(batch)
        times_s.append(clock() - start_s)
    return statistics.median(times_s)


@contextmanager
def run_threads(multiply_adds: int) -> Iterator[None]:
    """Run small nets on one thread, large ones on every processor.

    If another process uses a core, the threads of a small net mostly wait for each other: as
    measured, a proof of seconds then takes minutes.
    """
    before = torch.get_num_threads()
    large = multiply_adds >= LARGE_MULTIPLY_ADDS
    torch.set_num_threads(usable_cpus() if large else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
