"""The ASGI applications of the two ports: callers (gRPC, REST, page) and operators (metrics)."""

import asyncio
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route


def operations_application(
    registry: CollectorRegistry, is_live: Callable[[], bool], is_ready: Callable[[], bool]
) -> Starlette:
    """Return the ASGI application of the operators' port.

    Args:
        registry: What /metrics shows.
        is_live: Returns false if only a restart helps.
        is_ready: Whether callers should send requests.
    """

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        # Many models have many series: rendering them here would block every request on the loop.
        text = await asyncio.to_thread(encode, registry)
        return Response(text, headers={"Content-Type": content_type})

    async def healthz(request: Request) -> Response:
        return _state(is_live(), "live")

    async def readyz(request: Request) -> Response:
        return _state(is_ready(), "ready")

    return Starlette(
        routes=[Route("/metrics", metrics), Route("/healthz", healthz), Route("/readyz", readyz)]
    )


def _state(good: bool, name: str) -> Response:
    if good:
        return PlainTextResponse(f"{name}\n")
    return PlainTextResponse(f"not {name}\n", HTTPStatus.SERVICE_UNAVAILABLE)


Application = Callable[[Any, Any, Any], Awaitable[None]]

_GRPC = b"application/grpc"
# Subtypes of gRPC's own; application/grpc-web is another protocol.
_GRPC_WITH_SUBTYPE = (b"application/grpc+", b"application/grpc;")
_NOT_HTTP_2: dict[str, Any] = {
    "type": "http.response.start",
    "status": 505,
    "headers": [(b"content-type", b"text/plain")],
}


class CallerApplication:
    """An ASGI application that separates gRPC calls from other requests by their content type.

    Args:
        grpc: Answers gRPC calls.
        http: Answers all other requests.
    """

    def __init__(self, grpc: Application, http: Application) -> None:
        self._grpc = grpc
        self._http = http

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] == "websocket":
            # h2corn accepts WebSocket requests, and answers 403 to this message.
            await send({"type": "websocket.close"})
        elif not _is_grpc(scope):
            await self._http(scope, receive, send)
        elif scope["http_version"] == "2":
            await self._grpc(scope, receive, send)
        else:
            await send(_NOT_HTTP_2)
            await send({"type": "http.response.body", "body": b"gRPC: expected HTTP/2\n"})


def _is_grpc(scope: Any) -> bool:
    for name, value in scope["headers"]:
        if name == b"content-type":
            media_type: bytes = value.lower()
            return media_type == _GRPC or media_type.startswith(_GRPC_WITH_SUBTYPE)
    return False
