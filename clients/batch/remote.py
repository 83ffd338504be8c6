"""The engine `grpc`: a server classifies, and says by its refusals how much it takes."""

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clients.aio import AsyncClient
from clients.batch.errors import EngineError
from clients.batch.inputs import Source
from clients.batch.rows import Item, Row
from clients.batch.window import AdaptiveWindow
from clients.client import Client
from clients.connection import ConnectionOptions, RetryPolicy
from clients.errors import (
    DeadlineExceededError,
    ImageError,
    InferenceError,
    InvalidRequestError,
    OverloadedError,
    ServerError,
    UnavailableError,
)
from clients.images import ImageLike
from clients.results import Classification, ModelStatus

Pixels = NDArray[np.uint8]

# What says nothing about the image: the same request may well be answered later.
_REFUSALS = (OverloadedError, UnavailableError, DeadlineExceededError)
# What this one image brought upon itself.
_FAULTS = (ImageError, InvalidRequestError, InferenceError)
_FIRST_WAIT_S = 0.05
_LONGEST_WAIT_S = 2.0


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """Which model to ask where.

    Attributes:
        address: As `AsyncClient` takes it.
        model: Its name; may stay empty where the server serves one.
        version: 0 for the one in service, also when that changes.
        timeout_s: What one request may take.
        in_flight: Requests under way, at most.
        patience_s: For how long the server may answer nothing before the job gives up.
    """

    address: str | None
    model: str
    version: int
    top_k: int
    timeout_s: float
    in_flight: int
    patience_s: float


class GrpcEngine:
    """Classifies through a server.

    Args:
        remote: Where.
        options: How to connect; retries are this engine's own.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        remote: RemoteModel,
        options: ConnectionOptions | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        options = ConnectionOptions.from_environment() if options is None else options
        # gRPC's own retries would hide the refusals that the window has to see.
        self._options = replace(options, retry=RetryPolicy(attempts=1))
        self._remote = remote
        self._clock = clock
        self._window = AdaptiveWindow(remote.in_flight)
        self._answered_s = 0.0

    @property
    def identity(self) -> Mapping[str, object]:
        """The model that is asked for; a row says which version answered."""
        return {"engine": "grpc", "model": self._remote.model, "version": self._remote.version}

    def labels(self) -> list[str]:
        """The model's classes. A wrong address or name ends the job here.

        Raises:
            EngineError: The server serves no such model, or several and none was named.
            ServerError: The server cannot be asked.
        """
        return list(self._model.labels)

    def predict(self, source: Source, start: int) -> Generator[list[Row]]:
        """Yields rows in the order of the items.

        Raises:
            EngineError: The server answered nothing for too long.
            ServerError: It refuses the job as a whole: unknown model, no access.
        """
        with asyncio.Runner() as runner:
            answers = self._answers(source.items(start))
            try:
                while rows := runner.run(_next(answers)):
                    yield rows
            finally:
                runner.run(answers.aclose())

    @cached_property
    def _model(self) -> ModelStatus:
        remote = self._remote
        with Client(remote.address, timeout_s=remote.timeout_s, options=self._options) as client:
            models = client.models()
        asked = [
            model
            for model in models
            if remote.model in ("", model.name) and remote.version in (0, model.version)
        ]
        if len({model.name for model in asked}) != 1:
            served = ", ".join(f"{model.name} version {model.version}" for model in models)
            wanted = f"{remote.model!r} version {remote.version or 'in service'}"
            raise EngineError(f"--model: expected one of {served}, got {wanted}")
        return asked[0]

    async def _answers(self, items: Iterator[Item]) -> AsyncGenerator[list[Row]]:
        self._answered_s = self._clock()
        pending: deque[asyncio.Task[Row]] = deque()
        address, timeout_s = self._remote.address, self._remote.timeout_s
        async with AsyncClient(address, timeout_s=timeout_s, options=self._options) as client:
            try:
                for item in items:
                    pending.append(asyncio.create_task(self._row(client, item)))
                    # So many stay under way while as many are handed over.
                    if len(pending) == 2 * self._remote.in_flight:
                        yield [await pending.popleft() for _ in range(self._remote.in_flight)]
                while pending:
                    yield [await pending.popleft()]
            finally:
                for task in pending:
                    task.cancel()
                await asyncio.gather(*pending, return_exceptions=True)

    async def _row(self, client: AsyncClient, item: Item) -> Row:
        remote, wait_s = self._remote, _FIRST_WAIT_S
        image = self._sendable(item.image)
        while True:
            ticket, refused = await self._window.enter(), False
            try:
                answer = await client.classify(
                    image, model=remote.model, version=remote.version, top_k=remote.top_k
                )
            except _REFUSALS as error:
                refused, refusal = True, error
            except _FAULTS as error:
                self._answered_s = self._clock()
                return Row(item.key, error=str(error))
            else:
                self._answered_s = self._clock()
                return _row(item.key, answer)
            finally:
                self._window.leave(ticket, refused=refused)
            self._check_patience(refusal)
            await asyncio.sleep(random.uniform(0, wait_s))
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _sendable(self, image: str | bytes | Pixels) -> ImageLike:
        """Pixels of another size than the model's go as a picture, which the server resizes."""
        size_px = (self._model.height_px, self._model.width_px)
        if isinstance(image, np.ndarray) and image.shape[:2] != size_px:
            return Image.fromarray(image)
        return image

    def _check_patience(self, refusal: ServerError) -> None:
        silence_s = self._clock() - self._answered_s
        if silence_s > self._remote.patience_s:
            raise EngineError(
                f"no answer for {silence_s:.0f} s, last: {refusal}; the same command goes on"
            ) from refusal


async def _next(answers: AsyncGenerator[list[Row]]) -> list[Row]:
    return await anext(answers, [])


def _row(key: str, answer: Classification) -> Row:
    return Row(
        key,
        tuple(score.label for score in answer.classes),
        tuple(score.index for score in answer.classes),
        tuple(score.probability for score in answer.classes),
        answer.model,
        answer.version,
    )
