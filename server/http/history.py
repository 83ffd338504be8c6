"""The last minutes of traffic, read from the server's own metrics, for the page."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from server.protocols.calls import INFERENCE_METHODS

INTERVAL_S = 2.0
KEPT_S = 300.0

_DURATION = "convoy_request_duration_seconds"
_BATCH_SIZE = "convoy_batch_size_images"
_QUEUED = "convoy_queued_images"
_SAMPLES = (
    f"{_DURATION}_bucket",
    f"{_BATCH_SIZE}_sum",
    f"{_BATCH_SIZE}_count",
    _QUEUED,
)


@dataclass(frozen=True, slots=True)
class Interval:
    """What happened in one interval, all models together.

    Attributes:
        at_s: Its end, in seconds since 1970.
        requests_per_s: Inference requests that were answered with success.
        errors_per_s: Inference requests that ended otherwise.
        p50_s: Median request duration; None without a request. So for the other percentiles.
        batch_size: Mean images in a batch; None without a batch.
        queued_images: Images that waited at its end.
    """

    at_s: float
    requests_per_s: float
    errors_per_s: float
    p50_s: float | None
    p90_s: float | None
    p99_s: float | None
    batch_size: float | None
    queued_images: float


class History:
    """Remembers one `Interval` for each `INTERVAL_S` of the last `KEPT_S`.

    Example:
        task = asyncio.create_task(history.follow())
    """

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.time) -> None:
        self._registry = registry.restricted_registry(_SAMPLES)
        self._clock = clock
        self._intervals: deque[Interval] = deque(maxlen=round(KEPT_S / INTERVAL_S))
        self._before = self._read()

    async def follow(self) -> None:
        """Records until it is cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            self.record()

    def record(self) -> None:
        """Ends the interval that is under way."""
        before, after = self._before, self._read()
        self._intervals.append(_interval(before, after))
        self._before = after

    def recent(self) -> list[dict[str, float | None]]:
        """Returns the intervals, oldest first, as plain dictionaries."""
        return [asdict(interval) for interval in self._intervals]

    def _read(self) -> "_Totals":
        return _totals(self._registry.collect(), self._clock())


@dataclass(frozen=True, slots=True)
class _Totals:
    at_s: float
    bounds_s: NDArray[np.float64]  # [B] upper bounds, the last one infinite
    succeeded: NDArray[np.float64]  # [B] cumulative over bounds
    failed: float
    batches: float
    batched_images: float
    queued_images: float


def _totals(families: object, at_s: float) -> _Totals:
    succeeded: dict[float, float] = {}
    failed = 0.0
    sums = dict.fromkeys(_SAMPLES, 0.0)
    assert hasattr(families, "__iter__")
    for family in families:
        assert isinstance(family, Metric)
        for sample in family.samples:
            if family.name != _DURATION:
                sums[sample.name] += sample.value
            elif sample.labels["method"] in INFERENCE_METHODS:
                bound_s = float(sample.labels["le"])
                if sample.labels["code"] == "OK":
                    succeeded[bound_s] = succeeded.get(bound_s, 0.0) + sample.value
                elif bound_s == float("inf"):
                    failed += sample.value
    bounds_s = sorted(succeeded)
    return _Totals(
        at_s,
        np.array(bounds_s),
        np.array([succeeded[bound_s] for bound_s in bounds_s]),
        failed,
        sums[f"{_BATCH_SIZE}_count"],
        sums[f"{_BATCH_SIZE}_sum"],
        sums[_QUEUED],
    )


def _interval(before: _Totals, after: _Totals) -> Interval:
    elapsed_s = max(after.at_s - before.at_s, 1e-9)
    # A label that appeared meanwhile counts from zero; one that was removed cannot be subtracted.
    same = len(before.succeeded) == len(after.succeeded)
    answered = np.maximum(after.succeeded - (before.succeeded if same else 0.0), 0.0)
    total = float(answered[-1]) if len(answered) else 0.0
    p50_s, p90_s, p99_s = (
        _percentile(answered, after.bounds_s, share) if total else None
        for share in (0.5, 0.9, 0.99)
    )
    batches = after.batches - before.batches
    images = after.batched_images - before.batched_images
    return Interval(
        after.at_s,
        total / elapsed_s,
        max(after.failed - before.failed, 0.0) / elapsed_s,
        p50_s,
        p90_s,
        p99_s,
        images / batches if batches > 0 else None,
        after.queued_images,
    )


def _percentile(
    cumulative: NDArray[np.float64], bounds_s: NDArray[np.float64], share: float
) -> float:
    """Interpolates inside a bucket, as Prometheus's histogram_quantile does."""
    finite = bounds_s[:-1]
    return float(
        np.interp(share * cumulative[-1], [0.0, *cumulative[:-1]], [0.0, *finite], right=finite[-1])
    )
