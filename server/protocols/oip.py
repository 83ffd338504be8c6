"""inference.GRPCInferenceService: the Open Inference Protocol, version 2."""

import grpc

from convoy.oip.v2 import inference_pb2 as pb
from server import SERVER_NAME, SERVER_VERSION
from server.catalogue import ModelCatalogue
from server.errors import ModelNotFoundError, UnavailableError
from server.manifest import TensorSpec
from server.protocols.calls import CallBoundary
from server.protocols.inference import Inference, InferenceQuery
from server.protocols.oip_messages import (
    add_outputs,
    inputs_of,
    parameters_of,
    requested_outputs_of,
)
from server.protocols.options import read_options

# Names of the protocol's extensions that work here.
EXTENSIONS = ("classification", "schedule_policy", "binary_tensor_data", "parameters")


class InferenceServicer:
    """Answers the protocol's six RPCs.

    Args:
        catalogue: The models in service.
        inference: Runs their requests.
        boundary: Turns errors into status codes.
    """

    def __init__(
        self, catalogue: ModelCatalogue, inference: Inference, boundary: CallBoundary
    ) -> None:
        self._catalogue = catalogue
        self._inference = inference
        self._boundary = boundary

    async def ServerLive(
        self,
        request: pb.ServerLiveRequest,
        context: grpc.aio.ServicerContext[pb.ServerLiveRequest, pb.ServerLiveResponse],
    ) -> pb.ServerLiveResponse:
        """Says that the process is up."""
        async with self._boundary.answering("ServerLive", context):
            return pb.ServerLiveResponse(live=True)

    async def ServerReady(
        self,
        request: pb.ServerReadyRequest,
        context: grpc.aio.ServicerContext[pb.ServerReadyRequest, pb.ServerReadyResponse],
    ) -> pb.ServerReadyResponse:
        """Says whether every model is loaded and the server does not drain."""
        async with self._boundary.answering("ServerReady", context):
            return pb.ServerReadyResponse(ready=self._catalogue.ready)

    async def ModelReady(
        self,
        request: pb.ModelReadyRequest,
        context: grpc.aio.ServicerContext[pb.ModelReadyRequest, pb.ModelReadyResponse],
    ) -> pb.ModelReadyResponse:
        """Says whether a model can be used; an unknown one is not ready, which is no error."""
        async with self._boundary.answering("ModelReady", context) as call:
            try:
                call.uses(self._inference.find(request.name, request.version))
            except (ModelNotFoundError, UnavailableError):
                return pb.ModelReadyResponse(ready=False)
            return pb.ModelReadyResponse(ready=True)

    async def ServerMetadata(
        self,
        request: pb.ServerMetadataRequest,
        context: grpc.aio.ServicerContext[pb.ServerMetadataRequest, pb.ServerMetadataResponse],
    ) -> pb.ServerMetadataResponse:
        """Names the server and the extensions that work."""
        async with self._boundary.answering("ServerMetadata", context):
            return pb.ServerMetadataResponse(
                name=SERVER_NAME, version=SERVER_VERSION, extensions=EXTENSIONS
            )

    async def ModelMetadata(
        self,
        request: pb.ModelMetadataRequest,
        context: grpc.aio.ServicerContext[pb.ModelMetadataRequest, pb.ModelMetadataResponse],
    ) -> pb.ModelMetadataResponse:
        """Describes a model's tensors and what really runs it."""
        async with self._boundary.answering("ModelMetadata", context) as call:
            model = call.uses(self._inference.find(request.name, request.version))
            return pb.ModelMetadataResponse(
                name=model.name,
                versions=[str(model.version)],
                platform=model.backend.platform,
                inputs=[_tensor_metadata(model.manifest.input)],
                outputs=map(_tensor_metadata, model.manifest.outputs),
                properties={"device": model.backend.device, "provider": model.backend.provider},
            )

    async def ModelInfer(
        self,
        request: pb.ModelInferRequest,
        context: grpc.aio.ServicerContext[pb.ModelInferRequest, pb.ModelInferResponse],
    ) -> pb.ModelInferResponse:
        """Runs a batch of images, given as pixels or as files."""
        async with self._boundary.answering("ModelInfer", context) as call:
            query = InferenceQuery(
                request.model_name,
                request.model_version,
                inputs_of(request),
                requested_outputs_of(request),
                read_options(parameters_of(request.parameters)),
            )
            answer = await self._inference.answer(query, call)
            reply = pb.ModelInferResponse(
                model_name=answer.model.name,
                model_version=str(answer.model.version),
                id=request.id,
            )
            add_outputs(reply, answer.tensors)
            return reply


def _tensor_metadata(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(
        name=spec.name, datatype=spec.datatype, shape=spec.shape
    )
