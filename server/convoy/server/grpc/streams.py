"""Streams: answer each request of a stream when it is ready, possibly out of order."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TypeVar

from google.protobuf.message import Message

from convoy.server.edge.limits import ByteBudget, Holder
from convoy.server.errors import OverloadedError, UnavailableError
from convoy.server.grpc.context import Context, abort
from convoy.server.models.registry import Models
from convoy.server.protocol.calls import rejection_of

Request = TypeVar("Request", bound=Message)
Reply = TypeVar("Reply")

# Requests of one stream in flight; further ones are not read, which is back-pressure.
MAX_OPEN_REQUESTS = 256
_NO_ROOM = "the server's memory for requests is full"


class Streams:
    """The open streams.

    While the server starts or drains, a whole stream ends with UNAVAILABLE: a caller that received
    this status for each request would keep using this server instead of another, and a stream
    without requests would block the drain.

    Args:
        models: The models in service, with the state of the server.
        budget: Counts the bytes of requests in flight.
        max_open: The most requests of one stream in flight.
    """

    def __init__(
        self, models: Models, budget: ByteBudget, max_open: int = MAX_OPEN_REQUESTS
    ) -> None:
        self._models = models
        self._budget = budget
        self._max_open = max_open
        self._readers: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        """Stop reading all streams; each ends when the requests that were read are answered."""
        for reader in self._readers:
            reader.cancel()

    async def answer_as_ready(
        self,
        requests: AsyncIterator[Request],
        context: Context,
        answer: Callable[[Request], Awaitable[Reply]],
    ) -> None:
        """Answer all requests of a stream, concurrently, and return after the last reply.

        When the caller cancels, the requests in flight are cancelled.

        Args:
            requests: The requests of the stream.
            context: The call, which sends the replies.
            answer: Answers one request; an exception of it ends the stream.
        """
        slots = asyncio.Semaphore(self._max_open)
        writing = asyncio.Lock()

        async def read() -> None:
            async for request in requests:
                await slots.acquire()
                held = Holder()
                if not self._budget.take(request.ByteSize(), held):
                    await abort(context, rejection_of(OverloadedError(_NO_ROOM)))
                task = tasks.create_task(serve(request))
                # Not in `serve`: a task that is cancelled before it runs never enters it.
                task.add_done_callback(partial(self._release, held))

        async def serve(request: Request) -> None:
            try:
                reply = await answer(request)
                # A call sends one message at a time.
                async with writing:
                    await context.write(reply)
            finally:
                slots.release()

        closed = not self._models.open
        if not closed:
            try:
                async with asyncio.TaskGroup() as tasks:
                    reader = tasks.create_task(read())
                    self._readers.add(reader)
                    reader.add_done_callback(self._readers.discard)
            except BaseExceptionGroup as failures:
                # The first failure has ended the others and determines the status.
                raise failures.exceptions[0] from None
            closed = reader.cancelled()
        if closed:
            error = UnavailableError("the server is starting or draining")
            await abort(context, rejection_of(error))

    def _release(self, held: Holder, _: object) -> None:
        self._budget.release(held)
