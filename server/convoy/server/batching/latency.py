"""The latency model: how long a batch takes on the device, by its size.

It is measured at warm-up and follows the runs in service.
"""

import bisect
from collections.abc import Mapping, Sequence

# Weights of one observation in the running mean and in the running deviation.
_GAIN = 1 / 16
# Its weight in the means of the other sizes. A cause that slows one size down slows them all, and
# another size may not run for long; meanwhile it would seem faster than the sizes that run.
_FOLLOWING_GAIN = 1 / 64
# A stall counts in the deviation; the mean follows it no further than this.
_MAX_RATIO = 2.0
# Mean plus four mean deviations bounds nearly all runs: V. Jacobson, "Congestion Avoidance and
# Control", SIGCOMM 1988, estimates round trips so.
_DEVIATIONS = 4.0
# Before a run in service showed the spread.
_FIRST_DEVIATION = 0.1
# So many runs in a row that differ from their prediction by at least this factor are no stall: the
# device has become slower or faster as a whole, and the prediction jumps.
_JUMP_RATIO = 4.0
_JUMP_RUNS = 3
# The cost of a batch besides its run: two thread switches and a wake-up of the event loop.
HANDOVER_S = 0.0002


class RunningTail:
    """A running mean and a bound that nearly no recent observation exceeds.

    Attributes:
        mean_s: The running mean.
    """

    def __init__(self) -> None:
        self.mean_s = 0.0
        self._deviation_s = 0.0

    @property
    def tail_s(self) -> float:
        """The mean and some deviations."""
        return self.mean_s + _DEVIATIONS * self._deviation_s

    def observe(self, seconds: float) -> None:
        """Learn from an observation."""
        error_s = seconds - self.mean_s
        self.mean_s += _GAIN * error_s
        self._deviation_s += _GAIN * (abs(error_s) - self._deviation_s)


def throughput(size: int, run_s: float) -> float:
    """Return images per second in batches of a size, hand-over included."""
    return size / (run_s + HANDOVER_S)


class LatencyModel:
    """Predicts the duration of a run from the durations that were measured.

    Between measured sizes it interpolates, beyond the largest it extrapolates in proportion.
    Without any measurement it predicts 0, so that no request is rejected for its deadline.

    Several devices are measured and tracked apart. Which of them a request will run on is unknown,
    so the prediction for each size is that of the slowest device.

    Args:
        measured_s: For each device, the seconds of a run by batch size, size 1 included; the same
            sizes on all devices.
        pads: Whether batches are padded to a measured size, as devices need that prepare themselves
            for each new shape.
    """

    def __init__(self, *measured_s: Mapping[int, float], pads: bool = False) -> None:
        self._sizes = tuple(sorted(measured_s[0])) if measured_s else ()
        # By device, then by size.
        self._measured_s = [[table_s[size] for size in self._sizes] for table_s in measured_s]
        self._means_s = [list(means_s) for means_s in self._measured_s]
        self._deviations_s = [
            [_FIRST_DEVIATION * mean_s for mean_s in means_s] for means_s in self._means_s
        ]
        # Of the slowest device, by size.
        self._slowest_s: list[float] = []
        self._tails_s: list[float] = []
        # By device: the ratios of the latest runs, while all of them were far too long or short.
        self._far: list[list[float]] = [[] for _ in measured_s]
        self._find_slowest()
        self._pads = pads

    @property
    def table_s(self) -> dict[int, float]:
        """The expected duration of each measured size."""
        return dict(zip(self._sizes, self._slowest_s, strict=True))

    def padded(self, size: int) -> int:
        """Return the size that a batch is run with."""
        if not self._pads or not self._sizes or size > self._sizes[-1]:
            return size
        return self._sizes[bisect.bisect_left(self._sizes, size)]

    def mean_s(self, size: int) -> float:
        """Return the expected duration of a run."""
        return self._at(size, self._slowest_s)

    def mean_on_s(self, device: int, size: int) -> float:
        """Return the expected duration of a run on one of the devices."""
        return self._at(size, self._means_s[device]) if self._sizes else 0.0

    def tail_s(self, size: int) -> float:
        """Return a bound that nearly no run of this size exceeds."""
        return self._at(size, self._tails_s)

    def throughput(self, size: int) -> float:
        """Return images per second in batches of a size, hand-over included."""
        return throughput(size, self.mean_s(size))

    def observe(self, size: int, actual_s: float, device: int = 0) -> None:
        """Learn from a run on one of the devices; its size includes the padding."""
        if not self._sizes:
            return
        means_s, deviations_s = self._means_s[device], self._deviations_s[device]
        measured_s = self._measured_s[device]
        expected_s = self._at(size, means_s)
        nearest = min(bisect.bisect_left(self._sizes, size), len(self._sizes) - 1)
        ratio = actual_s / expected_s if expected_s else 1.0
        if self._jumps(device, nearest, ratio):
            return
        means_s[nearest] *= 1 + _GAIN * (min(ratio, _MAX_RATIO) - 1)
        deviations_s[nearest] += _GAIN * (abs(actual_s - expected_s) - deviations_s[nearest])
        slowdown = means_s[nearest] / measured_s[nearest] if measured_s[nearest] else 1.0
        for index, mean_s in enumerate(means_s):
            if index != nearest:
                means_s[index] += _FOLLOWING_GAIN * (slowdown * measured_s[index] - mean_s)
        self._find_slowest()

    def _jumps(self, device: int, nearest: int, ratio: float) -> bool:
        """Correct the predictions at once after some runs in a row that were far off.

        Returns:
            Whether it did; there is nothing more to learn from the run then.
        """
        far = self._far[device]
        if 1 / _JUMP_RATIO < ratio < _JUMP_RATIO:
            far.clear()
            return False
        if far and (far[-1] > 1) != (ratio > 1):
            far.clear()
        far.append(ratio)
        if len(far) < _JUMP_RUNS:
            return False
        means_s, deviations_s = self._means_s[device], self._deviations_s[device]
        # Whatever slows one size down slows them all. What is fast again was seen of one only; the
        # others follow it, or show it by runs of their own.
        slower = ratio > 1
        factor = min(far) if slower else max(far)
        for index in range(len(means_s)) if slower else (nearest,):
            means_s[index] *= factor
            deviations_s[index] = _FIRST_DEVIATION * means_s[index]
        far.clear()
        self._find_slowest()
        return True

    def _find_slowest(self) -> None:
        """Compute the predictions for each size from those of the devices."""
        self._slowest_s = [max(means_s) for means_s in zip(*self._means_s, strict=True)]
        self._tails_s = [0.0] * len(self._sizes)
        for means_s, deviations_s in zip(self._means_s, self._deviations_s, strict=True):
            for index, mean_s in enumerate(means_s):
                tail_s = mean_s + _DEVIATIONS * deviations_s[index]
                self._tails_s[index] = max(self._tails_s[index], tail_s)

    def _at(self, size: int, values: Sequence[float]) -> float:
        sizes = self._sizes
        if not sizes:
            return 0.0
        above = bisect.bisect_left(sizes, size)
        if above == len(sizes):
            return values[-1] * size / sizes[-1]
        if sizes[above] == size or above == 0 or self._pads:
            return values[above]
        low, high = sizes[above - 1], sizes[above]
        share = (size - low) / (high - low)
        return values[above - 1] + share * (values[above] - values[above - 1])
