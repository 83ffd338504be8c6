"""OpenTelemetry traces: a span per call or REST request, in the trace of its W3C traceparent.

Needs the extra `otel`. Without an endpoint it is not imported, and calls cost nothing more.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

import grpc
from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as by_grpc
from opentelemetry.exporter.otlp.proto.http import trace_exporter as by_http
from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, format_trace_id
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from convoy.server import SERVER_NAME, __version__
from convoy.server.grpc.registration import inside

# Also bounds the delay that a dead collector causes at shutdown.
_EXPORT_TIMEOUT_S = 3


class Tracing:
    """Traces the calls of given handlers and the requests to given routes.

    Args:
        endpoint: Where spans go: for OTLP over HTTP such as "http://127.0.0.1:4318/v1/traces", for
            OTLP over gRPC such as "http://127.0.0.1:4317", where https:// stands for TLS.
        protocol: "http" or "grpc".
    """

    def __init__(self, endpoint: str, protocol: str = "http") -> None:
        resource = Resource({"service.name": SERVER_NAME, "service.version": __version__})
        self._provider = TracerProvider(resource=resource)
        # Sends from its own thread; spans are dropped if the collector does not accept them.
        self._provider.add_span_processor(BatchSpanProcessor(_exporter(endpoint, protocol)))
        self._tracer = self._provider.get_tracer(SERVER_NAME, __version__)
        self._trace_id = ContextVar("trace_id", default="")

    def trace_id(self) -> str:
        """Return the id of the trace of the call that this task answers; empty without a span."""
        return self._trace_id.get()

    def traced(self, handlers: grpc.GenericRpcHandler) -> grpc.GenericRpcHandler:
        """Return handlers that run others inside a span."""
        return _TracedHandlers(handlers, self._open)

    def traced_route(self, route: Route) -> Route:
        """Make a route run inside a span, and return it."""
        application = route.app

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            request = Request(scope)
            known = {
                "http.request.method": request.method,
                "http.route": route.path,
                "url.path": request.url.path,
            }
            span = self._start(f"{request.method} {route.path}", request.headers, known)

            async def observed(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= HTTPStatus.INTERNAL_SERVER_ERROR:
                        span.set_status(Status(StatusCode.ERROR))
                await send(message)

            with self._inside(span):
                await application(scope, receive, observed)

        route.app = traced
        return route

    def close(self) -> None:
        """Send the remaining spans; call it off the event loop."""
        self._provider.shutdown()

    def _open(self, method: str, context: Any) -> AbstractContextManager[None]:
        headers = {
            key: value for key, value in context.invocation_metadata() if isinstance(value, str)
        }
        service, _, name = method.strip("/").partition("/")
        known = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
        return self._inside(self._start(method.strip("/"), headers, known))

    def _start(self, name: str, headers: Mapping[str, str], known: Mapping[str, str]) -> Span:
        return self._tracer.start_span(
            name,
            context=extract(headers),
            kind=SpanKind.SERVER,
            attributes=known,
            record_exception=False,
        )

    @contextmanager
    def _inside(self, span: Span) -> Iterator[None]:
        """End a span with the block; mark it as failed if the block raises."""
        known = span.get_span_context()
        if known.trace_flags.sampled:
            self._trace_id.set(format_trace_id(known.trace_id))
        try:
            yield
        except BaseException as error:
            span.set_status(Status(StatusCode.ERROR, str(error) or type(error).__name__))
            raise
        finally:
            # No reset to the value before: a stream may end in another context than it began in.
            self._trace_id.set("")
            span.end()


def _exporter(endpoint: str, protocol: str) -> SpanExporter:
    if protocol == "grpc":
        return by_grpc.OTLPSpanExporter(endpoint, timeout=_EXPORT_TIMEOUT_S)
    return by_http.OTLPSpanExporter(endpoint, timeout=_EXPORT_TIMEOUT_S)


class _TracedHandlers(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpcio is untyped
    def __init__(
        self,
        handlers: grpc.GenericRpcHandler,
        enter: Callable[[str, Any], AbstractContextManager[None]],
    ) -> None:
        self._handlers = handlers
        self._enter = enter

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler | None":
        handler = self._handlers.service(details)
        if handler is None:
            return None
        path = details.method
        return inside(handler, lambda context: self._enter(path, context))
