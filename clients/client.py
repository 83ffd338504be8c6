"""The client for programs without an event loop."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import grpc

from clients.connection import ConnectionOptions, default_address
from clients.errors import from_status
from clients.images import ImageLike, classify_request
from clients.results import Classification, ModelStatus, classification, model_status
from convoy.oip.v2 import inference_pb2, inference_pb2_grpc
from convoy.v1 import classifier_pb2 as pb
from convoy.v1 import classifier_pb2_grpc


class Client:
    """Talks to one server; safe to share between threads.

    Example:
        with Client("127.0.0.1:8001") as client:
            print(client.classify("seven.png", model="digits").best.label)

    Raises, from every call, a ServerError for what the server answered.
    """

    def __init__(self, address: str | None = None, *, timeout_s: float = 10.0) -> None:
        options = ConnectionOptions(address or default_address(), timeout_s)
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(options.address, options.channel_options())
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
        self._channel.close()

    def classify(
        self, image: ImageLike, *, model: str = "", version: int = 0, top_k: int = 1
    ) -> Classification:
        """Classifies one picture.

        Args:
            image: A path, a file's bytes, a PIL image, or pixels `[H, W, 3]` of the model's size.
            model: May stay empty where the server serves exactly one.
            version: 0 for the newest.
            top_k: How many classes to return.

        Raises:
            ImageError: The picture cannot be sent.
            ServerError: The server did not answer with a class.
        """
        request = classify_request(image, model, version, top_k)
        with _typed_errors():
            return classification(self._classifier.Classify(request, timeout=self._timeout_s))

    def models(self) -> list[ModelStatus]:
        """Lists the model versions in service."""
        with _typed_errors():
            reply = self._classifier.ListModels(pb.ListModelsRequest(), timeout=self._timeout_s)
        return [model_status(model) for model in reply.models]

    def is_ready(self, model: str = "") -> bool:
        """Tells whether the server, or one of its models, takes requests.

        Raises:
            ServerError: The server cannot be asked.
        """
        with _typed_errors():
            if model:
                request = inference_pb2.ModelReadyRequest(name=model)
                return bool(self._inference.ModelReady(request, timeout=self._timeout_s).ready)
            ready = inference_pb2.ServerReadyRequest()
            return bool(self._inference.ServerReady(ready, timeout=self._timeout_s).ready)


@contextmanager
def _typed_errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise from_status(error.code(), error.details()) from error
