"""When a call's time begins, and how long it may take."""

import pytest
from prometheus_client import CollectorRegistry

from convoy.server.grpc.context import GrpcBoundary
from convoy.server.metrics.requests import ServerMetrics


class Context:
    """A call as grpcio shows it, of which no arrival is known."""

    def __init__(self, remaining_s: float | None = None) -> None:
        self._remaining_s = remaining_s

    def time_remaining(self) -> float | None:
        return self._remaining_s

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"


class StampedContext(Context):
    """A call of the h2corn transport: it came a while before its turn."""

    arrived_at_s = 9.5


@pytest.mark.parametrize(
    ("context", "started_s", "deadline_s"),
    [
        (Context(), 10.0, 11.0),
        (Context(0.25), 10.0, 10.25),
        (StampedContext(), 9.5, 10.5),
        (StampedContext(0.25), 9.5, 10.25),
        (StampedContext(5.0), 9.5, 10.5),
    ],
)
def test_the_objective_counts_from_the_arrival(context, started_s, deadline_s):
    boundary = GrpcBoundary(ServerMetrics(CollectorRegistry()), lambda: 10.0, slo_s=1.0)
    call = boundary.answering("ModelInfer", context)
    assert (call.started_s, call.deadline_s) == (started_s, deadline_s)
