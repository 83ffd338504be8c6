"""The engine `grpc`: a server classifies; its rejections show how much load it accepts.

    rejected          the server is overloaded, unreachable or too slow: sent again after a backoff,
                      with fewer images in flight
    server fault      INTERNAL, UNKNOWN and the like: sent again after a backoff, then one by one;
                      an image that fails while the server answers another becomes a row with its
                      error
    invalid image     a row with its error
    anything else     ends the job, e.g. an unknown model or a missing token

If the server answers no image for `patience_s`, the job ends; run again, it resumes.

All requests name the version that answered the first one, until the server no longer has it.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import (
    AsyncGenerator,
    Callable,
    Coroutine,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import grpc
import numpy as np

from convoy.client.batch.calls import (
    INPUT,
    OutputCalls,
    RemoteModel,
    Sendable,
    ServerCalls,
    sendable,
)
from convoy.client.batch.errors import EngineError
from convoy.client.batch.items import Item, Row, Source
from convoy.client.client import Client
from convoy.client.connection import Connection, ConnectionOptions, RetryPolicy
from convoy.client.errors import (
    DeadlineExceededError,
    ImageError,
    InferenceError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    ServerError,
    UnavailableError,
    UnsupportedError,
)
from convoy.client.results import ModelStatus

T = TypeVar("T")

_REJECTIONS = (OverloadedError, UnavailableError, DeadlineExceededError)
_FIRST_WAIT_S = 0.05
_LONGEST_WAIT_S = 2.0
_LOADING_POLL_S = 0.2
# Fewer where the server takes fewer; older servers do not say how many.
_IMAGES_A_REQUEST = 128
_IMAGES_IF_UNKNOWN = 32
_REQUEST_BYTES = 4 * 1024 * 1024
# After this many server errors for an image, the image itself is suspected.
_FAULTS_AN_IMAGE = 4


@dataclass(slots=True)
class _Waiting:
    """An item without an answer.

    Attributes:
        place: The position of its row in the chunk.
        faults: How often the server failed while it worked on it.
    """

    place: int
    image: Sendable
    faults: int = 0


@dataclass(slots=True)
class _Chunk:
    """Consecutive items.

    Attributes:
        rows: One for each item, None while there is no answer.
        waiting: The items without one.
        together: Whether a request may hold several; false after the server failed on one.
    """

    rows: list[Row | None] = field(default_factory=list)
    waiting: list[_Waiting] = field(default_factory=list)
    together: bool = True

    def finished(self) -> list[Row]:
        """Return the rows, once all are complete."""
        return [row for row in self.rows if row is not None]


class AdaptiveWindow:
    """Bounds the images in flight: additive increase, multiplicative decrease.

    The window doubles each round until the first rejection and grows by one each round after it. A
    rejection halves it, once for all requests that were sent under the same size (Chiu and Jain,
    1989).

    Args:
        largest: The largest size.
        initial: The first size.
    """

    def __init__(self, largest: int, initial: int = 32) -> None:
        self._largest = largest
        self._size = float(min(initial, largest))
        self._cuts = 0
        self._in_use = 0
        self._changed = asyncio.Condition()

    @property
    def size(self) -> int:
        """The images that may be in flight."""
        return int(self._size)

    async def acquire(self, images: int) -> int:
        """Wait for room, or until no other request has any; return a ticket for `release`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._has_room(images))
            self._in_use += images
            return self._cuts

    async def release(self, ticket: int, images: int, *, rejected: bool) -> None:
        """Release the room, and note whether the server rejected an image."""
        async with self._changed:
            self._in_use -= images
            if not rejected:
                step = images / self._size if self._cuts else images
                self._size = min(self._largest, self._size + step)
            elif ticket == self._cuts:
                self._cuts += 1
                self._size = max(1, self._size / 2)
            self._changed.notify_all()

    def _has_room(self, images: int) -> bool:
        return self._in_use == 0 or self._in_use + images <= self.size


