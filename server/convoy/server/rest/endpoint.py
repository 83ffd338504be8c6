"""Everything that callers reach by HTTP, as one ASGI application."""

import asyncio
from collections.abc import Collection
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from convoy.server.metrics.requests import CallMetrics
from convoy.server.rest.infer import METHOD_KEY, RestInfer
from convoy.server.rest.routes import RestRoutes
from convoy.server.rest.ui import PAGE_PATHS, Page
from convoy.server.security.tokens import Tokens

_AUTHORIZATION = b"authorization"
_NO_TOKEN = JSONResponse(
    {"error": "authorization: expected a bearer token"},
    status_code=401,
    headers={"WWW-Authenticate": "Bearer"},
)


def http_application(
    rest: RestRoutes,
    page: Page | None,
    tokens: Tokens,
    calls: CallMetrics,
) -> ASGIApp:
    """Return the application for requests that are not gRPC.

    Args:
        rest: The protocol's routes.
        page: For people; None where there is none.
        tokens: Checks callers' tokens.
        calls: Counts the requests.
    """
    routes = rest.routes()
    if page:
        routes += page.routes()
    routes.append(Route("/{package}.{service}/{method}", _expect_grpc, methods=["POST"]))
    return HttpEndpoint(Starlette(routes=routes), rest.direct, tokens, calls, PAGE_PATHS)


class HttpEndpoint:
    """An ASGI application around another: it checks tokens and counts requests.

    Args:
        application: The other, which gets only the requests with a valid token.
        infer: Answers inference requests instead of the other; None: the other answers them too.
        tokens: Checks callers' tokens.
        calls: Counts the requests, by the name that a route stores under `METHOD_KEY`.
        open_paths: Need no token: the files of the page, which asks for one itself.
    """

    def __init__(
        self,
        application: ASGIApp,
        infer: RestInfer | None,
        tokens: Tokens,
        calls: CallMetrics,
        open_paths: Collection[str] = (),
    ) -> None:
        self._application = application
        self._infer = infer
        self._tokens = tokens
        self._calls = calls
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        code = "500"

        async def observed(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = str(message["status"])
            await send(message)

        self._calls.open["http"] += 1
        try:
            allowed = scope["path"] in self._open_paths or self._tokens.accept(_given(scope))
            await self._answers(scope, allowed)(scope, receive, observed)
        except asyncio.CancelledError:
            code = "cancelled"
            raise
        finally:
            self._calls.open["http"] -= 1
            self._calls.count("http", scope.get(METHOD_KEY, "unknown"), code)

    def _answers(self, scope: Scope, allowed: bool) -> ASGIApp:
        if not allowed:
            return _NO_TOKEN
        if self._infer and self._infer.answers(scope):
            return self._infer
        return self._application


def _given(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == _AUTHORIZATION:
            return bytes(value)
    return b""


async def _expect_grpc(request: Request) -> PlainTextResponse:
    """Answer requests to the path of an RPC that are not gRPC, by its specification."""
    content_type = request.headers.get("content-type", "none")
    return PlainTextResponse(
        f"content-type: expected application/grpc, got {content_type}\n",
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    )
