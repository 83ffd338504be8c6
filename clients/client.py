"""The client for programs without an event loop."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
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
from clients.streams import classify_stream
from clients.tensors import Array, infer_request, inference
from convoy.oip.v2 import inference_pb2, inference_pb2_grpc
from convoy.v1 import classifier_pb2 as pb
from convoy.v1 import classifier_pb2_grpc

Reply = TypeVar("Reply")


class Client:
    """Talks to a server; safe to share between threads, not across a fork.

    Example:
        with Client("127.0.0.1:8001") as client:
            print(client.classify("seven.png", model="digits").best.label)

    Args:
        address: "HOST:PORT", "IP:PORT,IP:PORT" or "dns:///NAME:PORT"; by default CONVOY_ADDRESS or
            127.0.0.1:8001.
        timeout_s: What each call may take, its retries included.
        options: By default those in the environment, see `ConnectionOptions.from_environment`.

    Raises, from every call, a ServerError for what the server answered, and LifetimeError where the
    client was closed or made before a fork.
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
        self._channel = connection.open()
        self._classifier = classifier_pb2_grpc.ClassifierServiceStub(self._channel)
        self._inference = inference_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection."""
        self._lifetime.close()
        self._channel.close()

    def classify(
        self, image: ImageLike, *, model: str = "", version: int = 0, top_k: int = 1
    ) -> Classification:
        """Classifies one picture.

        Args:
            image: A path, a file's bytes, a PIL image, or pixels `[H, W, 3]` of the model's size.
            model: May stay empty where the server serves exactly one.
            version: 0 for the one in service.
            top_k: How many classes to return.

        Raises:
            ImageError: The picture cannot be sent.
            ServerError: The server did not answer with a class.
        """
        request = classify_request(image, model, version, top_k)
        return classification(self._call(self._classifier.Classify, request))

    def classify_many(
        self,
        images: Iterable[ImageLike],
        *,
        model: str = "",
        version: int = 0,
        top_k: int = 1,
        in_flight: int = 32,
        stream: bool = False,
    ) -> Generator[Classification | ClientError]:
        """Classifies pictures and yields an answer for each, in their order.

        A picture that cannot be classified yields its error and stops nobody else. At most
        `in_flight` requests are under way, and so many pictures held, at a time.

        Args:
            images: As `classify` takes them.
            model: As there.
            version: As there.
            top_k: As there.
            in_flight: At least 1.
            stream: Sends all over one ClassifyStream call instead of a call for each picture. When
                it breaks it is opened anew, and what was not answered is sent again, nothing else.

        Raises:
            UsageError: `in_flight` is below 1.
            ServerError: While iterating, if the server will not have a stream.
        """
        check_in_flight(in_flight)
        self._lifetime.check()
        if stream:
            backlog = Backlog(in_flight, self._timeout_s, self._retry)
            requests = classify_requests(images, model, version, top_k)
            return classify_stream(requests, self._open_stream, backlog)
        return self._classify_many(images, model, version, top_k, in_flight)

    def _classify_many(
        self, images: Iterable[ImageLike], model: str, version: int, top_k: int, in_flight: int
    ) -> Generator[Classification | ClientError]:
        pending: deque[grpc.Future | ClientError] = deque()
        try:
            for image in images:
                if len(pending) == in_flight:
                    yield _outcome(pending.popleft())
                pending.append(self._start(image, model, version, top_k))
            while pending:
                yield _outcome(pending.popleft())
        finally:
            for call in pending:
                if not isinstance(call, ClientError):
                    call.cancel()

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        *,
        version: str = "",
        outputs: Sequence[str] = (),
    ) -> Inference:
        """Runs a model on tensors; works with any server of the Open Inference Protocol.

        Args:
            model: Its name.
            inputs: Arrays by the names of the model's inputs; of str or bytes for BYTES.
            version: Empty for the one in service.
            outputs: Names of those wanted; all where there are none.

        Raises:
            TensorError: An array has no datatype in the protocol, or the reply makes no sense.
            ServerError: The server did not answer with tensors.
        """
        request = infer_request(model, inputs, version, outputs)
        return inference(self._call(self._inference.ModelInfer, request))

    def models(self) -> list[ModelStatus]:
        """Lists the model versions in service."""
        reply = self._call(self._classifier.ListModels, pb.ListModelsRequest())
        return [model_status(model) for model in reply.models]

    def health(self, model: str = "") -> Health:
        """Tells whether the server, or one of its models, takes requests.

        Raises:
            ServerError: The server cannot be asked.
        """
        alive = self._call(self._inference.ServerLive, inference_pb2.ServerLiveRequest())
        if model:
            request = inference_pb2.ModelReadyRequest(name=model)
            ready = self._call(self._inference.ModelReady, request).ready
        else:
            anything = inference_pb2.ServerReadyRequest()
            ready = self._call(self._inference.ServerReady, anything).ready
        return Health(alive.live, ready)

    def _open_stream(self, messages: Iterator[pb.ClassifyStreamRequest]) -> grpc.Call:
        self._lifetime.check()
        return self._classifier.ClassifyStream(messages, metadata=self._metadata)

    def _call(self, method: Callable[..., Reply], request: object) -> Reply:
        self._lifetime.check()
        try:
            return method(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    def _start(
        self, image: ImageLike, model: str, version: int, top_k: int
    ) -> grpc.Future | ClientError:
        self._lifetime.check()
        try:
            request = classify_request(image, model, version, top_k)
        except ClientError as error:
            return error
        return self._classifier.Classify.future(
            request, timeout=self._timeout_s, metadata=self._metadata
        )


def _outcome(call: grpc.Future | ClientError) -> Classification | ClientError:
    if isinstance(call, ClientError):
        return call
    try:
        return classification(call.result())
    except grpc.RpcError as error:
        return from_rpc_error(error)
