"""The client for programs without an event loop."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import grpc

from convoy.client.connection import (
    CLIENT_TIMEOUT,
    DEFAULT_TIMEOUT_S,
    Connection,
    ConnectionOptions,
    Lifetime,
    Timeout,
)
from convoy.client.errors import ClientError, LifetimeError, from_rpc_error
from convoy.client.images import ImageLike, check_in_flight, classify_request, classify_requests
from convoy.client.pending import PendingRequests
from convoy.client.results import (
    Classification,
    Health,
    Inference,
    ModelStatus,
    classification,
    model_status,
)
from convoy.client.streams import classify_stream
from convoy.client.tensors import Array, infer_request, inference
from convoy.oip.v2 import inference_pb2, inference_pb2_grpc
from convoy.v1 import classifier_pb2 as pb
from convoy.v1 import classifier_pb2_grpc

Reply = TypeVar("Reply")


class Client:
    """A connection to a server, or to several.

    Threads may share a client. A forked process may not use it. Pickling a client, for example for
    the workers of a data loader, creates one with the same settings there.

    Example:
        with Client("127.0.0.1:8001") as client:
            print(client.classify("seven.png", model="digits").best.label)

    Args:
        address: "HOST:PORT", "HOST:PORT,HOST:PORT" or "dns:///NAME:PORT"; by default CONVOY_ADDRESS
            or 127.0.0.1:8001.
        timeout_s: The deadline of each call, its retries included; None for none.
        options: By default those in the environment, see `ConnectionOptions.from_environment`.

    Every call takes `timeout_s` (None for no deadline), `metadata` and `request_id`, which is sent
    as x-request-id and kept in errors. Every call raises a ServerError for a status that is not OK,
    and a LifetimeError if the client was closed, or created before a fork.
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
        self._channel = self._connection.open()
        self._classifier = classifier_pb2_grpc.ClassifierServiceStub(self._channel)
        self._inference = inference_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def __reduce__(self) -> tuple[Any, ...]:
        here = self._connection
        return partial(Client, timeout_s=here.timeout_s, options=here.options), (here.address,)

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
        """Close the connection; calls in flight are cancelled."""
        self._lifetime.close()
        self._channel.close()

    def classify(
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
        """Classify one image.

        Args:
            image: A path, a URL (with fsspec), a file's bytes, an open binary file, a PIL image of
                any mode, or RGB pixels uint8 of the model's size as a NumPy array `[H, W, 3]` or a
                torch tensor `[3, H, W]`. The EXIF orientation is applied.
            model: May be empty if the server serves exactly one.
            version: 0 for the one in service.
            top_k: The number of classes to return.
            timeout_s: The deadline of this call.
            metadata: Metadata of this call.
            request_id: An id of the caller's.

        Raises:
            ImageError: The image cannot be read, or no image has this type.
            ServerError: The server did not answer with a class.
        """
        request = classify_request(image, model, version, top_k)
        options = self._connection.call_options(timeout_s, metadata, request_id)
        return classification(self._call(self._classifier.Classify, request, options, request_id))

    def classify_many(
        self,
        images: Iterable[ImageLike],
        *,
        model: str = "",
        version: int = 0,
        top_k: int = 1,
        in_flight: int = 32,
        stream: bool = False,
        timeout_s: Timeout = CLIENT_TIMEOUT,
        metadata: Mapping[str, str] | None = None,
    ) -> Generator[Classification | ClientError]:
        """Classify images and yield an answer for each, in their order.

        An image that cannot be classified yields its error; the others are not affected. If
        `images` itself raises, the answers of the images before are yielded first.

        Args:
            images: As `classify` takes them.
            model: As there.
            version: As there.
            top_k: As there.
            in_flight: The most requests in flight and images in memory, at least 1.
            stream: Use one ClassifyStream call instead of a call for each image. If it breaks, it
                is opened again and only the images without an answer are sent again.
            timeout_s: The deadline of each image.
            metadata: Metadata of each call.

        Raises:
            UsageError: An argument is wrong.
            ServerError: While iterating, if the server rejects the stream as a whole.
        """
        check_in_flight(in_flight)
        self._lifetime.check()
        options = self._connection.call_options(timeout_s, metadata)
        if stream:
            pending = PendingRequests(in_flight, options["timeout"], self._connection.options.retry)
            requests = classify_requests(images, model, version, top_k)
            return classify_stream(requests, partial(self._open_stream, options), pending)
        return self._classify_many(images, (model, version, top_k), in_flight, options)

    def _classify_many(
        self,
        images: Iterable[ImageLike],
        wanted: tuple[str, int, int],
        in_flight: int,
        options: dict[str, Any],
    ) -> Generator[Classification | ClientError]:
        pending: deque[grpc.Future | ClientError] = deque()
        failure: Exception | None = None
        source = iter(images)
        try:
            while True:
                try:
                    image = next(source)
                except StopIteration:
                    break
                except Exception as error:
                    failure = error
                    break
                if len(pending) == in_flight:
                    yield _outcome(pending.popleft())
                pending.append(self._start(image, wanted, options))
            while pending:
                yield _outcome(pending.popleft())
        finally:
            for call in pending:
                if not isinstance(call, ClientError):
                    call.cancel()
        if failure is not None:
            raise failure

    def infer(
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
        """Run a model on tensors; works with any server of the Open Inference Protocol v2.

        Args:
            model: Its name.
            inputs: Arrays by the names of the model's inputs; of str or bytes for BYTES.
            version: Empty for the one in service.
            outputs: The names of the outputs to return; all by default.
            timeout_s: The deadline of this call.
            metadata: Metadata of this call.
            request_id: An id of the caller's; also the protocol's `id`.

        Raises:
            TensorError: An array has no datatype in the protocol, or the reply is malformed.
            ServerError: The server did not answer with tensors.
        """
        request = infer_request(model, inputs, version, outputs, request_id or "")
        options = self._connection.call_options(timeout_s, metadata, request_id)
        return inference(self._call(self._inference.ModelInfer, request, options, request_id))

    def models(self, *, timeout_s: Timeout = CLIENT_TIMEOUT) -> list[ModelStatus]:
        """List the model versions in service."""
        options = self._connection.call_options(timeout_s)
        reply = self._call(self._classifier.ListModels, pb.ListModelsRequest(), options)
        return [model_status(model) for model in reply.models]

    def health(self, model: str = "", *, timeout_s: Timeout = CLIENT_TIMEOUT) -> Health:
        """Return whether the server, or one of its models, takes requests.

        Raises:
            ServerError: The server cannot be asked.
        """
        options = self._connection.call_options(timeout_s)
        alive = self._call(self._inference.ServerLive, inference_pb2.ServerLiveRequest(), options)
        if model:
            request = inference_pb2.ModelReadyRequest(name=model)
            ready = self._call(self._inference.ModelReady, request, options).ready
        else:
            anything = inference_pb2.ServerReadyRequest()
            ready = self._call(self._inference.ServerReady, anything, options).ready
        return Health(alive.live, ready)

    def _open_stream(
        self, options: dict[str, Any], messages: Iterator[pb.ClassifyStreamRequest]
    ) -> grpc.Call:
        self._lifetime.check()
        # Each image has a deadline; the call may last longer.
        return self._classifier.ClassifyStream(messages, **{**options, "timeout": None})

    def _call(
        self,
        method: Callable[..., Reply],
        request: object,
        options: dict[str, Any],
        request_id: str | None = None,
    ) -> Reply:
        self._lifetime.check()
        try:
            return method(request, **options)
        except grpc.RpcError as error:
            raise from_rpc_error(error, request_id) from error

    def _start(
        self, image: ImageLike, wanted: tuple[str, int, int], options: dict[str, Any]
    ) -> grpc.Future | ClientError:
        self._lifetime.check()
        try:
            request = classify_request(image, *wanted)
        except ClientError as error:
            return error
        return self._classifier.Classify.future(request, **options)


def _outcome(call: grpc.Future | ClientError) -> Classification | ClientError:
    if isinstance(call, ClientError):
        return call
    try:
        return classification(call.result())
    except grpc.RpcError as error:
        return from_rpc_error(error)
    except grpc.FutureCancelledError:
        return LifetimeError("the client was closed before the answer came")
