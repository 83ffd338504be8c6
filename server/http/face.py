"""Everything that the HTTP port answers, as one ASGI application."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.routing import Route

from server.catalogue import ModelCatalogue
from server.http.history import History
from server.http.operation import operation_routes
from server.http.rest import RestFace
from server.http.ui import ui_routes
from server.served_model import LoadedModel


class HttpFace:
    """The application of the HTTP port.

    Args:
        rest: The protocol's REST face.
        catalogue: The models in service.
        registry: What /metrics shows.
        ui: Whether there is a page to look at.
    """

    def __init__(
        self,
        rest: RestFace,
        catalogue: ModelCatalogue[LoadedModel],
        registry: CollectorRegistry,
        ui: bool,
    ) -> None:
        self._history = History(registry) if ui else None
        routes: list[Route] = rest.routes()
        routes += operation_routes(
            registry,
            is_healthy=lambda: all(model.batcher.healthy for model in catalogue),
            is_ready=lambda: catalogue.ready,
        )
        if self._history:
            routes += ui_routes(catalogue, self._history)
        self.application = Starlette(routes=routes)

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Records, inside it, what the page shows of the last minutes."""
        if self._history is None:
            yield
            return
        task = asyncio.create_task(self._history.follow())
        try:
            yield
        finally:
            task.cancel()
