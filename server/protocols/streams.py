"""Streams whose requests are answered as they are ready, so out of order."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from server.protocols.calls import Context

Request = TypeVar("Request")
Reply = TypeVar("Reply")

# Requests of one stream under way; further ones are not read, so the caller is held back.
MAX_OPEN_REQUESTS = 256


async def answer_as_ready(
    requests: AsyncIterator[Request],
    context: Context,
    answer: Callable[[Request], Awaitable[Reply]],
    max_open: int = MAX_OPEN_REQUESTS,
) -> None:
    """Answers all requests of a stream, each at its own pace, and returns after the last reply.

    When the caller leaves, the requests under way are cancelled.

    Args:
        requests: The caller's.
        context: Takes the replies.
        answer: Answers one request; what it raises ends the stream.
        max_open: How many may be under way.
    """
    places = asyncio.Semaphore(max_open)
    writing = asyncio.Lock()

    async def serve(request: Request) -> None:
        try:
            reply = await answer(request)
            # A call takes one message at a time.
            async with writing:
                await context.write(reply)
        finally:
            places.release()

    async with asyncio.TaskGroup() as tasks:
        async for request in requests:
            await places.acquire()
            tasks.create_task(serve(request))
