"""The client for asyncio programs."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from types import TracebackType

import grpc

from clients.connection import ConnectionOptions, default_address
from clients.errors import ClientError, from_status
from clients.images import ImageLike, classify_request
from clients.results import Classification, classification
from convoy.v1 import classifier_pb2_grpc


class AsyncClient:
    """Talks to one server from one event loop.

    Example:
        async with AsyncClient() as client:
            async for answer in client.classify_many(paths, model="digits"):
                print(answer)
    """

    def __init__(self, address: str | None = None, *, timeout_s: float = 10.0) -> None:
        options = ConnectionOptions(address or default_address(), timeout_s)
        self._timeout_s = timeout_s
        self._channel = grpc.aio.insecure_channel(options.address, options.channel_options())
        self._classifier = classifier_pb2_grpc.ClassifierServiceStub(self._channel)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection."""
        await self._channel.close()

    async def classify(
        self, image: ImageLike, *, model: str = "", version: int = 0, top_k: int = 1
    ) -> Classification:
        """Classifies one picture; arguments and errors are those of `Client.classify`."""
        request = classify_request(image, model, version, top_k)
        try:
            return classification(await self._classifier.Classify(request, timeout=self._timeout_s))
        except grpc.aio.AioRpcError as error:
            raise from_status(error.code(), error.details()) from error

    async def classify_many(
        self,
        images: Iterable[ImageLike],
        *,
        model: str = "",
        version: int = 0,
        top_k: int = 1,
        in_flight: int = 32,
    ) -> AsyncIterator[Classification | ClientError]:
        """Classifies pictures and yields an answer for each, in their order.

        A picture that cannot be classified yields its error and stops nobody else. At most
        `in_flight` requests are under way, and so many pictures held, at a time.
        """
        pending: deque[asyncio.Task[Classification | ClientError]] = deque()

        async def answer(image: ImageLike) -> Classification | ClientError:
            try:
                return await self.classify(image, model=model, version=version, top_k=top_k)
            except ClientError as error:
                return error

        try:
            for image in images:
                if len(pending) == in_flight:
                    yield await pending.popleft()
                pending.append(asyncio.create_task(answer(image)))
            while pending:
                yield await pending.popleft()
        finally:
            for task in pending:
                task.cancel()
