"""The engine `grpc`: a server classifies, and says by its refusals how much it takes."""

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from clients.batch.calls import RemoteModel, Sendable, ServerCalls, sendable
from clients.batch.errors import EngineError
from clients.batch.inputs import Source
from clients.batch.rows import Item, Row
from clients.batch.window import AdaptiveWindow
from clients.client import Client
from clients.connection import Connection, ConnectionOptions, RetryPolicy
from clients.errors import (
    DeadlineExceededError,
    ImageError,
    InferenceError,
    InvalidRequestError,
    OverloadedError,
    ServerError,
    UnavailableError,
)
from clients.results import ModelStatus

# What says nothing about the image: the same request may well be answered later.
_REFUSALS = (OverloadedError, UnavailableError, DeadlineExceededError)
# What an image in the request brought upon itself, and upon the others in it.
_FAULTS = (InvalidRequestError, InferenceError)
_FIRST_WAIT_S = 0.05
_LONGEST_WAIT_S = 2.0
_IMAGES_A_REQUEST = 32
_REQUEST_BYTES = 4 * 1024 * 1024


@dataclass(slots=True)
class _Chunk:
    """Items that follow each other.

    Attributes:
        rows: One for each, None where there is no answer yet.
        waiting: Those without, with their places in `rows`.
    """

    rows: list[Row | None] = field(default_factory=list)
    waiting: list[tuple[int, Sendable]] = field(default_factory=list)

    def take(
        self, asked: Sequence[tuple[int, Sendable]], answers: Sequence[Row | ServerError]
    ) -> list[ServerError]:
        """Puts answers in their places; returns refusals, whose items wait again.

        Args:
            asked: The first ones that waited.
            answers: One for each.
        """
        again: list[tuple[int, Sendable]] = []
        refusals: list[ServerError] = []
        for (place, sent), answer in zip(asked, answers, strict=True):
            if isinstance(answer, _REFUSALS):
                again.append((place, sent))
                refusals.append(answer)
            else:
                self.rows[place] = _row(sent.key, answer)
        self.waiting = again + self.waiting[len(asked) :]
        return refusals

    def finished(self) -> list[Row]:
        """The rows, when all are there."""
        return [row for row in self.rows if row is not None]


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
        remote = self._remote
        window = AdaptiveWindow(remote.in_flight)
        most_pending = max(2, 2 * remote.in_flight // _IMAGES_A_REQUEST)
        pending: deque[asyncio.Task[list[Row]]] = deque()
        connection = Connection.to(remote.address, remote.timeout_s, self._options)
        async with connection.open_aio() as channel:
            calls = ServerCalls(channel, connection.metadata(), remote)
            try:
                for chunk in self._chunks(items):
                    pending.append(asyncio.create_task(self._rows(calls, window, chunk)))
                    if len(pending) == most_pending:
                        yield await pending.popleft()
                while pending:
                    yield await pending.popleft()
            finally:
                for task in pending:
                    task.cancel()
                await asyncio.gather(*pending, return_exceptions=True)

    def _chunks(self, items: Iterator[Item]) -> Iterator[_Chunk]:
        """Reads the items, so many in a chunk that a request with all of them is not large."""
        size_px = (self._model.height_px, self._model.width_px)
        chunk, chunk_bytes = _Chunk(), 0
        for item in items:
            try:
                image = sendable(item, size_px)
            except ImageError as error:
                chunk.rows.append(Row(item.key, error=str(error)))
            else:
                chunk.waiting.append((len(chunk.rows), image))
                chunk.rows.append(None)
                chunk_bytes += image.image.ByteSize()
            if len(chunk.rows) == _IMAGES_A_REQUEST or chunk_bytes >= _REQUEST_BYTES:
                yield chunk
                chunk, chunk_bytes = _Chunk(), 0
        if chunk.rows:
            yield chunk

    async def _rows(self, calls: ServerCalls, window: AdaptiveWindow, chunk: _Chunk) -> list[Row]:
        wait_s = _FIRST_WAIT_S
        while chunk.waiting:
            asked = chunk.waiting[: window.size]
            ticket = await window.enter(len(asked))
            answers = await self._ask(calls, [image for _, image in asked])
            refusals = chunk.take(asked, answers)
            await window.leave(ticket, len(asked), refused=bool(refusals))
            if len(refusals) < len(asked):
                self._answered_s, wait_s = self._clock(), _FIRST_WAIT_S
            if refusals:
                self._check_patience(refusals[-1])
                await asyncio.sleep(random.uniform(0, wait_s))
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        return chunk.finished()

    async def _ask(
        self, calls: ServerCalls, images: Sequence[Sendable]
    ) -> Sequence[Row | ServerError]:
        """Asks about images; one at a time where they cannot be answered together."""
        try:
            return await calls.classify(images)
        except _REFUSALS as error:
            return [error] * len(images)
        except _FAULTS as error:
            if len(images) == 1:
                return [error]
            return [answer for image in images for answer in await self._ask(calls, [image])]

    def _check_patience(self, refusal: ServerError) -> None:
        silence_s = self._clock() - self._answered_s
        if silence_s > self._remote.patience_s:
            raise EngineError(
                f"no answer for {silence_s:.0f} s, last: {refusal}; the same command goes on"
            ) from refusal


async def _next(answers: AsyncGenerator[list[Row]]) -> list[Row]:
    return await anext(answers, [])


def _row(key: str, answer: Row | ServerError) -> Row:
    """An answer as a row.

    Raises:
        ServerError: It is about the job, not about the image.
    """
    if isinstance(answer, Row):
        return answer
    if isinstance(answer, _FAULTS):
        return Row(key, error=str(answer))
    raise answer
