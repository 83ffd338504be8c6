"""The traffic of the last minutes, by model, for the page."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from convoy.server.metrics.requests import DURATION_BUCKETS_S
from convoy.server.protocol.calls import INFERENCE_METHODS

INTERVAL_S = 2.0
KEPT_S = 300.0

_DURATION = "convoy_request_duration_seconds"
_QUEUED = "convoy_queued_images"
_DECODE_QUEUED = "convoy_decode_queued_images"
# Histograms of which the page shows the mean, by the name of the mean.
_MEANS = {
    "batch_size": "convoy_batch_size_images",
    "decode_s": "convoy_decode_duration_seconds",
    "queue_s": "convoy_queue_duration_seconds",
    "inference_s": "convoy_inference_duration_seconds",
}
_SHARES = {"p50_s": 0.5, "p90_s": 0.9, "p99_s": 0.99}
_INFINITE = float("inf")
_BOUNDS_S = np.array([*DURATION_BUCKETS_S, _INFINITE])
# The places in a vector of counts: answered requests up to each bound, failed requests, then sum
# and count of each mean.
_BUCKETS = len(_BOUNDS_S)
_BUCKET_AT = {bound_s: at for at, bound_s in enumerate(_BOUNDS_S.tolist())}
_PLACES = {
    f"{name}_{part}": _BUCKETS + 1 + 2 * nth + offset
    for nth, name in enumerate(_MEANS.values())
    for offset, part in enumerate(("sum", "count"))
}
_SIZE = _BUCKETS + 1 + len(_PLACES)
_SAMPLES = (f"{_DURATION}_bucket", *_PLACES, _QUEUED, _DECODE_QUEUED)

Vector = NDArray[np.float64]
# Stands for all models, and for the requests that name none in service.
ALL = None


@dataclass(frozen=True, slots=True)
class Interval:
    """What was counted in one interval.

    Attributes:
        at_s: Its end, in seconds since 1970.
        elapsed_s: Its length.
        counts: By model, and of all under `ALL`: a vector of counts.
        queued: By model, and of all under `ALL`: images that waited for a batch at its end.
        decode_queued: Image files that waited for their decoding, or were decoded, then.
    """

    at_s: float
    elapsed_s: float
    counts: Mapping[str | None, Vector]
    queued: Mapping[str | None, float]
    decode_queued: float


class Traffic:
    """The intervals of the last `KEPT_S`.

    Example:
        traffic.extend([interval])
        traffic.of("digits")["window"]["p99_s"]
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._intervals: deque[Interval] = deque(maxlen=round(KEPT_S / INTERVAL_S))

    @property
    def intervals(self) -> tuple[Interval, ...]:
        """All of them, oldest first."""
        return tuple(self._intervals)

    def extend(self, intervals: Iterable[Interval]) -> None:
        """Keep newer intervals in place of the oldest."""
        self._intervals.extend(intervals)

    def of(self, model: str | None = ALL) -> dict[str, object]:
        """Describe the traffic of a model, or of all, as JSON.

        Returns:
            `now_s` and `times_s`, the ends of the intervals, in seconds since 1970; `series`, for
            each name a value an interval, None without an event; `window`, the same names over all
            intervals together, and the requests `answered` and `failed`.
        """
        kept = self._intervals
        none = np.zeros(_SIZE)
        counts = np.array([each.counts.get(model, none) for each in kept]).reshape(-1, _SIZE)
        elapsed_s = np.array([each.elapsed_s for each in kept])
        series = _described(counts, elapsed_s)
        series["queued_images"] = [each.queued.get(model, 0.0) for each in kept]
        series["decode_queued_images"] = [each.decode_queued for each in kept]
        total = counts.sum(axis=0, keepdims=True)
        window = {
            name: value for name, (value,) in _described(total, elapsed_s.sum()[None]).items()
        }
        window["answered"] = float(total[0, _BUCKETS - 1])
        window["failed"] = float(total[0, _BUCKETS])
        return {
            "now_s": self._clock(),
            "times_s": [each.at_s for each in kept],
            "series": series,
            "window": window,
        }


