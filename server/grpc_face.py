"""Everything that the gRPC port answers."""

from collections.abc import Callable

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from convoy.oip.v2 import inference_pb2
from convoy.v1 import classifier_pb2
from server.catalogue import Models, ServerState
from server.decoding import ImageDecoder
from server.listener import GrpcListener
from server.protocols.calls import CallBoundary
from server.protocols.classifier import ClassifierServicer
from server.protocols.health import WHOLE_SERVER, HealthServicer
from server.protocols.inference import Inference
from server.protocols.oip import InferenceServicer
from server.protocols.registration import handler_of
from server.protocols.streams import Streams

_CLASSIFIER = classifier_pb2.DESCRIPTOR.services_by_name["ClassifierService"]
_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
# What the fast path reads and writes without message objects.
_AS_BYTES = ("ModelInfer",)
_SERVICES = (_CLASSIFIER.full_name, _INFERENCE.full_name)

Trace = Callable[[grpc.GenericRpcHandler], grpc.GenericRpcHandler]


class GrpcFace:
    """The services of the gRPC port, reflection, and the health of what they serve.

    Args:
        listener: The port; nothing is answered before `start`.
        catalogue: The models in service.
        decoder: Brings image files to pixels.
        boundary: Turns errors into status codes.
        trace: Wraps the handlers; None leaves them as they are.
    """

    def __init__(
        self,
        listener: GrpcListener,
        catalogue: Models,
        decoder: ImageDecoder,
        boundary: CallBoundary,
        trace: Trace | None = None,
    ) -> None:
        self._listener = listener
        self._catalogue = catalogue
        self._health = HealthServicer()
        self._streams = Streams(catalogue)
        inference = Inference(catalogue, decoder)
        classifier = ClassifierServicer(catalogue, decoder, boundary, self._streams)
        oip = InferenceServicer(catalogue, inference, boundary, self._streams)
        handlers = [
            handler_of(_CLASSIFIER, classifier),
            handler_of(_INFERENCE, oip, _AS_BYTES),
        ]
        listener.server.add_generic_rpc_handlers(
            [trace(each) for each in handlers] if trace else handlers
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, listener.server)

    async def start(self) -> None:
        """Begins to answer: NOT_SERVING until the state is."""
        await self._listener.start((*_SERVICES, health.SERVICE_NAME))

    async def drain(self, timeout_s: float) -> None:
        """Refuses new calls and lets accepted ones finish, for so long."""
        self._health.close()
        await self._listener.drain(timeout_s)

    def model_changed(self, name: str, ready: bool | None) -> None:
        """A model begins or ends to take requests; None: it is gone."""
        if ready is None:
            self._health.remove(name)
        elif self._catalogue.ready:
            self._health.set(name, ready)

    def state_changed(self) -> None:
        """The catalogue's state is another."""
        state = self._catalogue.state
        if state is ServerState.STARTING:
            return
        if state is ServerState.SERVING:
            for name in (WHOLE_SERVER, *_SERVICES, *(model.name for model in self._catalogue)):
                self._health.set(name, serving=True)
        else:
            self._health.drain()
        if state is ServerState.DRAINING:
            self._streams.close()

    async def settled(self) -> None:
        """Waits until callers see what was told; here they do at once."""
