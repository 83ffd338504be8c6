"""A version in service, and the calls that hold it."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol

from server.backends.runtimes import Runtime
from server.batcher import BatchingLimits, DynamicBatcher
from server.manifest import Manifest
from server.metrics import RequestMetrics, RunsOn
from server.requests import Images, Prediction
from server.statistics import ModelStatistics


class Batcher(Protocol):
    """Where a version's requests go: `DynamicBatcher.infer`, or another process's."""

    @property
    def limits(self) -> BatchingLimits:
        """What it may hold."""

    async def infer(
        self,
        images: Images,
        deadline_s: float = float("inf"),
        priority: int = 0,
        client: str = "",
    ) -> Prediction:
        """Runs images as `DynamicBatcher.infer` does."""


class Users:
    """Counts the calls that hold a version, so that it does not end under them.

    Example:
        with model.users:
            images = await decode(…)
            await model.batcher.infer(images)
    """

    def __init__(self) -> None:
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()

    def __enter__(self) -> None:
        self._count += 1
        self._none.clear()

    def __exit__(self, *_: object) -> None:
        self._count -= 1
        if self._count == 0:
            self._none.set()

    async def wait_for_none(self) -> None:
        """Waits until no call holds it."""
        await self._none.wait()


@dataclass(frozen=True, slots=True, eq=False)
class ServedModel:
    """A version in service, as those see it who answer requests.

    Attributes:
        manifest: What it says about itself.
        runtime: What `--backend` asked for.
        runs_on: What really runs it.
        batcher: Where its requests go.
        requests: Counts them.
        statistics: Tells what its batcher did so far.
        users: The calls that hold it.
    """

    manifest: Manifest
    runtime: Runtime
    runs_on: RunsOn
    batcher: Batcher
    requests: RequestMetrics
    statistics: Callable[[], Coroutine[Any, Any, ModelStatistics]]
    users: Users = field(default_factory=Users)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.manifest.name

    @property
    def version(self) -> int:
        """The version's number."""
        return self.manifest.version


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel(ServedModel):
    """A version in service in the process that runs it."""

    batcher: DynamicBatcher
