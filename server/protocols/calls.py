"""What every RPC shares: its status code, its metrics and its deadline."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

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
from server.loading import ServedModel
from server.metrics import RequestMetrics, ServerMetrics
from server.requests import Outcome

logger = structlog.get_logger()

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
INFERENCE_METHODS = frozenset({"Classify", "ModelInfer"})
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


class Call:
    """One RPC that is being answered.

    Attributes:
        started_s: When it came, on the batcher's clock.
        deadline_s: On the batcher's clock; infinity without one.
        requests: Counts it.
    """

    def __init__(self, started_s: float, deadline_s: float, requests: RequestMetrics) -> None:
        self.started_s = started_s
        self.deadline_s = deadline_s
        self.requests = requests
        self._held = ExitStack()

    def uses(self, model: ServedModel) -> ServedModel:
        """Holds the model until the call ends, counts the call for it, and returns it."""
        self._held.enter_context(model.users)
        self.requests = model.requests
        return model

    def within(self, timeout_s: float) -> float:
        """Brings the deadline to at most so long after the call's arrival, and returns it."""
        self.deadline_s = min(self.deadline_s, self.started_s + timeout_s)
        return self.deadline_s

    def end(self) -> None:
        """Lets go of what it held."""
        self._held.close()


class CallBoundary:
    """Where domain errors become status codes and every RPC is timed.

    Example:
        async with boundary.answering("Classify", context) as call:
            model = call.uses(catalogue.find(request.model))
            …
    """

    def __init__(self, metrics: ServerMetrics, clock: Clock = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock

    @asynccontextmanager
    async def answering(
        self, method: str, context: grpc.aio.ServicerContext[object, object]
    ) -> AsyncIterator[Call]:
        """Times the body and ends the RPC with the status that fits what it raises."""
        started_s = self._clock()
        remaining_s = context.time_remaining()
        deadline_s = float("inf") if remaining_s is None else started_s + remaining_s
        call = Call(started_s, deadline_s, self._metrics.unknown_model)
        code = grpc.StatusCode.OK
        try:
            yield call
        except asyncio.CancelledError:
            # The caller left, or gRPC ended the call at its deadline.
            late = self._clock() >= call.deadline_s
            code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            raise
        except Exception as error:  # no text of an unknown error may leave the server
            code, message = _status(error)
            await context.abort(code, message)
        finally:
            call.end()
            ended_s = self._clock()
            call.requests.finished(method, code.name, ended_s - started_s)
            if method in INFERENCE_METHODS:
                call.requests.outcome(_OUTCOME_OF[code], call.deadline_s - ended_s)


def _status(error: Exception) -> tuple[grpc.StatusCode, str]:
    code = STATUS_OF.get(type(error), grpc.StatusCode.INTERNAL)  # type: ignore[arg-type]
    if code is not grpc.StatusCode.INTERNAL:
        return code, str(error)
    error_id = uuid.uuid4().hex[:12]
    logger.error("request failed", error_id=error_id, exc_info=error)
    return code, f"internal error; the server's log explains it under id {error_id}"
