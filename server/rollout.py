"""Puts versions into service and takes them out, without losing a request."""

import asyncio
from collections.abc import Callable

import structlog

from server.catalogue import ModelCatalogue
from server.metrics import ServerMetrics
from server.served_model import LoadedModel

logger = structlog.get_logger()

# How long calls that hold an old version may go on before it ends under them. Calls are short; only
# a caller who stalls in the middle of one comes near it.
RETIREMENT_TIMEOUT_S = 60.0

TellReady = Callable[[str, bool | None], None]
"""Takes a model's name and whether it is ready; None for one that is gone."""


class Rollout:
    """Moves versions through the catalogue.

    Args:
        tell_ready: Called whenever a model begins or ends to take requests.
    """

    def __init__(
        self, catalogue: ModelCatalogue[LoadedModel], metrics: ServerMetrics, tell_ready: TellReady
    ) -> None:
        self._catalogue = catalogue
        self._metrics = metrics
        self._tell_ready = tell_ready
        self._retiring: dict[asyncio.Task[None], LoadedModel] = {}

    def admit(self, model: LoadedModel) -> None:
        """Starts a version; requests that name it are answered from here on."""
        model.batcher.start(lambda healthy: self._tell_health(model, healthy))
        self._catalogue.add(model)
        self._metrics.models.serves(model.name, model.version, model.runs_on)

    def swap(self, model: LoadedModel) -> None:
        """Makes an admitted version the one that answers requests which name none."""
        before = self._catalogue.default(model.name)
        self._catalogue.make_default(model)
        self._metrics.models.ready(model.name, True)
        self._tell_ready(model.name, True)
        if before and before is not model:
            self._metrics.models.swapped(model.name)
            logger.info("version swapped", model=model.name, old=before.version, new=model.version)

    def retire(self, model: LoadedModel) -> None:
        """Takes a version out of service; it answers what it accepted, then ends."""
        self._catalogue.remove(model)
        if self._catalogue.default(model.name) is None:
            self._metrics.models.removed(model.name)
            self._tell_ready(model.name, None)
        task = asyncio.create_task(self._end(model))
        self._retiring[task] = model
        task.add_done_callback(self._retiring.pop)

    def roll_back(self, old: LoadedModel, new: LoadedModel, reason: str) -> None:
        """Takes a version back that did not stand its trial."""
        self._metrics.models.rolled_back(new.name, reason)
        logger.error(
            "version rolled back",
            model=new.name,
            version=new.version,
            serving=old.version,
            reason=reason,
        )
        self.retire(new)

    def is_retiring(self, name: str, version: int) -> bool:
        """True while a version that was taken out still answers what it had accepted."""
        return any((m.name, m.version) == (name, version) for m in self._retiring.values())

    async def close(self) -> None:
        """Retires all there are and waits for their end."""
        for model in list(self._catalogue):
            self.retire(model)
        await asyncio.gather(*self._retiring)

    def _tell_health(self, model: LoadedModel, healthy: bool) -> None:
        if self._catalogue.default(model.name) is model:
            self._metrics.models.ready(model.name, healthy)
            self._tell_ready(model.name, healthy)

    async def _end(self, model: LoadedModel) -> None:
        model.batcher.stop_delaying()
        try:
            await asyncio.wait_for(model.users.wait_for_none(), RETIREMENT_TIMEOUT_S)
        except TimeoutError:
            logger.warning(
                "version ends under its callers", model=model.name, version=model.version
            )
        await model.batcher.drain()
        model.requests.close()
        # It may have been loaded anew meanwhile; then the numbers are the new one's.
        if self._catalogue.get(model.name, model.version) is None:
            self._metrics.forget(model.name, model.version)
        logger.info("version ended", model=model.name, version=model.version)
