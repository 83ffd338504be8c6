"""The gRPC services for callers, with reflection and health."""

from collections.abc import Callable
from typing import Any

import grpc

from convoy.oip.v2 import inference_pb2
from convoy.server.edge.limits import ByteBudget
from convoy.server.grpc.classifier import ClassifierServicer
from convoy.server.grpc.context import GrpcBoundary
from convoy.server.grpc.health import (
    HEALTH,
    REFLECTION_SERVICES,
    WHOLE_SERVER,
    HealthServicer,
    reflection_handlers,
)
from convoy.server.grpc.oip import InferenceServicer
from convoy.server.grpc.registration import handler_of
from convoy.server.grpc.streams import Streams
from convoy.server.images.decoding import ImageDecoder
from convoy.server.models.readiness import ServerState
from convoy.server.models.registry import Models
from convoy.server.protocol.inference import Inference
from convoy.v1 import classifier_pb2

_CLASSIFIER = classifier_pb2.DESCRIPTOR.services_by_name["ClassifierService"]
_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
# The RPCs whose messages the fast path reads and writes as bytes.
_AS_BYTES = ("ModelInfer",)
_SERVICES = (_CLASSIFIER.full_name, _INFERENCE.full_name)
# RPCs whose requests stream, so that a caller may pause between two for as long as it likes.
STREAMING_PATHS = (
    *(
        f"/{service.full_name}/{method.name}"
        for service in (_CLASSIFIER, _INFERENCE)
        for method in service.methods
        if method.client_streaming
    ),
    *(f"/{service}/ServerReflectionInfo" for service in REFLECTION_SERVICES),
)

Trace = Callable[[grpc.GenericRpcHandler], grpc.GenericRpcHandler]


class GrpcServices:
    """Convoy's own service, the Open Inference Protocol, health and reflection.

    Args:
        models: The models in service.
        decoder: Decodes image files.
        boundary: Turns errors into status codes.
        budget: Bounds the bytes of all requests.
        trace: Wraps the handlers; None leaves them as they are.
    """

    def __init__(
        self,
        models: Models,
        decoder: ImageDecoder,
        boundary: GrpcBoundary,
        budget: ByteBudget,
        trace: Trace | None = None,
    ) -> None:
        self._models = models
        self._health = HealthServicer()
        self._streams = Streams(models, budget)
        classifier = ClassifierServicer(models, decoder, boundary, self._streams)
        inference = Inference(models, decoder)
        oip = InferenceServicer(models, inference, boundary, self._streams)
        handlers = [handler_of(_CLASSIFIER, classifier), handler_of(_INFERENCE, oip, _AS_BYTES)]
        self._handlers = [trace(each) for each in handlers] if trace else handlers
        models.watch(self._models_changed)
        self._models_changed()

    def add_to(self, server: Any) -> None:
        """Add all services to a `GrpcEndpoint` or a `grpc.aio.Server`."""
        server.add_generic_rpc_handlers(self._handlers)
        server.add_generic_rpc_handlers((handler_of(HEALTH, self._health),))
        server.add_generic_rpc_handlers(reflection_handlers((*_SERVICES, HEALTH.full_name)))

    def _models_changed(self) -> None:
        now = self._models.readiness
        server = dict.fromkeys((WHOLE_SERVER, *_SERVICES), now.ready)
        self._health.update({**now.models, **server})
        if self._models.state is ServerState.DRAINING:
            self._streams.close()

    def close(self) -> None:
        """End the watches of health, which would block the drain."""
        self._health.close()
