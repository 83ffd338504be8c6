"""What every RPC shares: its status code, its metrics and its deadline."""

import asyncio
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn, Protocol, TypeVar

import grpc
import structlog

from server.batcher import Clock
from server.errors import (
    DeadlineExceededError,
    InferenceError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
    UnavailableError,
    UnsupportedError,
)
from server.metrics import RequestMetrics, ServerMetrics
from server.requests import Outcome
from server.served_model import ServedModel, Users

logger = structlog.get_logger()

Reply = TypeVar("Reply")
# What a Call is made of: when it came, its deadline, what counts it, who makes it.
Arrival = tuple[float, float, RequestMetrics, str]

STATUS_OF: dict[type[RequestError], grpc.StatusCode] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    UnsupportedError: grpc.StatusCode.UNIMPLEMENTED,
    ModelNotFoundError: grpc.StatusCode.NOT_FOUND,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceededError: grpc.StatusCode.DEADLINE_EXCEEDED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    InferenceError: grpc.StatusCode.INTERNAL,
}
# Other RPCs are timed but have no outcome.
INFERENCE_METHODS = frozenset(
    {"Classify", "ClassifyBatch", "ClassifyStream", "ModelInfer", "ModelStreamInfer", "RestInfer"}
)
# gRPC's clients wait so long before they try again (gRFC A6).
_PUSHBACK = "grpc-retry-pushback-ms"
_OUTCOME_OF = {
    grpc.StatusCode.OK: Outcome.OK,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Outcome.FULL,
    grpc.StatusCode.DEADLINE_EXCEEDED: Outcome.DEADLINE,
    grpc.StatusCode.CANCELLED: Outcome.CANCELLED,
    grpc.StatusCode.INVALID_ARGUMENT: Outcome.INVALID,
    grpc.StatusCode.UNIMPLEMENTED: Outcome.INVALID,
    grpc.StatusCode.NOT_FOUND: Outcome.INVALID,
    grpc.StatusCode.UNAVAILABLE: Outcome.UNAVAILABLE,
    grpc.StatusCode.INTERNAL: Outcome.BACKEND,
}


class Caller(Protocol):
    """What is known of who makes a request."""

    def time_remaining(self) -> float | None:
        """Returns the seconds until the deadline; None without one."""

    def peer(self) -> str:
        """Returns the caller's address, such as ipv4:127.0.0.1:5000."""


class Context(Caller, Protocol):
    """What servicers need of a call's context, whichever transport carries it."""

    async def write(self, message: Any) -> None:
        """Sends a message of a reply that streams."""

    async def abort(
        self,
        code: grpc.StatusCode,
        details: str = "",
        trailing_metadata: Sequence[tuple[str, str]] = (),
    ) -> NoReturn:
        """Ends the call with a status; nothing after it in the handler runs."""


@dataclass(frozen=True, slots=True)
class Failure:
    """How a request ended that could not be answered.

    Attributes:
        message: For the caller.
        retry_after_ms: When to try again; 0 where that would not help.
    """

    code: grpc.StatusCode
    message: str
    retry_after_ms: int = 0


class Call:
    """One request that is being answered.

    Attributes:
        started_s: When it came, on the batcher's clock.
        deadline_s: On the batcher's clock; infinity without one.
        requests: Counts it.
        client: Who asks, where the share of one client is bounded.
    """

    __slots__ = ("_held", "client", "deadline_s", "requests", "started_s")

    def __init__(
        self, started_s: float, deadline_s: float, requests: RequestMetrics, client: str = ""
    ) -> None:
        self.started_s = started_s
        self.deadline_s = deadline_s
        self.requests = requests
        self.client = client
        self._held: Users | None = None

    def uses(self, model: ServedModel) -> ServedModel:
        """Holds the model until the call ends, counts the call for it, and returns it."""
        self._hold(model.users)
        self.requests = model.requests
        return model

    def within(self, timeout_s: float) -> float:
        """Brings the deadline to at most so long after the call's arrival, and returns it."""
        self.deadline_s = min(self.deadline_s, self.started_s + timeout_s)
        return self.deadline_s

    def finished(self, method: str, code: grpc.StatusCode, ended_s: float) -> None:
        """Counts the call, by its method and the status it ended with, and lets go of its model."""
        self._hold(None)
        self.requests.finished(method, code.name, ended_s - self.started_s)
        if method in INFERENCE_METHODS:
            self.requests.outcome(_OUTCOME_OF[code], self.deadline_s - ended_s)

    def _hold(self, users: Users | None) -> None:
        if users:
            users.__enter__()
        if self._held:
            self._held.__exit__()
        self._held = users


