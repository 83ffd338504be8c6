"""What becomes of requests, as one process takes it down and hands it on."""

from array import array
from collections import Counter
from dataclasses import dataclass
from threading import Condition

import grpc
import numpy as np

from clients.bench.latencies import Latencies

NOT_SENT = "NOT_SENT"


@dataclass(frozen=True, slots=True)
class Tally:
    """What one process counted of the requests that were due in the measured time.

    Attributes:
        offered: How many there were.
        good: Answered within the objective.
        answered_in_time: Answers that arrived in the measured time, whenever they were due.
        errors: The rest, by gRPC status, or NOT_SENT where the client gave up.
        latency: Of the answered ones, from the intended time to the answer.
        lag: From the intended time to the sending: the client's own part of the latency.
        cores: Processors that this process kept busy.
    """

    offered: int
    good: int
    answered_in_time: int
    errors: dict[str, int]
    latency: Latencies
    lag: Latencies
    cores: float


class Notes:
    """Takes down how requests end; called from several threads.

    Args:
        begin_s: When the measured time begins.
        end_s: When it ends.
        slo_s: What a good answer may take.
    """

    def __init__(self, begin_s: float, end_s: float, slo_s: float | None) -> None:
        self._begin_s, self._end_s = begin_s, end_s
        self._slo_s = float("inf") if slo_s is None else slo_s
        # Counted into histograms after the run, which would cost each request too much.
        self._latencies_s, self._lags_s = array("d"), array("d")
        self._answered_in_time = 0
        self._errors: Counter[str] = Counter()
        self._in_flight = 0
        # Guards the fields above; notified when nothing is in flight.
        self._changed = Condition()

    @property
    def in_flight(self) -> int:
        """Requests that were sent and have not ended."""
        return self._in_flight

    def sent(self) -> None:
        """A request goes out."""
        with self._changed:
            self._in_flight += 1

    def ended(self, intended_s: float, sent_s: float, done_s: float, code: grpc.StatusCode) -> None:
        """A request was answered, or ended otherwise."""
        with self._changed:
            self._in_flight -= 1
            if not self._in_flight:
                self._changed.notify_all()
            if code is not grpc.StatusCode.OK:
                self._failed(intended_s, code.name)
                return
            self._answered_in_time += self._begin_s <= done_s < self._end_s
            if self._is_measured(intended_s):
                self._latencies_s.append(done_s - intended_s)
                self._lags_s.append(sent_s - intended_s)

    def not_sent(self, intended_s: float) -> None:
        """The client gave up on a request."""
        with self._changed:
            self._failed(intended_s, NOT_SENT)

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Waits until every request has ended; tells whether that came."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._in_flight, timeout_s)

    def tally(self, cores: float) -> Tally:
        """Sums up."""
        with self._changed:
            latencies_s = np.array(self._latencies_s)
            return Tally(
                offered=len(latencies_s) + sum(self._errors.values()),
                good=int((latencies_s <= self._slo_s).sum()),
                answered_in_time=self._answered_in_time,
                errors=dict(self._errors),
                latency=Latencies.of(latencies_s),
                lag=Latencies.of(np.array(self._lags_s)),
                cores=cores,
            )

    def _failed(self, intended_s: float, name: str) -> None:
        if self._is_measured(intended_s):
            self._errors[name] += 1

    def _is_measured(self, intended_s: float) -> bool:
        return self._begin_s <= intended_s < self._end_s
