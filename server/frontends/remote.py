"""The front end's batcher: the real one is in another process."""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from server.batcher import BatchingLimits
from server.errors import UnavailableError
from server.frontends.arena import Arena
from server.frontends.messages import (
    Answered,
    AskStatistics,
    Cancel,
    Infer,
    Refused,
    StatisticsRead,
)
from server.requests import Images, Outputs, Prediction
from server.statistics import ModelStatistics


class RemoteRequests:
    """The requests of this process that its owner has in hand.

    Args:
        send: Sends a message to the owner.
        arena: Where the owner finds the pixels.
    """

    def __init__(self, send: Callable[[object], None], arena: Arena) -> None:
        self._send = send
        self._arena = arena
        self._numbers = itertools.count()
        self._under_way: dict[int, tuple[asyncio.Future[Prediction], int]] = {}
        self._asked: dict[int, asyncio.Future[ModelStatistics]] = {}

    async def infer(
        self, model: int, images: Images, deadline_s: float, priority: int, client: str
    ) -> Prediction:
        """Asks the owner, as `DynamicBatcher.infer` is asked."""
        offset = self._arena.place(images)
        number = next(self._numbers)
        future: asyncio.Future[Prediction] = asyncio.get_running_loop().create_future()
        self._under_way[number] = future, offset
        self._send(Infer(number, model, offset, images.shape, deadline_s, priority, client))
        try:
            return await future
        except asyncio.CancelledError:
            self._send(Cancel(number))
            raise
        finally:
            # It knows an error that knows this frame: pixels would wait for the garbage collector.
            del future

    def answered(self, message: Answered | Refused) -> None:
        """The owner has let go of a request's pixels."""
        future, offset = self._under_way.pop(message.number)
        self._arena.free(offset)
        if future.done():
            return
        if isinstance(message, Refused):
            future.set_exception(message.error)
            return
        outputs = Outputs(message.logits, message.probabilities)
        future.set_result(
            Prediction(outputs, message.queue_s, message.inference_s, message.batch_size)
        )

    async def statistics(self, model: int) -> ModelStatistics:
        """Asks the owner what a version's batcher did so far."""
        number = next(self._numbers)
        future: asyncio.Future[ModelStatistics] = asyncio.get_running_loop().create_future()
        self._asked[number] = future
        self._send(AskStatistics(number, model))
        return await future

    def statistics_read(self, message: StatisticsRead) -> None:
        """The owner has told."""
        future = self._asked.pop(message.number)
        if not future.done():
            future.set_result(message.statistics)

    def lose(self) -> None:
        """The owner is gone: nothing is answered any more."""
        futures: list[asyncio.Future[Any]] = [future for future, _ in self._under_way.values()]
        for future in (*futures, *self._asked.values()):
            if not future.done():
                future.set_exception(UnavailableError("the server is shut down"))


@dataclass(frozen=True, slots=True)
class RemoteBatcher:
    """One version's batcher, as far as requests see it.

    Attributes:
        key: Names the version to the owner.
        limits: What the real batcher may hold.
        requests: Carries them to it.
    """

    key: int
    limits: BatchingLimits
    requests: RemoteRequests

    async def infer(
        self,
        images: Images,
        deadline_s: float = float("inf"),
        priority: int = 0,
        client: str = "",
    ) -> Prediction:
        """Runs images as `DynamicBatcher.infer` does.

        Raises:
            RequestError: As there; OverloadedError too where the memory is full.
        """
        return await self.requests.infer(self.key, images, deadline_s, priority, client)