class GrpcCall(Call):
    """An RPC: leaving its context times it and ends it with the status that fits the error."""

    __slots__ = ("_clock", "_context", "_method")

    def __init__(self, method: str, context: Context, clock: Clock, arrival: Arrival) -> None:
        super().__init__(*arrival)
        self._method = method
        self._context = context
        self._clock = clock

    async def __aenter__(self) -> "GrpcCall":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.finished(self._method, grpc.StatusCode.OK, self._clock())
            return
        failure = failure_of(error, self.deadline_s <= self._clock())
        self.finished(self._method, failure.code, self._clock())
        if isinstance(error, Exception):
            pushback = ((_PUSHBACK, str(failure.retry_after_ms)),) if failure.retry_after_ms else ()
            await self._context.abort(failure.code, failure.message, pushback)


class CallBoundary:
    """Where domain errors become status codes and every RPC is timed.

    Args:
        metrics: Counts the calls.
        slo_s: A deadline for those that bring a later one or none.
        tells_clients_apart: Whether calls say who makes them; it costs time.

    Example:
        async with boundary.answering("Classify", context) as call:
            model = call.uses(catalogue.find(request.model))
            …
    """

    def __init__(
        self,
        metrics: ServerMetrics,
        clock: Clock = time.monotonic,
        *,
        slo_s: float = float("inf"),
        tells_clients_apart: bool = False,
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._slo_s = slo_s
        self._tells_clients_apart = tells_clients_apart

    def answering(self, method: str, context: Context) -> GrpcCall:
        """Returns the call, a context for the body that answers it."""
        # gRPC's C core does not tell when a call came.
        arrived_at_s = getattr(context, "arrived_at_s", None) or self._clock()
        return GrpcCall(method, context, self._clock, self._arrival(context, arrived_at_s))

    async def attempt(
        self, method: str, caller: Caller, answer: Callable[[Call], Awaitable[Reply]]
    ) -> Reply | Failure:
        """Answers a request whose failure is a value: one of a stream, one that is no RPC."""
        call = Call(*self._arrival(caller, self._clock()))
        code = grpc.StatusCode.OK
        try:
            return await answer(call)
        except BaseException as error:
            failure = failure_of(error, call.deadline_s <= self._clock())
            code = failure.code
            if not isinstance(error, Exception):
                raise
            return failure
        finally:
            call.finished(method, code, self._clock())

    def _arrival(self, caller: Caller, arrived_at_s: float) -> Arrival:
        deadline_s = arrived_at_s + self._slo_s
        remaining_s = caller.time_remaining()
        if remaining_s is not None:
            deadline_s = min(deadline_s, self._clock() + remaining_s)
        client = _host(caller.peer()) if self._tells_clients_apart else ""
        return arrived_at_s, deadline_s, self._metrics.unknown_model, client


def failure_of(error: BaseException, late: bool = False) -> Failure:
    """Returns what a caller is told; the log gets what the caller must not see.

    Args:
        error: What was raised.
        late: Whether the deadline has passed: gRPC then cancels the call just as a caller does.
    """
    if isinstance(error, asyncio.CancelledError):
        code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
        return Failure(code, "the caller left")
    code = STATUS_OF.get(type(error), grpc.StatusCode.INTERNAL)  # type: ignore[arg-type]
    if code is not grpc.StatusCode.INTERNAL:
        wait_s = error.retry_after_s if isinstance(error, OverloadedError) else 0.0
        return Failure(code, str(error), math.ceil(wait_s * 1000))
    error_id = uuid.uuid4().hex[:12]
    logger.error("request failed", error_id=error_id, exc_info=error)
    return Failure(code, f"internal error; the server's log explains it under id {error_id}")


def _host(peer: str) -> str:
    """What is left of ipv4:127.0.0.1:5000 without the port, another for each connection."""
    return peer.rpartition(":")[0]
