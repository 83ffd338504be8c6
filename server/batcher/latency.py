"""How long a batch takes on the device, by its size; measured at warm-up, tracked in service."""

import bisect
from collections.abc import Mapping, Sequence

# Weights of one observation in the running mean and in the running deviation.
_GAIN = 1 / 16
# And in the means of the other sizes: what slows one down slows them all, and it may be long until
# one of them is run again. Until then it would seem better than it is beside those that run.
_FOLLOWING_GAIN = 1 / 64
# A stall shows in the deviation; the mean shall not follow it further than this.
_MAX_RATIO = 2.0
# Mean plus four mean deviations bounds nearly all runs: V. Jacobson, "Congestion Avoidance and
# Control", SIGCOMM 1988, estimates round trips so.
_DEVIATIONS = 4.0
# Before a run in service showed the spread.
_FIRST_DEVIATION = 0.1
# Of sizes that are this close to the best, the smallest answers soonest. Device time is lost for
# good; while a batch is handed over, another instance may use the device, if enough waits for it.
_NEARLY_BEST_RUN = 1.03
_NEARLY_BEST_PACE = 0.9
_BEST_PACE = 0.99
# What a batch costs besides its run: two thread switches and a wake-up of the event loop.
HANDOVER_S = 0.0002


class RunningTail:
    """A time that nearly no observation of late exceeds.

    Attributes:
        mean_s: What they were.
    """

    def __init__(self) -> None:
        self.mean_s = 0.0
        self._deviation_s = 0.0

    @property
    def tail_s(self) -> float:
        """The mean and some deviations."""
        return self.mean_s + _DEVIATIONS * self._deviation_s

    def observe(self, seconds: float) -> None:
        """Learns from an observation."""
        error_s = seconds - self.mean_s
        self.mean_s += _GAIN * error_s
        self._deviation_s += _GAIN * (abs(error_s) - self._deviation_s)


class LatencyModel:
    """Predicts the run time of a batch from those that were measured.

    Between measured sizes it interpolates, beyond the largest it extrapolates in proportion.
    Without any measurement it predicts 0, so nothing is ever refused for it.

    Several devices are measured and tracked apart. Nobody knows which of them a request will meet,
    so what is predicted is what the slowest of them takes, for each size.

    Args:
        measured_s: For each device, seconds of a run by batch size, with one for size 1; of the
            same sizes on all.
        pads: Whether batches are padded to a measured size, as a device wants that prepares itself
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
        self._slowest_s = [0.0] * len(self._sizes)
        self._tails_s = [0.0] * len(self._sizes)
        for index in range(len(self._sizes)):
            self._find_slowest(index)
        self._pads = pads

    @property
    def table_s(self) -> dict[int, float]:
        """The expected run time of each measured size."""
        return dict(zip(self._sizes, self._slowest_s, strict=True))

    def padded(self, size: int) -> int:
        """Returns the size that a batch is run with."""
        if not self._pads or not self._sizes or size > self._sizes[-1]:
            return size
        return self._sizes[bisect.bisect_left(self._sizes, size)]

    def mean_s(self, size: int) -> float:
        """Returns the expected run time of a batch."""
        return self._at(size, self._slowest_s)

    def mean_on_s(self, device: int, size: int) -> float:
        """Returns the expected run time of a batch on one of the devices."""
        return self._at(size, self._means_s[device]) if self._sizes else 0.0

    def tail_s(self, size: int) -> float:
        """Returns a time that nearly no run of such a batch exceeds."""
        return self._at(size, self._tails_s)

    def pace(self, size: int) -> float:
        """Returns images a second in batches of a size, hand-over included."""
        return size / (self.mean_s(size) + HANDOVER_S)

    def preferred_size(self, slo_s: float = float("inf")) -> int:
        """Returns the measured size to fill batches up to while little waits.

        It is the smallest that is nearly the best, on the device and with the hand-over counted.
        Under an SLO a request that just missed a batch waits for it and then for its own, so two
        runs must fit (H. Shen et al., "Nexus", SOSP 2019, section 3.3).
        """
        return self._smallest_size(_NEARLY_BEST_PACE, slo_s)

    def largest_size(self, slo_s: float = float("inf")) -> int:
        """Returns the measured size to fill batches up to while much waits.

        It hands over as seldom as brings anything; the rest is chosen as for `preferred_size`.
        """
        return self._smallest_size(_BEST_PACE, slo_s)

    def _smallest_size(self, least_pace: float, slo_s: float) -> int:
        allowed = [size for size in self._sizes if 2 * self.mean_s(size) <= slo_s] or [1]
        best_run_s = min(self.mean_s(size) / size for size in allowed)  # of an image
        best_pace = max(map(self.pace, allowed))
        nearly_best = (
            size
            for size in allowed
            if self.mean_s(size) / size <= _NEARLY_BEST_RUN * best_run_s
            and self.pace(size) >= least_pace * best_pace
        )
        return next(nearly_best, max(allowed, key=self.pace))

    def observe(self, size: int, actual_s: float, device: int = 0) -> None:
        """Learns from a run on one of the devices; its size includes the padding."""
        if not self._sizes:
            return
        means_s, deviations_s = self._means_s[device], self._deviations_s[device]
        expected_s = self._at(size, means_s)
        nearest = min(bisect.bisect_left(self._sizes, size), len(self._sizes) - 1)
        ratio = min(actual_s / expected_s, _MAX_RATIO) if expected_s else 1.0
        means_s[nearest] *= 1 + _GAIN * (ratio - 1)
        error_s = abs(actual_s - expected_s)
        deviations_s[nearest] += _GAIN * (error_s - deviations_s[nearest])
        self._follow(device, nearest)

    def _follow(self, device: int, leader: int) -> None:
        """Lets the other sizes follow one whose mean has changed."""
        means_s, measured_s = self._means_s[device], self._measured_s[device]
        slowdown = means_s[leader] / measured_s[leader] if measured_s[leader] else 1.0
        for index, mean_s in enumerate(means_s):
            if index != leader:
                means_s[index] += _FOLLOWING_GAIN * (slowdown * measured_s[index] - mean_s)
            self._find_slowest(index)

    def _find_slowest(self, index: int) -> None:
        self._slowest_s[index] = max(means_s[index] for means_s in self._means_s)
        self._tails_s[index] = max(
            means_s[index] + _DEVIATIONS * deviations_s[index]
            for means_s, deviations_s in zip(self._means_s, self._deviations_s, strict=True)
        )

    def _at(self, size: int, values: Sequence[float]) -> float:
        if not self._sizes:
            return 0.0
        size = self.padded(size)
        above = bisect.bisect_left(self._sizes, size)
        if above == len(self._sizes):
            return values[-1] * size / self._sizes[-1]
        if self._sizes[above] == size or above == 0:
            return values[above]
        low, high = self._sizes[above - 1], self._sizes[above]
        share = (size - low) / (high - low)
        return values[above - 1] + share * (values[above] - values[above - 1])
