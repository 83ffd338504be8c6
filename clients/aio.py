"""The client for asyncio programs."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TypeVar

import grpc

from clients.backlog import Backlog
from clients.connection import DEFAULT_TIMEOUT_S, Connection, ConnectionOptions
from clients.errors import ClientError, from_rpc_error
from clients.images import ImageLike, check_in_flight, classify_request, classify_requests
from clients.lifetime import Lifetime
from clients.results import (
    Classification,
    Health,
    Inference,
    ModelStatus,
    classification,
    model_status,
)
from clients.streams import classify_stream_aio
from clients.tensors import Array, infer_request, inference
from convoy.oip.v2 import inference_pb2, inference_pb2_grpc
from convoy.v1 import classifier_pb2 as pb
from convoy.v1 import classifier_pb2_grpc

Reply = TypeVar("Reply")


class AsyncClient:
    """Talks to a server from one event loop.

    Example:
        async with AsyncClient() as client:
            async for answer in client.classify_many(paths, model="digits"):
                print(answer)

    Arguments, answers and errors are those of `Client`.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        options: ConnectionOptions | None = None,
    ) -> None:
        connection = Connection.to(address, timeout_s, options)
        self._lifetime = Lifetime()
        self._timeout_s = timeout_s
        self._metadata = connection.metadata()
        self._retry = connection.options.retry
        self._channel = connection.open_aio()
        self._classifier = classifier_pb2_grpc.ClassifierServiceStub(self._channel)
        self._inference = inference_pb2_grpc.GRPCInferenceServiceStub(self._channel)

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
        self._lifetime.close()
        await self._channel.close()

    async def classify(
        self, image: ImageLike, *, model: str = "", version: int = 0, top_k: int = 1
    ) -> Classification:
        """Classifies one picture."""
        request = classify_request(image, model, version, top_k)
        return classification(await self._call(self._classifier.Classify, request))

    def classify_many(
        self,
        images: Iterable[ImageLike],
        *,
        model: str = "",
        version: int = 0,
        top_k: int = 1,
        in_flight: int = 32,
        stream: bool = False,
    ) -> AsyncGenerator[Classification | ClientError]:
        """Classifies pictures and yields an answer for each, in their order; see `Client`."""
        check_in_flight(in_flight)
        self._lifetime.check()
        if stream:
            backlog = Backlog(in_flight, self._timeout_s, self._retry)
            requests = classify_requests(images, model, version, top_k)
            return classify_stream_aio(requests, self._open_stream, backlog)
        return self._classify_many(images, model, version, top_k, in_flight)

    async def _classify_many(
        self, images: Iterable[ImageLike], model: str, version: int, top_k: int, in_flight: int
    ) -> AsyncGenerator[Classification | ClientError]:
        self._lifetime.check()
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

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        *,
        version: str = "",
        outputs: Sequence[str] = (),
    ) -> Inference:
        """Runs a model on tensors; works with any server of the Open Inference Protocol."""
        request = infer_request(model, inputs, version, outputs)
        return inference(await self._call(self._inference.ModelInfer, request))

    async def models(self) -> list[ModelStatus]:
        """Lists the model versions in service."""
        reply = await self._call(self._classifier.ListModels, pb.ListModelsRequest())
        return [model_status(model) for model in reply.models]

    async def health(self, model: str = "") -> Health:
        """Tells whether the server, or one of its models, takes requests."""
        alive = await self._call(self._inference.ServerLive, inference_pb2.ServerLiveRequest())
        if model:
            request = inference_pb2.ModelReadyRequest(name=model)
            ready = (await self._call(self._inference.ModelReady, request)).ready
        else:
            anything = inference_pb2.ServerReadyRequest()
            ready = (await self._call(self._inference.ServerReady, anything)).ready
        return Health(alive.live, ready)

    def _open_stream(self) -> grpc.aio.StreamStreamCall:
        self._lifetime.check()
        return self._classifier.ClassifyStream(metadata=self._metadata)

    async def _call(self, method: Callable[..., Awaitable[Reply]], request: object) -> Reply:
        self._lifetime.check()
        try:
            return await method(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
