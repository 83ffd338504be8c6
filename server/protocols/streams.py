"""Streams whose requests are answered as they are ready, so out of order."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from server.catalogue import Models
from server.errors import UnavailableError
from server.protocols.calls import STATUS_OF, Context

Request = TypeVar("Request")
Reply = TypeVar("Reply")

# Requests of one stream under way; further ones are not read, so the caller is held back.
MAX_OPEN_REQUESTS = 256


class Streams:
    """The streams that are open.

    While the server starts or drains, a stream ends with UNAVAILABLE as a whole: a caller who heard
    it of each request alone would go on asking this server instead of another, and a stream that
    waits for its next request would hold up the drain.

    Args:
        catalogue: Says whether requests are answered.
        max_open: How many requests of one stream may be under way.
    """

    def __init__(self, catalogue: Models, max_open: int = MAX_OPEN_REQUESTS) -> None:
        self._catalogue = catalogue
        self._max_open = max_open
        self._readers: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        """Reads no stream any further; each ends when what was read of it is answered."""
        for reader in self._readers:
            reader.cancel()

    async def answer_as_ready(
        self,
        requests: AsyncIterator[Request],
        context: Context,
        answer: Callable[[Request], Awaitable[Reply]],
    ) -> None:
        """Answers all requests of a stream, each at its own pace, and returns after the last reply.

        When the caller leaves, the requests under way are cancelled.

        Args:
            requests: The caller's.
            context: Takes the replies.
            answer: Answers one request; what it raises ends the stream.
        """
        places = asyncio.Semaphore(self._max_open)
        writing = asyncio.Lock()

        async def read() -> None:
            async for request in requests:
                await places.acquire()
                tasks.create_task(serve(request))

        async def serve(request: Request) -> None:
            try:
                reply = await answer(request)
                # A call takes one message at a time.
                async with writing:
                    await context.write(reply)
            finally:
                places.release()

        closed = not self._catalogue.open
        if not closed:
            async with asyncio.TaskGroup() as tasks:
                reader = tasks.create_task(read())
                self._readers.add(reader)
                reader.add_done_callback(self._readers.discard)
            closed = reader.cancelled()
        if closed:
            code = STATUS_OF[UnavailableError]
            await context.abort(code, "the server is starting or draining")
