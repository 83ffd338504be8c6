"""inference.GRPCInferenceService: the Open Inference Protocol, version 2."""

import re

import grpc

from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import inference_pb2_grpc
from server import SERVER_NAME, SERVER_VERSION
from server.catalogue import ModelCatalogue
from server.errors import InvalidRequestError, ModelNotFoundError, UnavailableError
from server.loading import ServedModel
from server.manifest import TensorSpec
from server.protocols.calls import CallBoundary
from server.protocols.tensors import add_outputs, images_from, wanted_outputs

# Names of the protocol's extensions that work here.
EXTENSIONS = ("binary_tensor_data",)
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


class InferenceServicer(inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers the protocol's six RPCs.

    Args:
        catalogue: The models in service.
        boundary: Turns errors into status codes.
    """

    def __init__(self, catalogue: ModelCatalogue, boundary: CallBoundary) -> None:
        self._catalogue = catalogue
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
                call.uses(self._find(request.name, request.version))
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
            model = call.uses(self._find(request.name, request.version))
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
        """Runs a batch of raw or typed image tensors."""
        async with self._boundary.answering("ModelInfer", context) as call:
            model = call.uses(self._find(request.model_name, request.model_version))
            names = wanted_outputs(request, model.manifest)
            images = images_from(request, model.manifest)
            prediction = await model.batcher.infer(images, call.deadline_s)
            reply = pb.ModelInferResponse(
                model_name=model.name, model_version=str(model.version), id=request.id
            )
            add_outputs(reply, names, prediction.outputs)
            return reply

    def _find(self, name: str, version: str) -> ServedModel:
        if version and not _VERSION.fullmatch(version):
            raise InvalidRequestError(f"version: expected a whole number above 0, got {version!r}")
        return self._catalogue.find(name, int(version or 0))


def _tensor_metadata(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(
        name=spec.name, datatype=spec.datatype, shape=spec.shape
    )
