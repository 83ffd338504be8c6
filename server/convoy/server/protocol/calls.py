"""The status, metrics and deadline of every request."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeVar

from convoy.server.batching import Clock
from convoy.server.errors import (
    DeadlineExceededError,
    InferenceError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
    UnavailableError,
    UnsupportedError,
)
from convoy.server.logs import FailureLog
from convoy.server.metrics.requests import RequestMetrics, ServerMetrics
from convoy.server.models.registry import Lease, ServedModel
from convoy.server.requests import Images, Outcome, Prediction


class Status(StrEnum):
    """The statuses that a request can end with; the values label metrics."""

    OK = "OK"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    NOT_FOUND = "NOT_FOUND"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    UNAVAILABLE = "UNAVAILABLE"
    INTERNAL = "INTERNAL"
    UNKNOWN = "UNKNOWN"

    # Enum's own is Python code, and a status is looked up several times a request.
    __hash__ = str.__hash__


STATUS_OF: dict[type[RequestError], Status] = {
    InvalidRequestError: Status.INVALID_ARGUMENT,
    UnsupportedError: Status.UNIMPLEMENTED,
    ModelNotFoundError: Status.NOT_FOUND,
    OverloadedError: Status.RESOURCE_EXHAUSTED,
    DeadlineExceededError: Status.DEADLINE_EXCEEDED,
    UnavailableError: Status.UNAVAILABLE,
    InferenceError: Status.INTERNAL,
}
OUTCOME_OF: dict[Status, Outcome] = {
    Status.OK: Outcome.OK,
    Status.INVALID_ARGUMENT: Outcome.INVALID,
    Status.UNAUTHENTICATED: Outcome.INVALID,
    Status.NOT_FOUND: Outcome.INVALID,
    Status.UNIMPLEMENTED: Outcome.INVALID,
    Status.RESOURCE_EXHAUSTED: Outcome.FULL,
    Status.DEADLINE_EXCEEDED: Outcome.DEADLINE,
    Status.CANCELLED: Outcome.CANCELLED,
    Status.UNAVAILABLE: Outcome.UNAVAILABLE,
    Status.INTERNAL: Outcome.BACKEND,
    Status.UNKNOWN: Outcome.BACKEND,
}


_NO_DEADLINE = float("inf")

Reply = TypeVar("Reply")
# The arguments of a Call: its arrival, its deadline and whether the transport enforces it, its
# boundary, its caller.
Arrival = tuple[float, float, bool, "CallBoundary", str]

# Other RPCs are timed but have no outcome.
INFERENCE_METHODS = frozenset(
    {"Classify", "ClassifyBatch", "ClassifyStream", "ModelInfer", "ModelStreamInfer", "RestInfer"}
)
# A caller's clock began a network's latency before the server's, so its reset for a deadline comes
# that much before the server sees the deadline pass; for short deadlines at most half of them.
_EARLY_S = 0.05


class DisconnectedError(asyncio.CancelledError):
    """The caller reset the stream or closed the connection."""


class Caller(Protocol):
    """The caller of a request."""

    def time_remaining(self) -> float | None:
        """Return the seconds until the deadline; None without one."""

    def peer(self) -> str:
        """Return the caller's address, such as ipv4:127.0.0.1:5000."""


@dataclass(frozen=True, slots=True)
class Failure:
    """How a failed request ended.

    Attributes:
        message: For the caller.
        retry_after_ms: When to try again; 0 if that would not help.
    """

    status: Status
    message: str
    retry_after_ms: int = 0


