"""Lets HTTP requests in by their bearer token."""

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.access import Access


class TokenGate:
    """An ASGI application around another, which sees only the requests that may go on.

    /healthz and /readyz stay open, for supervisors.
    """

    def __init__(self, application: ASGIApp, access: Access) -> None:
        self._application = application
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] == "http":
            given = Headers(scope=scope).get("authorization", "")
            if not self._access.allows_http(scope["path"], given):
                refusal = JSONResponse(
                    {"error": "authorization: expected a bearer token"},
                    status_code=401,
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await refusal(scope, receive, send)
                return
        await self._application(scope, receive, send)