class TrafficRecorder:
    """Reads one `Interval` from the metrics in each `INTERVAL_S`.

    Args:
        registry: Has the metrics.
        traffic: Gets the intervals.

    Example:
        task = asyncio.create_task(recorder.follow())
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        traffic: Traffic,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.traffic = traffic
        self._registry = registry.restricted_registry(_SAMPLES)
        self._clock = clock
        self._listeners: list[Callable[[Interval], None]] = []
        self._before = self._read()

    def follow_with(self, listener: Callable[[Interval], None]) -> None:
        """Call a listener with each new interval."""
        self._listeners.append(listener)

    async def follow(self) -> None:
        """Record until it is cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            self.record()

    def record(self) -> None:
        """End the current interval."""
        before, after = self._before, self._read()
        self._before = after
        interval = _between(before, after)
        self.traffic.extend([interval])
        for listener in self._listeners:
            listener(interval)

    def _read(self) -> "_Reading":
        reading = _Reading(self._clock(), {}, {}, 0.0)
        for family in self._registry.collect():
            for sample in family.samples:
                reading.add(sample.name, sample.labels, sample.value)
        return reading


@dataclass(slots=True)
class _Reading:
    """What was counted until a moment, by model and version."""

    at_s: float
    counts: dict[tuple[str, str], Vector]
    queued: dict[str | None, float]
    decode_queued: float

    def add(self, name: str, labels: Mapping[str, str], value: float) -> None:
        if name == _DECODE_QUEUED:
            self.decode_queued += value
        elif name == _QUEUED:
            for model in (labels["model"], ALL):
                self.queued[model] = self.queued.get(model, 0.0) + value
        elif (place := _place(name, labels)) is not None:
            key = labels["model"], labels["version"]
            if key not in self.counts:
                self.counts[key] = np.zeros(_SIZE)
            self.counts[key][place] += value


def _place(name: str, labels: Mapping[str, str]) -> int | None:
    """Return where a sample is added up; None for one that the page does not show."""
    if name in _PLACES:
        return _PLACES[name]
    if labels["method"] not in INFERENCE_METHODS:
        return None
    bound_s = float(labels["le"])
    if labels["code"] == "OK":
        return _BUCKET_AT[bound_s]
    return _BUCKETS if bound_s == _INFINITE else None


def _between(before: _Reading, after: _Reading) -> Interval:
    counts: dict[str | None, Vector] = {ALL: np.zeros(_SIZE)}
    for (model, version), vector in after.counts.items():
        # A version that is unloaded and loaded again begins anew, below its counts of before.
        earlier = before.counts.get((model, version))
        more = vector if earlier is None else np.maximum(vector - earlier, 0.0)
        counts[model] = counts.get(model, 0.0) + more
        counts[ALL] = counts[ALL] + more
    elapsed_s = max(after.at_s - before.at_s, 1e-9)
    return Interval(after.at_s, elapsed_s, counts, after.queued, after.decode_queued)


def _described(counts: Vector, elapsed_s: Vector) -> dict[str, list[float | None]]:
    """Return rates, percentiles and means of `[T]` spans with counts `[T, _SIZE]`."""
    answered = counts[:, :_BUCKETS]
    columns = {
        "answered_per_s": answered[:, -1] / elapsed_s,
        "failed_per_s": counts[:, _BUCKETS] / elapsed_s,
        **{name: quantiles(answered, _BOUNDS_S, share) for name, share in _SHARES.items()},
    }
    with np.errstate(invalid="ignore"):
        for name, histogram in _MEANS.items():
            total = counts[:, _PLACES[f"{histogram}_sum"]]
            columns[name] = total / counts[:, _PLACES[f"{histogram}_count"]]
    return {name: _plain(values) for name, values in columns.items()}


def _plain(values: Vector) -> list[float | None]:
    rounded = np.round(values, 7).tolist()
    return [None if math.isnan(value) else value for value in rounded]


def quantiles(cumulative: Vector, bounds: Vector, share: float) -> Vector:
    """Interpolate inside a bucket, as Prometheus's histogram_quantile does.

    Args:
        cumulative: `[T, B]`, events up to each bound.
        bounds: `[B]`, ascending, the last one infinite.
        share: Of the events, from 0 to 1.

    Returns:
        `[T]`; NaN without an event.
    """
    rank = share * cumulative[:, -1]
    # The first bucket that reaches the rank; past the last finite bound, that bound.
    bucket = (cumulative[:, :-1] < rank[:, None]).sum(axis=1)
    finite = np.minimum(bucket, len(bounds) - 2)
    starts = np.array([0.0, *bounds[:-2]])
    row = np.arange(len(cumulative))
    upper = cumulative[row, finite]
    lower = np.where(finite > 0, cumulative[row, finite - 1], 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        inside = starts[finite] + (bounds[finite] - starts[finite]) * (
            (rank - lower) / (upper - lower)
        )
    result = np.where(bucket > finite, bounds[-2], inside)
    return np.where(cumulative[:, -1] > 0, result, np.nan)
