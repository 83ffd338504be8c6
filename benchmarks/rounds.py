"""Candidates that are measured in turn, and again if other processes disturbed them."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

Run = dict[str, Any]
"""The results of a load generator; `other_cores` is the load of other processes, in processors."""
Round = Mapping[str, Run]
"""One load on every candidate, one after the other; ratios are taken within it."""
Measure = Callable[[str, int], Run]
"""Puts a load on a candidate in the round of a number."""


@dataclass(frozen=True, slots=True)
class Turns:
    """How many rounds to make.

    Attributes:
        rounds: Of each load, undisturbed.
        tries: The most rounds to make, as a multiple of `rounds`.
        calm_cores: Processors that other processes may use in an undisturbed round.
        limit_s: No round begins after this time.
    """

    rounds: int = 5
    tries: int = 3
    calm_cores: float = 0.2
    limit_s: float = float("inf")

    def take(
        self,
        loads: Sequence[str],
        up: Callable[[], AbstractContextManager[Mapping[str, Measure]]],
    ) -> dict[str, list[Round]]:
        """Measures every load until it has enough undisturbed rounds.

        Args:
            loads: What the candidates are measured at.
            up: Starts the candidates of a round.

        Returns:
            By load the undisturbed rounds, or the calmest ones where there is none.
        """
        found: dict[str, list[Round]] = {load: [] for load in loads}
        until_s = time.monotonic() + self.limit_s
        for number in range(self.rounds * self.tries):
            lacking = [load for load in loads if self._undisturbed(found[load]) < self.rounds]
            if not lacking or time.monotonic() > until_s:
                break
            with up() as candidates:
                for load in lacking:
                    measured = {name: run(load, number) for name, run in candidates.items()}
                    found[load].append(measured)
            counts = ", ".join(f"{load}: {self._undisturbed(found[load])}" for load in loads)
            print(f"undisturbed rounds at {counts}", file=sys.stderr, flush=True)
        return {load: self._chosen(rounds) for load, rounds in found.items()}

    def _undisturbed(self, rounds: Sequence[Round]) -> int:
        return sum(disturbance(each) <= self.calm_cores for each in rounds)

    def _chosen(self, rounds: Sequence[Round]) -> list[Round]:
        calm = [each for each in rounds if disturbance(each) <= self.calm_cores]
        return calm or sorted(rounds, key=disturbance)[: self.rounds]


def disturbance(measured: Round) -> float:
    """Processors that others kept busy, at most, while a candidate was measured."""
    return max(float(run["other_cores"]) for run in measured.values())


def by_candidate(found: Mapping[str, Sequence[Round]]) -> dict[str, dict[str, list[Run]]]:
    """Turn rounds by load into runs by candidate and load, in the order of the rounds."""
    names = list(next(iter(found.values()))[0])
    return {
        name: {load: [dict(each[name]) for each in rounds] for load, rounds in found.items()}
        for name in names
    }
