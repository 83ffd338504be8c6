"""What supervisors ask the HTTP port: /metrics for Prometheus, /healthz and /readyz."""

import asyncio
from collections.abc import Callable
from http import HTTPStatus

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route


def operation_routes(
    registry: CollectorRegistry, is_healthy: Callable[[], bool], is_ready: Callable[[], bool]
) -> list[Route]:
    """Returns the paths for supervisors.

    Args:
        registry: What /metrics shows.
        is_healthy: Whether the process is worth keeping.
        is_ready: Whether it takes requests.
    """

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        # Many models have many series: writing them would hold up every request on the loop.
        text = await asyncio.to_thread(encode, registry)
        return Response(text, headers={"Content-Type": content_type})

    async def healthz(request: Request) -> Response:
        return _state(is_healthy(), "live")

    async def readyz(request: Request) -> Response:
        return _state(is_ready(), "ready")

    return [Route("/metrics", metrics), Route("/healthz", healthz), Route("/readyz", readyz)]


def _state(good: bool, name: str) -> Response:
    if good:
        return PlainTextResponse(f"{name}\n")
    return PlainTextResponse(f"not {name}\n", HTTPStatus.SERVICE_UNAVAILABLE)
