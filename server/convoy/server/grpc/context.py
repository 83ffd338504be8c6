"""The context of one call for its servicer, and errors as gRPC statuses."""

import asyncio
import base64
import binascii
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import lru_cache
from types import TracebackType
from typing import Any, NoReturn, Protocol
from urllib.parse import quote

import grpc

from convoy.server.batching import Clock
from convoy.server.edge.limits import ByteBudget
from convoy.server.grpc.framing import MessageError, framed
from convoy.server.grpc.registration import Method
from convoy.server.protocol.calls import (
    Arrival,
    Call,
    CallBoundary,
    Caller,
    DisconnectedError,
    Failure,
    Status,
    is_late,
)

CODE_OF = {status: grpc.StatusCode[status.value] for status in Status}
# How long clients wait before they try again (gRFC A6).
_PUSHBACK = "grpc-retry-pushback-ms"


class Context(Caller, Protocol):
    """The part of a call's context that servicers use, on either transport."""

    async def write(self, message: Any) -> None:
        """Send a message of a reply that streams."""

    async def abort(
        self,
        code: grpc.StatusCode,
        details: str = "",
        trailing_metadata: Sequence[tuple[str, str]] = (),
    ) -> NoReturn:
        """End the call with a status; nothing after it in the servicer runs."""


class GrpcCall(Call):
    """An RPC: leaving its context counts it and ends it with the status that fits the error."""

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
            self.finished(self._method, Status.OK, self._clock())
            return
        failure = self.failure_of(error, self._clock())
        self.finished(self._method, failure.status, self._clock())
        if isinstance(error, Exception):
            await abort(self._context, failure)


class GrpcBoundary(CallBoundary):
    """Where domain errors become gRPC's statuses and every RPC is timed.

    Example:
        async with boundary.answering("Classify", context) as call:
            model = call.uses(models.find(request.model))
            …
    """

    def answering(self, method: str, context: Context) -> GrpcCall:
        """Return the call, a context for the body that answers it."""
        # gRPC's C core does not report the arrival time of a call.
        arrived_at_s = getattr(context, "arrived_at_s", None) or self._clock()
        return GrpcCall(method, context, self._clock, self._arrival(context, arrived_at_s))


async def abort(context: Context, failure: Failure) -> NoReturn:
    """End a call with a failure."""
    pushback = ((_PUSHBACK, str(failure.retry_after_ms)),) if failure.retry_after_ms else ()
    await context.abort(CODE_OF[failure.status], failure.message, pushback)


Metadata = Sequence[tuple[str, str | bytes]]
Fields = list[tuple[bytes, bytes]]
# A code and the details for the caller.
Ending = tuple[grpc.StatusCode, str]

