"""gRPC's C core as the transport, `--transport grpcio`."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from convoy.server.errors import StartupError
from convoy.server.grpc.health import OPEN_METHODS
from convoy.server.grpc.registration import inside, method_name
from convoy.server.metrics.requests import CallMetrics
from convoy.server.protocol.calls import CallBoundary, Status, is_late
from convoy.server.security.tls import Tls
from convoy.server.security.tokens import Tokens


class CoreServer:
    """A port of grpcio's.

    Args:
        host: Address to listen on.
        port: 0 picks a free one.
        max_message_bytes: Of a request and of a reply.
        tokens: Checks callers' tokens.
        calls: Counts the calls.
        boundary: Counts those for inference that reach no servicer.
        tls: Encrypts the port; None for plain text.
        drain_timeout_s: Time for calls in flight to finish after `stop`.
        flag: The setting that chose the port, for the message.

    Attributes:
        server: Where services are added before `start`.
        port: The port it listens on.

    Raises:
        StartupError: The port is in use or not permitted.
    """

    def __init__(
        self,
        host: str,
        port: int,
        max_message_bytes: int,
        *,
        tokens: Tokens,
        calls: CallMetrics,
        boundary: CallBoundary,
        tls: Tls | None,
        drain_timeout_s: float = 0.0,
        flag: str = "--port",
    ) -> None:
        self.server = grpc.aio.server(
            interceptors=[_Interceptor(tokens, boundary, calls)],
            options=[
                # Two servers must not share a port by accident.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
            ],
        )
        self._drain_timeout_s = drain_timeout_s
        self._tls = tls
        address = f"{host}:{port}"
        try:
            if tls:
                self.port = self.server.add_secure_port(address, tls.grpcio_credentials())
            else:
                self.port = self.server.add_insecure_port(address)
        except RuntimeError as error:
            raise StartupError(
                f"{flag}: cannot listen on {address}: the port is in use or not permitted"
            ) from error

    async def start(self) -> None:
        """Begin to answer."""
        await self.server.start()

    def reload(self) -> None:
        """Read the TLS files again, whether or not they changed."""
        if self._tls:
            self._tls.reload()

    async def stop(self) -> None:
        """Reject new calls, let accepted ones finish, and cancel the rest after the time-out."""
        await self.server.stop(self._drain_timeout_s)


# The C core does not report its answer to a message that it rejects.
_REJECTED = "rejected"


class _Interceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpcio is untyped
    """Reject calls without a token, and count all calls."""

    def __init__(self, tokens: Tokens, boundary: CallBoundary, calls: CallMetrics) -> None:
        self._tokens = tokens
        self._boundary = boundary
        self._calls = calls

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Continue the call, or answer UNAUTHENTICATED."""
        details = handler_call_details
        handler = await continuation(details)
        call = _CountedCall(method_name(details.method) if handler else "unknown")
        self._calls.open["grpc"] += 1
        # The servicer is called in this task, or never: for a message that is too large or
        # malformed the C core ends the call without a report.
        task = asyncio.current_task()
        assert task
        task.add_done_callback(lambda _: self._count(call))
        if details.method not in OPEN_METHODS and not self._tokens.accept(_authorization(details)):
            call.code = "UNAUTHENTICATED"
            return grpc.stream_unary_rpc_method_handler(_ask_for_token)
        if handler is None:
            call.code = "UNIMPLEMENTED"
            return None
        return inside(handler, call.observe)

    def _count(self, call: "_CountedCall") -> None:
        self._calls.open["grpc"] -= 1
        self._calls.count("grpc", call.method, call.code)
        if not call.reached:
            status = Status.CANCELLED if call.code == _REJECTED else Status(call.code)
            self._boundary.rejected(call.method, status, call.started_s)


class _CountedCall:
    def __init__(self, method: str) -> None:
        self.method = method
        self.started_s = time.monotonic()
        self.reached = False
        self.code = _REJECTED

    @contextmanager
    def observe(self, context: Any) -> Iterator[None]:
        """Note the status that a servicer ends the call with."""
        self.reached = True
        self.code = "UNKNOWN"
        remaining_s = context.time_remaining()
        started_s = time.monotonic()
        try:
            yield
            self.code = "OK"
        except grpc.aio.AbortError:
            self.code = context.code().name
            raise
        except (asyncio.CancelledError, GeneratorExit):
            deadline_s = None if remaining_s is None else started_s + remaining_s
            late = is_late(deadline_s, started_s, time.monotonic())
            self.code = "DEADLINE_EXCEEDED" if late else "CANCELLED"
            raise


def _authorization(details: grpc.HandlerCallDetails) -> bytes:
    for key, value in details.invocation_metadata:
        if key == "authorization":
            return value.encode() if isinstance(value, str) else bytes(value)
    return b""


async def _ask_for_token(requests: object, context: Any) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "authorization: expected a bearer token")
