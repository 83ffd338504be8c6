"""One run: a closed or an open loop, its length, objective and deadline.

The sending times of an open loop are fixed before the run. Several processes share one stream of
arrivals, each takes a part of it. The sum of independent Poisson streams is a Poisson stream.
"""

import csv
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from convoy.client.bench import BenchError

_GAPS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Share:
    """One of several equal parts, counted from 0."""

    index: int = 0
    of: int = 1


class Arrivals(Protocol):
    """A stream of sending times."""

    @property
    def rate_per_s(self) -> float:
        """How many requests it offers each second, on average."""

    def times_s(self, share: Share) -> Iterator[float]:
        """Yield the rising times of one part; may be endless."""


@dataclass(frozen=True, slots=True)
class Constant:
    """One request every 1 / rate seconds."""

    rate_per_s: float

    def times_s(self, share: Share) -> Iterator[float]:
        """Yield every `share.of`-th time."""
        for number in itertools.count(share.index, share.of):
            yield number / self.rate_per_s


@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent users: exponential gaps. The same seed gives the same times."""

    rate_per_s: float
    seed: int = 0

    def times_s(self, share: Share) -> Iterator[float]:
        """Yield a Poisson stream of its own for each part."""
        random = np.random.default_rng([self.seed, share.index])
        time_s = 0.0
        while True:
            for gap_s in random.exponential(share.of / self.rate_per_s, _GAPS_AT_ONCE):
                time_s += float(gap_s)
                yield time_s


@dataclass(frozen=True, slots=True)
class Trace:
    """Recorded arrivals, replayed."""

    recorded_s: tuple[float, ...]

    @classmethod
    def read(cls, path: Path) -> "Trace":
        """Read the first column of a CSV file, seconds in rising order; a heading may stand above.

        The first arrival is moved to 0.

        Raises:
            BenchError: It cannot be read, holds no time, or they do not rise.
        """
        try:
            with path.open(newline="", encoding="utf-8") as file:
                cells = [row[0] for row in csv.reader(file) if row]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise BenchError(f"--trace: {path}: {error}") from error
        times_s = [
            _seconds(path, line, cell) for line, cell in enumerate(cells) if line or _is(cell)
        ]
        if len(times_s) < 2 or times_s[-1] <= times_s[0]:
            raise BenchError(f"--trace: {path}: expected at least two times, in seconds and rising")
        for earlier, later in itertools.pairwise(times_s):
            if later < earlier:
                raise BenchError(f"--trace: {path}: {later:g} comes after {earlier:g}")
        return cls(tuple(time_s - times_s[0] for time_s in times_s))

    @property
    def rate_per_s(self) -> float:
        """The average over its length."""
        return (len(self.recorded_s) - 1) / self.recorded_s[-1]

    def times_s(self, share: Share) -> Iterator[float]:
        """Yield every `share.of`-th time."""
        return iter(self.recorded_s[share.index :: share.of])


def _is(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def _seconds(path: Path, line: int, cell: str) -> float:
    if not _is(cell):
        raise BenchError(f"--trace: {path}: row {line + 1}: expected seconds, got {cell!r}")
    return float(cell)


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """A fixed number of requests is in flight: each answer triggers the next request."""

    concurrency: int

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise BenchError(f"concurrency: expected at least 1, got {self.concurrency}")

    def part_of(self, share: Share) -> int:
        """Return how many of them one process sends."""
        return self.concurrency // share.of + (share.index < self.concurrency % share.of)

    def __str__(self) -> str:
        return f"closed, {self.concurrency}"


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Requests are sent at fixed times, whether or not earlier ones were answered."""

    arrivals: Arrivals

    def __post_init__(self) -> None:
        if not self.arrivals.rate_per_s > 0:
            raise BenchError(f"rate: expected above 0, got {self.arrivals.rate_per_s:g}")

    def __str__(self) -> str:
        kind = {Constant: "constant", Poisson: "Poisson"}.get(type(self.arrivals), "trace")
        return f"{kind}, {self.arrivals.rate_per_s:.4g}/s"


@dataclass(frozen=True, slots=True)
class Plan:
    """One run.

    Attributes:
        load: Closed or open.
        warmup_s: Load of the same kind before anything is counted.
        duration_s: Requests meant for this stretch of time are counted.
        slo_s: An answer within this time is good; None without an objective.
        timeout_s: The deadline that each request carries, from when it was sent.
        max_in_flight: A process of an open loop with this many requests in flight drops further
            ones, which count as errors, so that the client's memory is bounded.
    """

    load: ClosedLoop | OpenLoop
    warmup_s: float = 1.0
    duration_s: float = 5.0
    slo_s: float | None = None
    timeout_s: float = 10.0
    max_in_flight: int = 20_000

    @property
    def length_s(self) -> float:
        """For how long requests are sent."""
        return self.warmup_s + self.duration_s
