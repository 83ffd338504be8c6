"""The client for asyncio programs."""

import asyncio
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import grpc
import numpy as np

from convoy.client.connection import (
    CLIENT_TIMEOUT,
    DEFAULT_TIMEOUT_S,
    Connection,
    ConnectionOptions,
    Lifetime,
    Timeout,
)
from convoy.client.errors import ClientError, from_rpc_error
from convoy.client.images import ImageLike, check_in_flight, classify_request
from convoy.client.pending import PendingRequests
from convoy.client.results import (
    Classification,
    Health,
    Inference,
    ModelStatus,
    classification,
    model_status,
)
from convoy.client.streams import classify_stream_aio
from convoy.client.tensors import Array, infer_request, inference
from convoy.oip.v2 import inference_pb2, inference_pb2_grpc
from convoy.v1 import classifier_pb2 as pb
from convoy.v1 import classifier_pb2_grpc

Reply = TypeVar("Reply")


@dataclass(frozen=True, slots=True)
class _Stubs:
    """The channel of one event loop."""

    channel: grpc.aio.Channel
    classifier: "classifier_pb2_grpc.ClassifierServiceAsyncStub"
    inference: "inference_pb2_grpc.GRPCInferenceServiceAsyncStub"


class AsyncClient:
    """A connection to a server, or to several, for asyncio.

    You may create a client before there is an event loop; it connects in the first call.

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
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        options: ConnectionOptions | None = None,
    ) -> None:
        self._connection = Connection.to(address, timeout_s, options)
        self._connection.metadata()  # raises now for a token that may not be sent
        self._lifetime = Lifetime()
        self._stubs_of: WeakKeyDictionary[asyncio.AbstractEventLoop, _Stubs] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        here = self._connection
        return partial(AsyncClient, timeout_s=here.timeout_s, options=here.options), (here.address,)

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
        """Close the connection of this event loop; calls in flight are cancelled."""
        self._lifetime.close()
        if stubs := self._stubs_of.pop(asyncio.get_running_loop(), None):
            await stubs.channel.close()

    async def classify(
        self,
        image: ImageLike,
        *,
        model: str = "",
        version: int = 0,
        top_k: int = 1,
        timeout_s: Timeout = CLIENT_TIMEOUT,
        metadata: Mapping[str, str] | None = None,
        request_id: str | None = None,
    ) -> Classification:
        """Classify one image; files and PIL images are read in a thread."""
        request = await _request(image, (model, version, top_k))
        options = self._connection.call_options(timeout_s, metadata, request_id)
        reply = await self._call(self._stubs().classifier.Classify, request, options, request_id)
        return classification(reply)

    def classify_many(
        self,
        images: Iterable[ImageLike] | AsyncIterable[ImageLike],
        *,
        model: str = "",
        version: int = 0,
        top_k: int = 1,
        in_flight: int = 32,
        stream: bool = False,
        timeout_s: Timeout = CLIENT_TIMEOUT,
        metadata: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[Classification | ClientError]:
        """Classify images and yield the answers in order; see `Client`."""
        check_in_flight(in_flight)
        self._lifetime.check()
        options = self._connection.call_options(timeout_s, metadata)
        wanted = (model, version, top_k)
        if stream:
            pending = PendingRequests(in_flight, options["timeout"], self._connection.options.retry)
            requests = _requests(images, wanted)
            return classify_stream_aio(requests, partial(self._open_stream, options), pending)
        return self._classify_many(images, wanted, in_flight, options)

    async def _classify_many(
        self,
        images: Iterable[ImageLike] | AsyncIterable[ImageLike],
        wanted: tuple[str, int, int],
        in_flight: int,
        options: dict[str, Any],
    ) -> AsyncGenerator[Classification | ClientError]:
        pending: deque[asyncio.Task[Classification | ClientError]] = deque()
        failure: Exception | None = None
        source = aiter(_each(images))

        async def answer(image: ImageLike) -> Classification | ClientError:
            try:
                request = await _request(image, wanted)
                method = self._stubs().classifier.Classify
                return classification(await self._call(method, request, options))
            except ClientError as error:
                return error

        try:
            while True:
                try:
                    image = await anext(source)
                except StopAsyncIteration:
                    break
                except Exception as error:
                    failure = error
                    break
                if len(pending) == in_flight:
                    yield await pending.popleft()
                pending.append(asyncio.create_task(answer(image)))
            while pending:
                yield await pending.popleft()
        finally:
            for task in pending:
                task.cancel()
        if failure is not None:
            raise failure

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        *,
        version: str = "",
        outputs: Sequence[str] = (),
        timeout_s: Timeout = CLIENT_TIMEOUT,
        metadata: Mapping[str, str] | None = None,
        request_id: str | None = None,
    ) -> Inference:
        """Run a model on tensors; works with any server of the Open Inference Protocol v2."""
        request = infer_request(model, inputs, version, outputs, request_id or "")
        options = self._connection.call_options(timeout_s, metadata, request_id)
        method = self._stubs().inference.ModelInfer
        return inference(await self._call(method, request, options, request_id))

    async def models(self, *, timeout_s: Timeout = CLIENT_TIMEOUT) -> list[ModelStatus]:
        """List the model versions in service."""
        options = self._connection.call_options(timeout_s)
        method = self._stubs().classifier.ListModels
        reply = await self._call(method, pb.ListModelsRequest(), options)
        return [model_status(model) for model in reply.models]

    async def health(self, model: str = "", *, timeout_s: Timeout = CLIENT_TIMEOUT) -> Health:
        """Return whether the server, or one of its models, accepts requests."""
        options = self._connection.call_options(timeout_s)
        service = self._stubs().inference
        alive = await self._call(service.ServerLive, inference_pb2.ServerLiveRequest(), options)
        if model:
            request = inference_pb2.ModelReadyRequest(name=model)
            ready = (await self._call(service.ModelReady, request, options)).ready
        else:
            anything = inference_pb2.ServerReadyRequest()
            ready = (await self._call(service.ServerReady, anything, options)).ready
        return Health(alive.live, ready)

    def _stubs(self) -> _Stubs:
        """Return the stubs of the running loop; open a channel with the first call in it."""
        self._lifetime.check()
        loop = asyncio.get_running_loop()
        if (stubs := self._stubs_of.get(loop)) is None:
            channel = self._connection.open_aio()
            stubs = self._stubs_of[loop] = _Stubs(
                channel,
                classifier_pb2_grpc.ClassifierServiceStub(channel),
                inference_pb2_grpc.GRPCInferenceServiceStub(channel),
            )
        return stubs

    def _open_stream(self, options: dict[str, Any]) -> grpc.aio.StreamStreamCall:
        # Each image has a deadline; the call may last longer.
        return self._stubs().classifier.ClassifyStream(**{**options, "timeout": None})

    async def _call(
        self,
        method: Callable[..., Awaitable[Reply]],
        request: object,
        options: dict[str, Any],
        request_id: str | None = None,
    ) -> Reply:
        self._lifetime.check()
        try:
            return await method(request, **options)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, request_id) from error


async def _each(
    images: Iterable[ImageLike] | AsyncIterable[ImageLike],
) -> AsyncIterator[ImageLike]:
    if isinstance(images, AsyncIterable):
        async for image in images:
            yield image
    else:
        for image in images:
            yield image


async def _request(image: ImageLike, wanted: tuple[str, int, int]) -> pb.ClassifyRequest:
    if isinstance(image, bytes | bytearray | memoryview | np.ndarray):
        return classify_request(image, *wanted)
    return await asyncio.to_thread(classify_request, image, *wanted)


async def _requests(
    images: Iterable[ImageLike] | AsyncIterable[ImageLike], wanted: tuple[str, int, int]
) -> AsyncGenerator[pb.ClassifyRequest | ClientError]:
    async for image in _each(images):
        try:
            yield await _request(image, wanted)
        except ClientError as error:
            yield error
