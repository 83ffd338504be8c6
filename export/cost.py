"""What a model costs: multiply-adds of one image, and time by batch size."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from export.servable import Images, Run

LATENCY_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""The buckets that a server batches by."""

_LONGEST_CALL_S = 0.1
"""Above this the time grows with the batch, and larger ones need not be waited for."""

_ROUNDS = 5
_WARM_UP_CALLS = 2


@dataclass(frozen=True, slots=True)
class BatchLatency:
    """Median time of one call."""

    batch_size: int
    median_s: float


def count_multiply_adds(net: nn.Module, height_px: int, width_px: int) -> int:
    """Counts those of convolutions and matrix products for one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, height_px, width_px))
    # The counter follows the papers' habit of two operations for each multiply-add.
    return int(counter.get_total_flops()) // 2


def measure_latencies(
    run: Run,
    image: Images,
    clock: Callable[[], float] = time.perf_counter,
    batch_sizes: Sequence[int] = LATENCY_BATCH_SIZES,
) -> tuple[BatchLatency, ...]:
    """Times an artefact on copies of one image `[H, W, 3]`, after warm-up calls at each size.

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
