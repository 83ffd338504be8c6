"""gRPC over HTTP/2 as an ASGI application.

It replaces `grpc.aio.server`: servicers, and handlers of grpcio's own packages, run on either.
The HTTP server knows frames and streams; here a request becomes a call.

Source: github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import grpc

from convoy.server.edge.limits import ByteBudget, MessageLimits
from convoy.server.grpc.context import CallContext, Ending
from convoy.server.grpc.framing import MessageError, MessageReader
from convoy.server.grpc.health import OPEN_METHODS
from convoy.server.grpc.registration import UNKNOWN_METHOD, Method, find_method
from convoy.server.metrics.requests import CallMetrics
from convoy.server.protocol.calls import CallBoundary, Status
from convoy.server.security.tokens import Tokens

_OK: Ending = (grpc.StatusCode.OK, "")
_UNKNOWN_METHOD: Ending = (grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
_MALFORMED: Ending = (
    grpc.StatusCode.INTERNAL,
    "gRPC: expected the method POST and the field te: trailers",
)
_NO_TOKEN: Ending = (grpc.StatusCode.UNAUTHENTICATED, "authorization: expected a bearer token")


class GrpcEndpoint:
    """Serve gRPC handlers; the part of `grpc.aio.Server` that this server uses.

    Args:
        limits: The sizes of the largest messages.
        tokens: Checks callers' tokens.
        budget: Bounds the bytes of all requests.
        boundary: Counts the requests for inference that reach no servicer.
        calls: Counts all calls.

    Example:
        endpoint = GrpcEndpoint(limits, tokens, budget, boundary, calls)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, endpoint)
        await endpoint(scope, receive, send)
    """

    def __init__(
        self,
        limits: MessageLimits,
        tokens: Tokens,
        budget: ByteBudget,
        boundary: CallBoundary,
        calls: CallMetrics,
    ) -> None:
        self._limits = limits
        self._tokens = tokens
        self._budget = budget
        self._boundary = boundary
        self._calls = calls
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._methods: dict[str, Method] = {}

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Add handlers; the first that knows a method answers it."""
        self._handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, object]) -> None:
        """Do nothing: what generated code registers here it adds as a generic handler too."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one call, an ASGI "http" scope."""
        headers = dict(scope["headers"])
        # A method is named by the bytes of the path, which are neither decoded nor cut.
        path = scope["raw_path"].decode("latin-1")
        if scope["query_string"]:
            path = f"{path}?{scope['query_string'].decode('latin-1')}"
        method = self._methods.get(path) or self._find(path)
        context = CallContext(scope, send, path, method, self._budget)
        self._calls.open["grpc"] += 1
        try:
            await self._answer(context, headers, receive)
        except asyncio.CancelledError:
            context.disconnected()
            raise
        finally:
            self._calls.open["grpc"] -= 1
            context.stop_clock()
            self._count(context)

    async def _answer(
        self, context: CallContext, headers: Mapping[bytes, bytes], receive: Any
    ) -> None:
        reader: MessageReader | None = None
        try:
            self._admit(context, headers)
            reader = self._reader(context, headers, receive)
            await _serve(context, reader)
        except grpc.aio.AbortError:
            pass
        except MessageError as error:
            context.status = error.code, str(error)
        except asyncio.CancelledError:
            if not context.interrupted:
                raise
            context.resume()
        except Exception as error:
            self._boundary.failures.record("call failed", error, method=context.path)
            context.status = grpc.StatusCode.UNKNOWN, f"Unexpected {type(error).__name__}"
        finally:
            if reader:
                reader.close()
        await context.finish()

    def _admit(self, context: CallContext, headers: Mapping[bytes, bytes]) -> None:
        """Check the head of a call before any of its body is read."""
        path = context.path
        if path not in OPEN_METHODS and not self._tokens.accept(headers.get(b"authorization", b"")):
            raise MessageError(*_NO_TOKEN)
        if not context.well_formed:
            raise MessageError(*_MALFORMED)
        if context.method is UNKNOWN_METHOD:
            raise MessageError(*_UNKNOWN_METHOD)
        for name in headers:
            if name.endswith(b"-bin"):
                # Decoding all of them finds what is malformed, as grpcio does.
                context.invocation_metadata()
                break
        timeout = headers.get(b"grpc-timeout")
        if timeout is not None:
            context.start_clock(timeout)

    def _reader(
        self, context: CallContext, headers: Mapping[bytes, bytes], receive: Any
    ) -> MessageReader:
        limits = self._limits
        return MessageReader(
            receive,
            headers.get(b"grpc-encoding", b"identity"),
            limits.images_bytes if context.method.carries_images else limits.control_bytes,
            self._budget,
            context.interrupt,
        )

    def _find(self, path: str) -> Method:
        method = find_method(self._handlers, path)
        if method is None:
            return UNKNOWN_METHOD
        self._methods[path] = method
        return method

    def _count(self, context: CallContext) -> None:
        method, status = context.method.name, context.status
        code = "OK" if status is _OK else status[0].name
        self._calls.count("grpc", method, code)
        if not context.reached:
            self._boundary.rejected(method, Status(code), context.arrived_at_s)


async def _serve(context: CallContext, reader: MessageReader) -> None:
    """Run the servicer and send what it replies."""
    method = context.method
    if method.requests_stream:
        request: Any = _requests(method, reader)
    else:
        request = _deserialized(method, await reader.only())
        context.note_arrival()
    context.reached = True
    answer = method.behavior(request, context)
    if not method.replies_stream:
        reply = await answer
        context.stop_clock()
        await context.reply(reply)
    elif hasattr(answer, "__aiter__"):
        async for message in answer:
            await context.write(message)
    else:
        await answer
    context.status = _OK


async def _requests(method: Method, reader: MessageReader) -> AsyncIterator[Any]:
    while (message := await reader.next()) is not None:
        yield _deserialized(method, message)


def _deserialized(method: Method, message: bytes) -> Any:
    if method.deserialize is None:
        return message
    try:
        return method.deserialize(message)
    except Exception as error:
        raise MessageError(grpc.StatusCode.INTERNAL, "Exception deserializing request!") from error