class GrpcEngine:
    """Classifies through a server.

    Args:
        remote: The model on the server.
        options: How to connect; this engine retries by itself.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        remote: RemoteModel,
        options: ConnectionOptions | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        options = ConnectionOptions.from_environment() if options is None else options
        # gRPC's own retries would hide the rejections that the window has to see.
        self._options = replace(options, retry=RetryPolicy(attempts=1))
        self._remote = remote
        self._clock = clock
        self._answered_s = 0.0
        self._has_answered = False

    @property
    def identity(self) -> Mapping[str, object]:
        """The requested model; a row names the version that answered."""
        return {"engine": "grpc", "model": self._remote.model, "version": self._remote.version}

    def labels(self) -> list[str]:
        """Return the model's classes. A wrong address or name ends the job here.

        Raises:
            EngineError: The server serves no such model, or several and none was named.
            ServerError: The server cannot be asked.
        """
        return list(self._model.labels)

    def predict(self, source: Source, start: int, version: int = 0) -> Generator[list[Row]]:
        """Yield rows in the order of the items.

        Args:
            source: The input.
            start: The number of the first item.
            version: The version to ask for if the server still has it.

        Raises:
            EngineError: The server answered nothing for too long.
            ServerError: It rejects the job as a whole: unknown model, no access.
        """
        with asyncio.Runner() as runner:
            answers = self._answers(source.items(start), version)
            try:
                while rows := _finished(runner.get_loop(), _next(answers)):
                    yield rows
            finally:
                runner.run(answers.aclose())

    @property
    def _model(self) -> ModelStatus:
        """The newest version asked for."""
        return self._versions[-1]

    @property
    def _images_a_request(self) -> int:
        return min(_IMAGES_A_REQUEST, self._model.max_request_images or _IMAGES_IF_UNKNOWN)

    @cached_property
    def _versions(self) -> list[ModelStatus]:
        """The versions of the model that the server has, oldest first."""
        remote = self._remote
        started_s = self._clock()
        with Client(remote.address, timeout_s=remote.timeout_s, options=self._options) as client:
            while True:
                models = client.models()
                asked = [
                    model
                    for model in models
                    if remote.model in ("", model.name) and remote.version in (0, model.version)
                ]
                if len({model.name for model in asked}) == 1:
                    self._check_outputs(client, asked[-1])
                    return asked
                # A starting server lists its models as it loads them.
                waited_s = self._clock() - started_s
                if waited_s > remote.patience_s or _is_ready(client):
                    break
                time.sleep(_LOADING_POLL_S)
        served = ", ".join(f"{model.name} version {model.version}" for model in models)
        wanted = f"{remote.model!r} version {remote.version or 'in service'}"
        raise EngineError(f"--model: expected one of {served or 'none'}, got {wanted}")

    def _check_outputs(self, client: Client, model: ModelStatus) -> None:
        """Request the outputs for a black image, before any other image."""
        if outputs := self._remote.outputs:
            black = {INPUT: np.zeros((1, model.height_px, model.width_px, 3), np.uint8)}
            try:
                client.infer(model.name, black, version=str(model.version), outputs=outputs)
            except (InvalidRequestError, UnsupportedError) as error:
                raise EngineError(f"--columns: {error}") from error

    async def _answers(self, items: Iterator[Item], version: int) -> AsyncGenerator[list[Row]]:
        self._answered_s = self._clock()
        remote = self._remote
        if version not in {each.version for each in self._versions}:
            version = remote.version
        window = AdaptiveWindow(remote.in_flight)
        most_pending = max(2, 2 * remote.in_flight // self._images_a_request)
        pending: deque[asyncio.Task[list[Row]]] = deque()
        connection = Connection.to(remote.address, remote.timeout_s, self._options)
        async with connection.open_aio() as channel:
            calls = self._calls(channel, connection, version)
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

    def _calls(
        self, channel: grpc.aio.Channel, connection: Connection, version: int
    ) -> ServerCalls:
        # The Open Inference Protocol allows no empty name.
        remote = replace(self._remote, model=self._model.name)
        metadata = connection.metadata()
        if remote.outputs:
            return OutputCalls(channel, metadata, remote, version, versions=self._versions)
        return ServerCalls(channel, metadata, remote, version)

    def _chunks(self, items: Iterator[Item]) -> Iterator[_Chunk]:
        """Read the items, as many in a chunk as fit in one request."""
        size_px = (self._model.height_px, self._model.width_px)
        most = self._images_a_request
        chunk, chunk_bytes = _Chunk(), 0
        for item in items:
            try:
                image = sendable(item, size_px)
            except ImageError as error:
                chunk.rows.append(Row(item.key, error=str(error)))
            else:
                chunk.waiting.append(_Waiting(len(chunk.rows), image))
                chunk.rows.append(None)
                chunk_bytes += image.image.ByteSize()
            if len(chunk.rows) == most or chunk_bytes >= _REQUEST_BYTES:
                yield chunk
                chunk, chunk_bytes = _Chunk(), 0
        if chunk.rows:
            yield chunk

    async def _rows(self, calls: ServerCalls, window: AdaptiveWindow, chunk: _Chunk) -> list[Row]:
        wait_s = _FIRST_WAIT_S
        while chunk.waiting:
            asked = chunk.waiting[: window.size if chunk.together else 1]
            ticket = await window.acquire(len(asked))
            answers = await self._ask(calls, [each.image for each in asked])
            rejected = any(isinstance(answer, _REJECTIONS) for answer in answers)
            await window.release(ticket, len(asked), rejected=rejected)
            before = len(chunk.waiting)
            unanswered = await self._take(calls, chunk, asked, answers)
            if len(chunk.waiting) < before:
                wait_s = _FIRST_WAIT_S
            if unanswered is not None:
                self._check_patience(unanswered)
                await asyncio.sleep(random.uniform(0, wait_s))
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        return chunk.finished()

    async def _take(
        self,
        calls: ServerCalls,
        chunk: _Chunk,
        asked: Sequence[_Waiting],
        answers: Sequence[Row | ServerError],
    ) -> ServerError | None:
        """Put answers in their places; the other items wait again.

        Returns:
            Why an item has no answer yet, if one has none.

        Raises:
            ServerError: An answer is about the job, not about an image.
        """
        again: list[_Waiting] = []
        reason: ServerError | None = None
        for each, answer in zip(asked, answers, strict=True):
            row = await self._row(calls, each, answer)
            if row is not None:
                chunk.rows[each.place] = row
                self._answered_s, self._has_answered = self._clock(), True
            elif isinstance(answer, ServerError):
                again.append(each)
                reason = answer
                chunk.together = chunk.together and not isinstance(answer, InferenceError)
        chunk.waiting = again + chunk.waiting[len(asked) :]
        return reason

    async def _row(
        self, calls: ServerCalls, waiting: _Waiting, answer: Row | ServerError
    ) -> Row | None:
        """Return an answer as a row; None if the image must be sent again.

        Raises:
            ServerError: It is about the job, not about the image.
        """
        if isinstance(answer, Row):
            return answer
        if isinstance(answer, InvalidRequestError):
            return Row(waiting.image.key, error=str(answer))
        if isinstance(answer, InferenceError):
            waiting.faults += 1
            if waiting.faults < _FAULTS_AN_IMAGE or not await self._is_sound(calls):
                return None
            return Row(waiting.image.key, error=str(answer))
        if isinstance(answer, ModelNotFoundError) and self._has_answered:
            # A server that was restarted may listen before it has loaded the model again.
            if calls.version != self._remote.version:
                with suppress(ServerError):  # it is requested again with the image
                    await calls.drop_missing_version()
            return None
        if isinstance(answer, _REJECTIONS):
            return None
        raise answer

    async def _is_sound(self, calls: ServerCalls) -> bool:
        """Tell whether the server classifies a black image."""
        size_px = (self._model.height_px, self._model.width_px)
        black = Item("", np.zeros((*size_px, 3), np.uint8))
        (answer,) = await self._ask(calls, [sendable(black, size_px)])
        return isinstance(answer, Row)

    async def _ask(
        self, calls: ServerCalls, images: Sequence[Sendable]
    ) -> Sequence[Row | ServerError]:
        """Send images; one at a time if they cannot be answered together."""
        try:
            return await calls.classify(images)
        except InvalidRequestError as error:
            if len(images) == 1:
                return [error]
            return [answer for image in images for answer in await self._ask(calls, [image])]
        except ServerError as error:
            return [error] * len(images)

    def _check_patience(self, reason: ServerError) -> None:
        silence_s = self._clock() - self._answered_s
        if silence_s > self._remote.patience_s:
            raise EngineError(
                f"no answer for {silence_s:.0f} s, last: {reason}; the same command resumes"
            ) from reason


def _is_ready(client: Client) -> bool:
    try:
        return client.health().ready
    except UnsupportedError:  # a server without the Open Inference Protocol
        return True


def _finished(loop: asyncio.AbstractEventLoop, rows: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine; an interrupt cancels it, so that the loop can run others.

    `asyncio.Runner.run` would set and reset the handler of SIGINT each time, which costs as much as
    several images.
    """
    task = loop.create_task(rows)
    try:
        return loop.run_until_complete(task)
    except BaseException:
        task.cancel()
        loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        raise


async def _next(answers: AsyncGenerator[list[Row]]) -> list[Row]:
    return await anext(answers, [])
