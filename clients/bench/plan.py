"""How one run goes."""

from dataclasses import dataclass

from clients.bench import BenchError
from clients.bench.arrivals import Arrivals, Constant, Poisson, Share


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """So many requests are always under way: an answer sets off the next one."""

    concurrency: int

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise BenchError(f"concurrency: expected at least 1, got {self.concurrency}")

    def part_of(self, share: Share) -> int:
        """Returns how many of them fall to one process."""
        return self.concurrency // share.of + (share.index < self.concurrency % share.of)

    def __str__(self) -> str:
        return f"closed, {self.concurrency}"


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Requests go out at their times, whatever became of those before."""

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
        slo_s: An answer that took no longer is good; None where there is no objective.
        timeout_s: The deadline that each request carries, from when it was sent.
        max_in_flight: Where a process of an open loop has so many requests under way it gives up
            on the next ones, which count as errors: the client's memory is bounded.
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
