"""When an answer will be there: the device's run times and the event loop's lag, as last seen."""

from server.batcher.latency import LatencyModel, RunningTail

# So long after the last run an idle device is tried whatever was predicted.
_STALE_S = 0.25


class Forecast:
    """Predicts from what was measured; guarded by the batcher's lock.

    Two answers to one question, because they serve two ends. What is `surely` in time may be
    promised to somebody who asks; what is `likely` in time is worth running, once it was accepted.
    To give up whatever is not sure would let the device idle after a stall, and a device that
    idles shows nobody that the stall is over.

    Args:
        latency: Predicts run times.

    Attributes:
        latency: The same.
    """

    def __init__(self, latency: LatencyModel) -> None:
        self.latency = latency
        self._lag = RunningTail()
        self._ran_at_s = float("-inf")

    def likely_s(self, size: int) -> float:
        """Returns the time from the start of a run until its answers have left, as expected."""
        return self.latency.mean_s(size) + 2 * self._lag.mean_s

    def surely_s(self, size: int) -> float:
        """Returns a time that this nearly never exceeds."""
        return self.latency.tail_s(size) + 2 * self._lag.tail_s

    def is_stale(self, now_s: float) -> bool:
        """Whether nothing ran for a while, so that predictions may no longer be true.

        They may forbid every run, and without a run they would never improve.
        """
        return now_s - self._ran_at_s > _STALE_S

    def ran(self, now_s: float) -> None:
        """A run ended, or the device begins to serve."""
        self._ran_at_s = now_s

    def observe_lag(self, seconds: float) -> None:
        """Learns how long answers took from the end of their run until they had left."""
        self._lag.observe(seconds)
