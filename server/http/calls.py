"""What every request to the REST face shares: its status, its metrics, its deadline, its caller."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine
from http import HTTPStatus
from typing import TypeVar

import grpc
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message

from server.errors import InvalidRequestError
from server.protocols.calls import Call, CallBoundary, Failure

Answer = TypeVar("Answer")
Handler = Callable[[Call, Request], Awaitable[Response]]

HTTP_STATUS_OF = {
    grpc.StatusCode.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
    grpc.StatusCode.UNAUTHENTICATED: HTTPStatus.UNAUTHORIZED,
    grpc.StatusCode.NOT_FOUND: HTTPStatus.NOT_FOUND,
    grpc.StatusCode.UNIMPLEMENTED: HTTPStatus.NOT_IMPLEMENTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: HTTPStatus.TOO_MANY_REQUESTS,
    grpc.StatusCode.DEADLINE_EXCEEDED: HTTPStatus.GATEWAY_TIMEOUT,
    grpc.StatusCode.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    grpc.StatusCode.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
}
# The caller does not read it; nginx's number for "client closed request" is what logs will know.
_CALLER_LEFT = 499
_WATCHED_AFTER_S = 0.05


class CallerLeftError(asyncio.CancelledError):
    """The caller closed the connection before the answer was ready."""


class HttpContext:
    """What the call boundary asks of a request; HTTP brings no deadline along."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def time_remaining(self) -> float | None:
        """Returns None: there is no deadline but the server's and the request's own."""
        return None

    def peer(self) -> str:
        """Returns the caller's address, as gRPC writes it."""
        caller = self._request.client
        return f"ipv4:{caller.host}:{caller.port}" if caller else ""


class HttpBoundary:
    """Where domain errors become HTTP statuses.

    Args:
        boundary: Times and counts every request, as it does for gRPC.

    Example:
        Route("/v2", partial(boundary.answer, "RestServerMetadata", describe_server))
    """

    def __init__(self, boundary: CallBoundary) -> None:
        self._boundary = boundary

    async def answer(self, method: str, handler: Handler, request: Request) -> Response:
        """Runs a handler and returns its response, or the one that fits what it raises."""
        try:
            answer = await self._boundary.attempt(
                method, HttpContext(request), lambda call: handler(call, request)
            )
        except CallerLeftError:
            return Response(status_code=_CALLER_LEFT)
        return _refusal(answer) if isinstance(answer, Failure) else answer


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Reads a request's body.

    Raises:
        InvalidRequestError: It has more than `max_bytes`.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise InvalidRequestError(f"body: expected at most {max_bytes} bytes, got {announced}")
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise InvalidRequestError(f"body: expected at most {max_bytes} bytes, got more")
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def while_connected(request: Request, work: Coroutine[object, object, Answer]) -> Answer:
    """Awaits work, and cancels it when the caller closes the connection; the body must be read.

    Raises:
        CallerLeftError: The caller left first.
    """
    task = asyncio.current_task()
    assert task
    watch: asyncio.Future[Message] | None = None
    working = True

    def leave(left: "asyncio.Future[Message]") -> None:
        if working and not left.cancelled():
            task.cancel()

    def look() -> None:
        nonlocal watch
        watch = asyncio.ensure_future(request.receive())
        watch.add_done_callback(leave)

    # A task for each request is dear, and most are answered before they need one.
    later = asyncio.get_running_loop().call_later(_WATCHED_AFTER_S, look)
    try:
        return await work
    except asyncio.CancelledError:
        if watch and watch.done() and not watch.cancelled() and task.uncancel() == 0:
            raise CallerLeftError from None
        raise
    finally:
        working = False
        later.cancel()
        if watch:
            watch.cancel()


def _refusal(failure: Failure) -> Response:
    headers = {}
    if failure.retry_after_ms:
        # In whole seconds, so one is the least that it can say.
        headers["Retry-After"] = str(math.ceil(failure.retry_after_ms / 1000))
    return JSONResponse({"error": failure.message}, HTTP_STATUS_OF[failure.code], headers)
