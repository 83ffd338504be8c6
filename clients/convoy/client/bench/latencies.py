"""Latencies as HDR histograms, which merge: three digits from a microsecond to an hour."""

from collections.abc import Iterable

import numpy as np
from hdrh.histogram import HdrHistogram
from numpy.typing import NDArray

PERCENTILES = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 99.99)

# With fewer samples above it, a percentile shows chance rather than the server.
SAMPLES_ABOVE = 5

_US_PER_S = 1_000_000
_MOST_US = 3600 * _US_PER_S
_DIGITS = 3


class Latencies:
    """Durations.

    Example:
        both = Latencies.together([Latencies.of(durations_s), Latencies.decode(message)])
        both.percentile_s(99)
    """

    def __init__(self, histogram: HdrHistogram | None = None) -> None:
        self._histogram = histogram or HdrHistogram(1, _MOST_US, _DIGITS)

    @classmethod
    def of(cls, seconds: Iterable[float] | NDArray[np.float64]) -> "Latencies":
        """Count durations; those outside the range count as its ends."""
        latencies = cls()
        us = np.rint(np.fromiter(seconds, np.float64) * _US_PER_S)
        values, counts = np.unique(np.clip(us, 1, _MOST_US).astype(np.int64), return_counts=True)
        # One call for each distinct value: a call costs microseconds.
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            latencies._histogram.record_value(value, count)
        return latencies

    @classmethod
    def decode(cls, encoded: bytes) -> "Latencies":
        """Read what `encode` wrote, in any language's HdrHistogram."""
        return cls(HdrHistogram.decode(encoded))

    @classmethod
    def together(cls, parts: Iterable["Latencies"]) -> "Latencies":
        """Merge histograms, as if all had been counted in one."""
        merged = cls()
        for part in parts:
            merged._histogram.add(part._histogram)
        return merged

    def encode(self) -> bytes:
        """Return the histogram compressed, base64."""
        return bytes(self._histogram.encode())

    def __reduce__(self) -> tuple[object, ...]:
        return Latencies.decode, (self.encode(),)

    @property
    def count(self) -> int:
        """The number of durations."""
        return int(self._histogram.get_total_count())

    @property
    def mean_s(self) -> float:
        """Their mean; 0 if there are none."""
        return float(self._histogram.get_mean_value()) / _US_PER_S if self.count else 0.0

    @property
    def max_s(self) -> float:
        """The longest; 0 if there are none."""
        return float(self._histogram.get_max_value()) / _US_PER_S if self.count else 0.0

    def percentile_s(self, percentile: float) -> float:
        """Return the value that this share, in percent, did not exceed; 0 if there are none."""
        return float(self._histogram.get_value_at_percentile(percentile)) / _US_PER_S

    def percentiles_s(self) -> dict[float, float | None]:
        """Return those in PERCENTILES; None for one that too few samples support."""
        return {p: self.percentile_s(p) if self.supports(p) else None for p in PERCENTILES}

    def supports(self, percentile: float) -> bool:
        """Tell whether enough samples lie above a percentile for it to mean something."""
        # Rounded: 5 % of 100 samples are not quite 5 in floating point.
        return round(self.count * (100 - percentile) / 100, 6) >= SAMPLES_ABOVE
