"""The decisions of a batcher: when a request would be answered, and what the next batch is.

Pure functions of the queue, the clock and the latency model. The scheme is admission by predicted
finish, earliest deadline first and the sliding-window drop of "Nexus" (H. Shen et al., SOSP 2019,
section 6.3), with the deferral of "Symphony" (L. Chen et al., arXiv 2308.07470) where several
instances gain by it.
"""

import bisect
import math
from collections.abc import Callable, Sequence

from server.batcher.forecast import Forecast
from server.batcher.latency import LatencyModel
from server.batcher.queue import RequestQueue
from server.requests import InferenceRequest

# A request is given up when the batch it needs would cost the device more of its pace than this.
_KEPT_PACE = 0.9
# Batches of the largest size that wait for every instance where one of them is made.
_DEEP = 2
# Batches are worth waiting for when one image more costs less than this part of one alone.
_WORTH_WAITING = 0.5


def finish_s(
    latency: LatencyModel,
    free_at_s: Sequence[float],
    images_before: int,
    size: int,
    max_batch_size: int,
    *,
    last_s: Callable[[int], float],
) -> float:
    """Returns when a request that arrives would be answered, by what is known then.

    Args:
        latency: Predicts run times.
        free_at_s: When each instance is expected to be free, not before now.
        images_before: Waiting images that run first.
        size: Images of the request.
        max_batch_size: Images in one batch.
        last_s: What the last batch takes, by its size, until its answers have left.
    """
    full_batches = (images_before + size - 1) // max_batch_size
    # Who comes later fills the batch that a request from a long queue runs in.
    last = max_batch_size if full_batches else images_before + size
    rounds, turn = divmod(full_batches, len(free_at_s))
    starts_s = sorted(free_at_s)[turn] + rounds * latency.mean_s(max_batch_size)
    return starts_s + last_s(last)


def fill_size(queue: RequestQueue, preferred: int, largest: int, instances: int) -> int:
    """Returns up to how many images a batch from this queue is filled.

    A larger batch hands over less often, but while it runs, its callers and the event loop have
    nothing to do, and the other instances what it left. So it is made only where the queue keeps
    all of them busy meanwhile.

    Args:
        queue: Holds something.
        preferred: The size that is nearly the best.
        largest: The best; no request that fits into it is split.
        instances: Those that share the queue.
    """
    if queue.images >= _DEEP * instances * largest:
        return largest
    return min(largest, max(preferred, queue.head.waiting))


def next_size(
    queue: RequestQueue,
    forecast: Forecast,
    now_s: float,
    fill: Callable[[], int],
    instances: int,
) -> tuple[int, list[InferenceRequest]]:
    """Decides how many images the next batch holds.

    Args:
        queue: What waits.
        forecast: Predicts.
        now_s: Now.
        fill: Up to how many images a batch from this queue is filled.
        instances: Those that share the queue.

    Returns:
        The size, 0 for none, and the requests that were taken out of the queue because they are not
        likely to be answered in time, or only by a batch so small that those behind them would pay
        for it.
    """
    dropped: list[InferenceRequest] = []
    while queue.images:
        full_size = fill()
        size = min(queue.images, full_size)
        if not queue.has_deadlines:
            return size, dropped
        window = queue.window(size)
        tightest = min(window, key=lambda request: request.deadline_s)
        needed = sum(other.waiting for other in window[: window.index(tightest) + 1])
        budget_s = tightest.deadline_s - now_s
        if needed > full_size:
            rounds = math.ceil(needed / full_size / instances)
            if rounds * forecast.likely_s(full_size) <= budget_s:
                return size, dropped
        elif fitting := _fitting(forecast, budget_s, needed, size):
            return fitting, dropped
        queue.remove(tightest)
        dropped.append(tightest)
    return 0, dropped


def _fitting(forecast: Forecast, budget_s: float, needed: int, size: int) -> int:
    """Returns the largest batch in time, surely or else likely, that is worth it; 0 for none."""
    for takes_s in (forecast.surely_s, forecast.likely_s):
        fitting = bisect.bisect_right(range(1, size + 1), budget_s, key=takes_s)
        pace = forecast.latency.pace
        if fitting >= needed and pace(fitting) >= _KEPT_PACE * pace(size):
            return fitting
    return 0


def deferral_s(
    queue: RequestQueue,
    latency: LatencyModel,
    now_s: float,
    full_size: int,
    others_free_at_s: Sequence[float],
) -> float:
    """Returns how long a free instance leaves a small batch to fill.

    It does so while every other instance runs, until the first of them is back or the tightest
    deadline presses, and only where larger batches are worth it: on a CPU, whose time for a batch
    is in proportion to its size, they are not.
    """
    size = queue.images
    if not others_free_at_s or not 0 < size < full_size:
        return 0.0
    alone_s = latency.mean_s(1)
    if latency.mean_s(size + 1) - latency.mean_s(size) >= _WORTH_WAITING * alone_s:
        return 0.0
    if any(free_at_s <= now_s for free_at_s in others_free_at_s):
        return 0.0
    deadline_s = min(request.deadline_s for request in queue.window(size))
    if math.isinf(deadline_s):
        return 0.0
    latest_s = deadline_s - latency.tail_s(size + 1)
    return max(0.0, min(latest_s, *others_free_at_s) - now_s)
