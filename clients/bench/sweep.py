"""The search for the highest rate that an objective allows."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from clients.bench.generator import Measurement

PERCENTILE = 99.0

_PRECISION = 1.05
_MOST_RUNS = 24
_LEAST_RATE_PER_S = 1.0


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a search found.

    Attributes:
        runs: All of them, as they were made.
        rate_per_s: The highest rate that held the objective, and held it again; None if none did.
    """

    runs: tuple[Measurement, ...]
    rate_per_s: float | None


def find_highest_rate(measure: Callable[[float], Measurement], start_per_s: float) -> Sweep:
    """Searches for the highest rate at which 99 % of all that was due is answered in time.

    Doubles or halves until the objective is lost or held, narrows the gap to 5 %, and measures the
    found rate once more: where the objective is not held again, the next lower rate is tried.

    Args:
        measure: Makes a run at a rate; its plan has an objective.
        start_per_s: Where to begin.
    """
    runs: list[Measurement] = []

    def holds(rate_per_s: float) -> bool:
        runs.append(measure(rate_per_s))
        return runs[-1].holds(PERCENTILE)

    held, lost = 0.0, math.inf
    rate_per_s = start_per_s
    while len(runs) < _MOST_RUNS and rate_per_s >= _LEAST_RATE_PER_S:
        if holds(rate_per_s):
            held = rate_per_s
        else:
            lost = rate_per_s
        if held and lost / held <= _PRECISION:
            break
        rate_per_s = _next(held, lost)
    while held >= _LEAST_RATE_PER_S and len(runs) < 2 * _MOST_RUNS:
        if holds(held):
            return Sweep(tuple(runs), held)
        held /= _PRECISION
    return Sweep(tuple(runs), None)


def _next(held: float, lost: float) -> float:
    if not held:
        return lost / 2
    return held * 2 if math.isinf(lost) else math.sqrt(held * lost)