_DEADLINE_EXCEEDED: Ending = (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
_UNITS_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_MAX_TIMEOUT_DIGITS = 8
_BINARY = "-bin"
# Callers reject more than 8 KiB of header fields, and each byte may take three in the encoding.
_MAX_STATUS_BYTES = 2048
# Printable ASCII except the percent sign is not encoded in grpc-message.
_PLAIN = "".join(chr(code) for code in range(0x20, 0x7F) if code != ord("%"))
# What gRPC and HTTP themselves speak of; all other fields are the application's metadata.
_PROTOCOL_FIELDS = frozenset(
    (b"content-type", b"te", b"host", b"grpc-timeout", b"grpc-encoding", b"grpc-accept-encoding")
)

_HEAD_FIELDS: Fields = [
    (b"content-type", b"application/grpc"),
    (b"grpc-accept-encoding", b"identity, deflate, gzip"),
]
_HEAD = {"type": "http.response.start", "status": 200, "headers": _HEAD_FIELDS, "trailers": True}
_OK_FIELDS: Fields = [(b"grpc-status", b"0")]
_OK_TRAILERS: dict[str, Any] = {"type": "http.response.trailers", "headers": _OK_FIELDS}


class CallContext:
    """A call in flight.

    Args:
        scope: The ASGI scope.
        send: The ASGI channel.
        path: "/package.Service/Method".
        method: What answers it.
        budget: Counts the replies that the caller has not read.

    Attributes:
        arrived_at_s: When the call came, or its request was complete; on the monotonic clock.
        status: How the call ended, or would end now.
        reached: Whether a servicer was called.
        interrupted: Whether its deadline or a limit of the server ended it.
    """

    __slots__ = (
        *(
            "_budget",
            "_deadline_s",
            "_finished",
            "_head_sent",
            "_scope",
            "_send",
            "_task",
            "_timer",
            "_trailing",
        ),
        *("arrived_at_s", "interrupted", "method", "path", "reached", "status"),
    )

    def __init__(
        self,
        scope: Mapping[str, Any],
        send: Callable[[Any], Awaitable[None]],
        path: str,
        method: Method,
        budget: ByteBudget,
    ) -> None:
        self._budget = budget
        self.path = path
        self.method = method
        self.arrived_at_s = time.monotonic()
        self.status: Ending = (grpc.StatusCode.UNKNOWN, "")
        self.reached = False
        self.interrupted = False
        self._scope = scope
        self._send = send
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None
        self._deadline_s: float | None = None
        self._head_sent = False
        self._finished = False
        self._trailing: Metadata = ()

    @property
    def well_formed(self) -> bool:
        """Whether the request is one of gRPC: a POST that takes trailers."""
        scope = self._scope
        return scope["method"] == "POST" and "http.response.trailers" in scope["extensions"]

    def start_clock(self, timeout: bytes) -> None:
        """Set the deadline and end the call when it passes.

        Args:
            timeout: The field grpc-timeout.

        Raises:
            MessageError: It is malformed, or has passed.
        """
        timeout_s = _seconds(timeout)
        if timeout_s == 0:
            raise MessageError(*_DEADLINE_EXCEEDED)
        self._deadline_s = self.arrived_at_s + timeout_s
        self._timer = asyncio.get_running_loop().call_later(
            timeout_s, self.interrupt, *_DEADLINE_EXCEEDED
        )

    def stop_clock(self) -> None:
        """Let the deadline pass without effect."""
        if self._timer:
            self._timer.cancel()

    def note_arrival(self) -> None:
        """Note that the request is complete."""
        self.arrived_at_s = time.monotonic()

    def interrupt(self, code: grpc.StatusCode, details: str) -> None:
        """End the call from outside its task."""
        if not self.interrupted and self._task:
            self.interrupted = True
            self.status = code, details
            self._task.cancel()

    def resume(self) -> None:
        """Continue in the task after `interrupt` has cancelled it."""
        if self._task:
            self._task.uncancel()

    def disconnected(self) -> None:
        """Note that the caller disconnected, perhaps because of its deadline."""
        late = is_late(self._deadline_s, self.arrived_at_s, time.monotonic())
        code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
        self.status = code, "the caller disconnected"

    def time_remaining(self) -> float | None:
        """Return the seconds until the deadline; None without one."""
        if self._deadline_s is None:
            return None
        return max(0.0, self._deadline_s - time.monotonic())

    def invocation_metadata(self) -> Metadata:
        """Return the caller's metadata."""
        return [
            pair
            for name, value in self._scope["headers"]
            if name not in _PROTOCOL_FIELDS
            for pair in _metadata(name.decode("latin-1"), value)
        ]

    def peer(self) -> str:
        """Return the caller's address, such as ipv4:127.0.0.1:5000."""
        host, port = self._scope.get("client") or ("", 0)
        return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        """Set what is sent with the status."""
        self._trailing = tuple(metadata)

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()
    ) -> NoReturn:
        """End the call with a status; nothing after it in the servicer runs."""
        self.status = code, details
        self._trailing = tuple(trailing_metadata) or self._trailing
        raise grpc.aio.AbortError(details)

    async def write(self, message: Any) -> None:
        """Send a message of a reply that streams; wait while too much is unsent.

        Raises:
            DisconnectedError: The stream is closed.
            MessageError: The budget for unsent bytes is used up.
        """
        data = self._counted(message, streams=True)
        try:
            if not self._head_sent:
                self._head_sent = True
                await self._send(_HEAD)
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
        except OSError as error:
            raise DisconnectedError from error

    async def reply(self, message: Any) -> None:
        """Send the one reply of a call, and its status.

        Raises:
            DisconnectedError: The stream is closed.
            MessageError: The budget for unsent bytes is used up.
        """
        body = {"type": "http.response.body", "body": self._counted(message)}
        trailers = _OK_TRAILERS
        if self._trailing:
            trailers = _trailers([*_OK_FIELDS, *_fields(self._trailing)])
        self._finished = True
        try:
            await self._send(_HEAD)
            await self._send(body)
            await self._send(trailers)
        except OSError as error:
            raise DisconnectedError from error

    async def finish(self) -> None:
        """Send the status, unless `reply` did; send the head first if nothing was sent yet.

        Raises:
            DisconnectedError: The stream is closed.
        """
        if self._finished:
            return
        fields = [*_status_fields(*self.status), *_fields(self._trailing)]
        try:
            if self._head_sent:
                await self._send({"type": "http.response.body"})
                await self._send(_trailers(fields))
            else:
                headers = [*_HEAD_FIELDS, *fields]
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
                await self._send({"type": "http.response.body"})
        except OSError as error:
            raise DisconnectedError from error

    def _counted(self, message: Any, *, streams: bool = False) -> bytes:
        """Return the bytes to send for a reply, which count until they are sent."""
        data = self._budget.reply(framed(self.method.serialized(message)), streams=streams)
        if data is None:
            raise MessageError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "the server's memory for replies is full",
            )
        return data


def _trailers(fields: Fields) -> dict[str, Any]:
    return {"type": "http.response.trailers", "headers": fields}


@lru_cache(maxsize=256)
def _status_fields(code: grpc.StatusCode, details: str) -> Fields:
    """Return the fields that end a call; cached, because under overload most are the same."""
    fields = [(b"grpc-status", str(code.value[0]).encode())]
    if details:
        text = details.encode("utf-8", "replace")[:_MAX_STATUS_BYTES].decode("utf-8", "ignore")
        fields.append((b"grpc-message", quote(text, safe=_PLAIN).encode()))
    return fields


def _fields(metadata: Metadata) -> Fields:
    return [
        (
            name.encode(),
            base64.b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode(),
        )
        for name, value in metadata
    ]


def _metadata(name: str, value: bytes) -> list[tuple[str, str | bytes]]:
    if not name.endswith(_BINARY):
        return [(name, value.decode("latin-1"))]
    try:
        return [
            (name, base64.b64decode(part + b"=" * (-len(part) % 4), validate=True))
            for part in value.split(b",")
        ]
    except binascii.Error as error:
        raise MessageError(grpc.StatusCode.INTERNAL, f"{name}: expected base64") from error


@lru_cache(maxsize=256)
def _seconds(timeout: bytes) -> float:
    digits, unit_s = timeout[:-1], _UNITS_S.get(timeout[-1:])
    if unit_s is None or not digits.isdigit() or len(digits) > _MAX_TIMEOUT_DIGITS:
        shown = timeout[:16].decode("ascii", "replace")
        raise MessageError(
            grpc.StatusCode.INTERNAL,
            f"grpc-timeout: expected up to 8 digits and a unit, got {shown!r}",
        )
    return int(digits) * unit_s