class Call:
    """One request that is being answered.

    Attributes:
        started_s: When it arrived, on the batcher's clock.
        deadline_s: On the batcher's clock; infinity without one.
        requests: Counts it.
        client: Its caller, if the share of one client is limited; otherwise empty.
    """

    __slots__ = (
        *("_boundary", "_ends_itself", "_lease"),
        *("client", "deadline_s", "requests", "started_s"),
    )

    def __init__(
        self,
        started_s: float,
        deadline_s: float,
        ends_itself: bool,
        boundary: "CallBoundary",
        client: str = "",
    ) -> None:
        self.started_s = started_s
        self.deadline_s = deadline_s
        self.requests = boundary.unknown_model
        self.client = client
        self._ends_itself = ends_itself
        self._boundary = boundary
        self._lease: Lease | None = None

    def uses(self, model: ServedModel) -> ServedModel:
        """Hold the model until the call ends, count the call for it, and return it."""
        self._hold(model.lease())
        self.requests = model.requests
        return model

    def within(self, timeout_s: float) -> float:
        """Limit the deadline to this time after the call's arrival, and return it."""
        deadline_s = self.started_s + timeout_s
        if deadline_s < self.deadline_s:
            self.deadline_s = deadline_s
            self._ends_itself = False
        return self.deadline_s

    def infer(self, model: ServedModel, images: Images, priority: int = 0) -> Awaitable[Prediction]:
        """Run images `[N, H, W, 3]` in the model's batches, until the deadline at most.

        Raises:
            RequestError: As `DynamicBatcher.infer`.
        """
        prediction = model.batcher.infer(images, self.deadline_s, priority, self.client)
        return prediction if self._ends_itself else self._in_time(prediction)

    async def _in_time(self, prediction: Awaitable[Prediction]) -> Prediction:
        try:
            async with asyncio.timeout(self.deadline_s - time.monotonic()):
                return await prediction
        except TimeoutError:
            raise DeadlineExceededError("the deadline passed before the answer was ready") from None

    def failure_of(self, error: BaseException, now_s: float) -> Failure:
        """Return the failure to send for an error; details that callers must not see are logged."""
        if isinstance(error, asyncio.CancelledError):
            # gRPC cancels a call whose deadline passed just as a caller does.
            late = is_late(self.deadline_s, self.started_s, now_s)
            return Failure(
                Status.DEADLINE_EXCEEDED if late else Status.CANCELLED, "the caller disconnected"
            )
        if isinstance(error, RequestError) and not isinstance(error, InferenceError):
            return rejection_of(error)
        # The process that ran the model has logged its failures.
        error_id = isinstance(error, InferenceError) and error.error_id
        error_id = error_id or self._boundary.failures.record("request failed", error)
        return Failure(
            Status.INTERNAL, f"internal error; the server's log has the details under id {error_id}"
        )

    def finished(self, method: str, status: Status, ended_s: float) -> None:
        """Count the call, by its method and the status it ended with, and release its model."""
        self._hold(None)
        trace_id = self._boundary.trace_id
        exemplar = trace_id() if trace_id else ""
        self.requests.finished(method, status, ended_s - self.started_s, exemplar)
        if method in INFERENCE_METHODS:
            self.requests.outcome(OUTCOME_OF[status], self.deadline_s - ended_s)

    def _hold(self, lease: Lease | None) -> None:
        if self._lease:
            self._lease.release()
        self._lease = lease


class CallBoundary:
    """Turns domain errors into failures, and times every request.

    Args:
        metrics: Counts the calls.
        slo_s: The deadline of calls with a later one or none.
        tells_clients_apart: Whether to identify the caller of each call, which costs time.
        trace_id: Returns the id of the current call's trace, or an empty text; None without
            traces.

    Attributes:
        unknown_model: Counts the requests that name no model in service.
        failures: Logs unexpected errors.
        trace_id: As given.

    Example:
        reply = await boundary.attempt("ClassifyStream", context, answer)
        if isinstance(reply, Failure):
            …
    """

    def __init__(
        self,
        metrics: ServerMetrics,
        clock: Clock = time.monotonic,
        *,
        slo_s: float = float("inf"),
        tells_clients_apart: bool = False,
        trace_id: Callable[[], str] | None = None,
    ) -> None:
        self.unknown_model: RequestMetrics = metrics.unknown_model
        self._clock = clock
        self._slo_s = slo_s
        self._tells_clients_apart = tells_clients_apart
        self.failures = FailureLog()
        self.trace_id = trace_id

    async def attempt(
        self, method: str, caller: Caller, answer: Callable[[Call], Awaitable[Reply]]
    ) -> Reply | Failure:
        """Answer a request whose failure is a value: in a stream, or by HTTP."""
        call = Call(*self._arrival(caller, self._clock()))
        status = Status.OK
        try:
            return await answer(call)
        except BaseException as error:
            failure = call.failure_of(error, self._clock())
            status = failure.status
            if not isinstance(error, Exception):
                raise
            return failure
        finally:
            call.finished(method, status, self._clock())

    def rejected(self, method: str, status: Status, started_s: float) -> None:
        """Count a request that ended before a servicer saw it."""
        requests = self.unknown_model
        requests.finished(method, status, self._clock() - started_s)
        if method in INFERENCE_METHODS:
            requests.outcome(OUTCOME_OF[status])

    def _arrival(self, caller: Caller, arrived_at_s: float) -> Arrival:
        deadline_s = arrived_at_s + self._slo_s
        ends_itself = deadline_s == _NO_DEADLINE
        remaining_s = caller.time_remaining()
        if remaining_s is not None:
            callers_s = self._clock() + remaining_s
            if callers_s <= deadline_s:
                deadline_s = callers_s
                ends_itself = True
        client = _host(caller.peer()) if self._tells_clients_apart else ""
        return arrived_at_s, deadline_s, ends_itself, self, client


def is_late(deadline_s: float | None, started_s: float, now_s: float) -> bool:
    """Return whether a call that ends now missed its deadline, even if the caller reset it.

    Args:
        deadline_s: On the same clock as the others; None or infinity without one.
        started_s: When the call arrived.
        now_s: Now.
    """
    if deadline_s is None:
        return False
    return now_s >= deadline_s - min(_EARLY_S, (deadline_s - started_s) / 2)


def rejection_of(error: RequestError) -> Failure:
    """Return the failure for the caller of an error that its message explains."""
    wait_s = error.retry_after_s if isinstance(error, OverloadedError) else 0.0
    return Failure(STATUS_OF[type(error)], str(error), math.ceil(wait_s * 1000))


def _host(peer: str) -> str:
    """Return an address such as ipv4:127.0.0.1:5000 without the port of the connection."""
    return peer.rpartition(":")[0]
