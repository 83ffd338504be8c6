"""The batch sizes: how many images a batch is filled up to.

They are chosen by the durations that the warm-up measured. In service, a batch now and then is
filled to the next smaller or larger size, and a size that is clearly faster replaces the chosen
one. What is compared ran under the same load a moment apart, so a machine that slows down as a
whole changes nothing.
"""

import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from convoy.server.batching.latency import throughput

# Of the sizes that are this close to the best, the smallest has the shortest latency. Device time
# is lost for good; during a hand-over another worker may use the device, if enough is queued.
_NEARLY_BEST_RUN = 1.03
_NEARLY_BEST_THROUGHPUT = 0.9
_BEST_THROUGHPUT = 0.99
# One batch in so many is of another size. It may delay its requests, so they are fewer than one in
# a hundred.
TRY_EVERY = 256
# So many tries of a size decide, by their median.
TRIES = 5
# What a size must gain to replace the chosen one: more than the noise of the median.
_LEAST_GAIN = 1.05
_RECENT_RUNS = 15
# With fewer sizes a line says little that they do not.
_LEAST_SIZES_OF_A_LINE = 4
# Times that are further above the line count little in it: they were disturbed.
_DISTURBED = 0.03
_DISTURBED_WEIGHT = 0.25
# Half of the times are this close to the line where the duration is linear in the size.
_LINEAR = 0.08
# Times that are further above the line are kept: the device may be slower from there on.
_OFF_THE_LINE = 0.1


def smoothed(times_s: Mapping[int, float]) -> dict[int, float]:
    """Return the times on a line through them, or the times themselves where none fits.

    Most devices take a fixed time and one for each image. A line knows both by all sizes together,
    so that the noise of a single size does not decide which one is chosen.
    """
    sizes = sorted(times_s)
    taken_s = np.array([times_s[size] for size in sizes])
    if len(sizes) < _LEAST_SIZES_OF_A_LINE or not taken_s.all():
        return dict(times_s)
    line_s = _line_s(sizes, taken_s, 1 / taken_s)
    for _ in range(2):
        disturbed = taken_s > (1 + _DISTURBED) * line_s
        line_s = _line_s(sizes, taken_s, np.where(disturbed, _DISTURBED_WEIGHT, 1.0) / taken_s)
    apart = taken_s / line_s - 1
    if np.median(np.abs(apart)) > _LINEAR:
        return dict(times_s)
    kept_s = np.where(apart > _OFF_THE_LINE, taken_s, line_s)
    return dict(zip(sizes, kept_s.tolist(), strict=True))


def _line_s(
    sizes: Sequence[int], taken_s: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    image_s, fixed_s = np.polyfit(sizes, taken_s, 1, w=weights)
    line_s = max(float(fixed_s), 0.0) + float(image_s) * np.array(sizes, np.float64)
    least_s = float(taken_s.min()) / 2
    return line_s.clip(least_s)


def preferred_size(times_s: Mapping[int, float], slo_s: float = float("inf")) -> int:
    """Return the measured size to fill batches up to while little is queued.

    It is the smallest size that is nearly the best, by device time and by throughput. Under an
    SLO, a request that just missed a batch waits for that batch and then for its own, so two
    runs must fit (H. Shen et al., "Nexus", SOSP 2019, section 3.3).

    Args:
        times_s: The duration of a run by batch size.
        slo_s: The time to answer a request in.
    """
    return _smallest_size(times_s, _NEARLY_BEST_THROUGHPUT, slo_s)


def largest_size(times_s: Mapping[int, float], slo_s: float = float("inf")) -> int:
    """Return the measured size to fill batches up to while much is queued.

    It has nearly no hand-over cost; all else is chosen as for `preferred_size`.
    """
    return _smallest_size(times_s, _BEST_THROUGHPUT, slo_s)


def _smallest_size(times_s: Mapping[int, float], least_share: float, slo_s: float) -> int:
    allowed = [size for size in sorted(times_s) if 2 * times_s[size] <= slo_s] or [min(times_s)]
    best_run_s = min(times_s[size] / size for size in allowed)  # of one image
    best = max(throughput(size, times_s[size]) for size in allowed)
    nearly_best = (
        size
        for size in allowed
        if times_s[size] / size <= _NEARLY_BEST_RUN * best_run_s
        and throughput(size, times_s[size]) >= least_share * best
    )
    return next(nearly_best, max(allowed, key=lambda size: throughput(size, times_s[size])))


class BatchSize:
    """A batch size that follows the throughput in service.

    Args:
        size: The size that was chosen at first, in images.
        candidates: The sizes that may replace it; empty for none.

    Attributes:
        size: The chosen size now.
        due: The size to fill the next batch to if enough is queued; 0 for the chosen one.
    """

    def __init__(self, size: int, candidates: Iterable[int] = ()) -> None:
        self._candidates = sorted({size, *candidates})
        self._recent_s: deque[float] = deque(maxlen=_RECENT_RUNS)
        self._gains: dict[int, list[float]] = {}
        self._runs = self._turn = 0
        self.size = size
        self.due = 0

    @property
    def greatest(self) -> int:
        """The greatest size that may be chosen."""
        return self._candidates[-1]

    def ran(self, size: int, seconds: float) -> bool:
        """Learn from a run under load; return whether the chosen size changed."""
        if size == self.size:
            self._recent_s.append(seconds)
            self._runs += 1
            if self._runs % TRY_EVERY == 0:
                self._try_next()
            return False
        return size == self.due and self._tried(size, seconds)

    def move(self, size: int) -> None:
        """Choose a size; what was learned beside another one no longer counts."""
        self.size, self.due = size, 0
        self._recent_s.clear()
        self._gains.clear()

    def _try_next(self) -> None:
        place = self._candidates.index(self.size)
        neighbors = self._candidates[max(0, place - 1) : place] + self._candidates[place + 1 :][:1]
        if neighbors:
            self._turn += 1
            self.due = neighbors[self._turn % len(neighbors)]

    def _tried(self, size: int, seconds: float) -> bool:
        self.due = 0
        if not self._recent_s:
            return False
        now = throughput(self.size, statistics.median(self._recent_s))
        gains = self._gains.setdefault(size, [])
        gains.append(throughput(size, seconds) / now)
        if len(gains) < TRIES:
            return False
        if statistics.median(gains) < _LEAST_GAIN:
            gains.clear()
            return False
        self.move(size)
        return True


class BatchSizes:
    """The two batch sizes of a model: for a short queue and for a long one.

    Args:
        preferred: While little is queued.
        largest: While much is queued; at least as large.
        candidates: The sizes that may replace them, all of which ran at warm-up; empty for none.

    Attributes:
        preferred: The one in use now.
        largest: The one in use now.
    """

    def __init__(self, preferred: int, largest: int, candidates: Iterable[int] = ()) -> None:
        candidates = tuple(candidates)
        self.preferred = BatchSize(preferred, candidates)
        self.largest = BatchSize(largest, candidates)

    def ran(self, size: int, seconds: float) -> bool:
        """Learn from a run under load; return whether one of the sizes changed."""
        grew = self.preferred.ran(size, seconds)
        if grew and self.preferred.size > self.largest.size:
            self.largest.move(self.preferred.size)
        shrank = self.largest.ran(size, seconds)
        if shrank and self.largest.size < self.preferred.size:
            self.preferred.move(self.largest.size)
        return grew or shrank
