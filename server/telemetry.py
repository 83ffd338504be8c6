"""OpenTelemetry traces: a span a call or REST request, in the trace that its W3C traceparent names.

Needs the extra `otel`. Without an endpoint nothing of it is imported and calls cost what they did.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import grpc
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from server import SERVER_NAME, SERVER_VERSION

_MAKE = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
# Also bounds how long a dead collector holds up the end.
_EXPORT_TIMEOUT_S = 3
_Behaviour = Callable[[Any, Any], Any]


class Tracing:
    """Traces the calls of the handlers and the requests to the routes that are given to it.

    Args:
        endpoint: Where spans go, OTLP over HTTP, such as "http://127.0.0.1:4318/v1/traces".
    """

    def __init__(self, endpoint: str) -> None:
        resource = Resource({"service.name": SERVER_NAME, "service.version": SERVER_VERSION})
        self._provider = TracerProvider(resource=resource)
        # Sends from a thread of its own; what a dead collector does not take is dropped.
        self._provider.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=_EXPORT_TIMEOUT_S))
        )
        self._tracer = self._provider.get_tracer(SERVER_NAME, SERVER_VERSION)

    def traced(self, handlers: grpc.GenericRpcHandler) -> grpc.GenericRpcHandler:
        """Returns handlers that do the same inside a span."""
        return _TracedHandlers(handlers, self._open)

    def traced_route(self, route: Route) -> Route:
        """Returns a route that does the same inside a span."""

        async def answer(request: Request) -> Response:
            known = {
                "http.request.method": request.method,
                "http.route": route.path,
                "url.path": request.url.path,
            }
            span = self._start(f"{request.method} {route.path}", request.headers, known)
            with _ended(span):
                response: Response = await route.endpoint(request)
                span.set_attribute("http.response.status_code", response.status_code)
                if response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
                    span.set_status(Status(StatusCode.ERROR))
                return response

        return Route(route.path, answer, methods=list(route.methods or ()))

    def close(self) -> None:
        """Sends what is left; call it off the event loop."""
        self._provider.shutdown()

    def _open(self, method: str, context: Any) -> Span:
        headers = {
            key: value for key, value in context.invocation_metadata() if isinstance(value, str)
        }
        service, _, name = method.strip("/").partition("/")
        known = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
        return self._start(method.strip("/"), headers, known)

    def _start(self, name: str, headers: Mapping[str, str], known: Mapping[str, str]) -> Span:
        return self._tracer.start_span(
            name,
            context=extract(headers),
            kind=SpanKind.SERVER,
            attributes=known,
            record_exception=False,
        )


@contextmanager
def _ended(span: Span) -> Iterator[None]:
    """Ends a span with the block, as failed where the block raises."""
    try:
        yield
    except BaseException as error:
        span.set_status(Status(StatusCode.ERROR, str(error) or type(error).__name__))
        raise
    finally:
        span.end()


class _TracedHandlers(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpcio is untyped
    def __init__(
        self, handlers: grpc.GenericRpcHandler, open_span: Callable[[str, Any], Span]
    ) -> None:
        self._handlers = handlers
        self._open = open_span

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler | None":
        handler = self._handlers.service(details)
        if handler is None:
            return None
        kind = (handler.request_streaming, handler.response_streaming)
        behaviour = (
            handler.unary_unary
            or handler.unary_stream
            or handler.stream_unary
            or handler.stream_stream
        )
        wrap = self._stream if handler.response_streaming else self._one
        return _MAKE[kind](
            wrap(details.method, behaviour),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _one(self, method: str, behaviour: _Behaviour) -> Callable[[Any, Any], Awaitable[Any]]:
        async def answer(request: Any, context: Any) -> Any:
            with _ended(self._open(method, context)):
                return await behaviour(request, context)

        return answer

    def _stream(
        self, method: str, behaviour: _Behaviour
    ) -> Callable[[Any, Any], AsyncIterator[Any]]:
        async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
            with _ended(self._open(method, context)):
                async for reply in behaviour(request, context):
                    yield reply

        return answer
