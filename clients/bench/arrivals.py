"""When an open loop sends: times in seconds from its start, fixed before the run.

Several processes share one stream of arrivals: each takes its part, and the parts together are the
whole. The sum of independent Poisson streams is a Poisson stream of the summed rate.
"""

import csv
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from clients.bench import BenchError

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
        """Yields the rising times of one part; may go on for ever."""


@dataclass(frozen=True, slots=True)
class Constant:
    """One request every 1 / rate seconds."""

    rate_per_s: float

    def times_s(self, share: Share) -> Iterator[float]:
        """Yields every `share.of`-th time."""
        for number in itertools.count(share.index, share.of):
            yield number / self.rate_per_s


@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent users: exponential gaps. The same seed gives the same times."""

    rate_per_s: float
    seed: int = 0

    def times_s(self, share: Share) -> Iterator[float]:
        """Yields a Poisson stream of its own for each part."""
        random = np.random.default_rng([self.seed, share.index])
        time_s = 0.0
        while True:
            for gap_s in random.exponential(share.of / self.rate_per_s, _GAPS_AT_ONCE):
                time_s += float(gap_s)
                yield time_s


@dataclass(frozen=True, slots=True)
class Trace:
    """Recorded arrivals, played back as they were."""

    recorded_s: tuple[float, ...]

    @classmethod
    def read(cls, path: Path) -> "Trace":
        """Reads the first column of a CSV file, seconds in rising order; a heading may stand above.

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
            raise BenchError(f"--trace: {path}: expected at least two times, seconds that rise")
        for earlier, later in itertools.pairwise(times_s):
            if later < earlier:
                raise BenchError(f"--trace: {path}: {later:g} comes after {earlier:g}")
        return cls(tuple(time_s - times_s[0] for time_s in times_s))

    @property
    def rate_per_s(self) -> float:
        """The average over its length."""
        return (len(self.recorded_s) - 1) / self.recorded_s[-1]

    def times_s(self, share: Share) -> Iterator[float]:
        """Yields every `share.of`-th time."""
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
