"""inference.GRPCInferenceService: the Open Inference Protocol, version 2, with its extensions.

The RPCs that manage the repository are not here: they are for the admin listener.
"""

from collections.abc import AsyncIterator, Collection

from google.protobuf.message import DecodeError

from convoy.oip.v2 import inference_pb2 as pb
from server import SERVER_NAME, SERVER_VERSION
from server.catalogue import Models
from server.errors import InvalidRequestError, ModelNotFoundError, UnavailableError
from server.manifest import TensorSpec
from server.protocols.calls import Call, CallBoundary, Context, Failure
from server.protocols.fast_infer import HeadCache, split
from server.protocols.inference import INFERENCE_EXTENSIONS, Inference, InferenceQuery
from server.protocols.oip_description import model_config, model_statistics
from server.protocols.oip_messages import (
    add_outputs,
    inputs_of,
    parameters_of,
    requested_outputs_of,
)
from server.protocols.options import read_options
from server.protocols.streams import Streams

# Names of the protocol's extensions that work here.
EXTENSIONS = (*INFERENCE_EXTENSIONS, "model_configuration", "statistics")
# Asks for an empty last reply where a model gives several; here every reply is the last.
_STREAM_PARAMETERS = frozenset({"triton_enable_empty_final_response"})
_FINAL = "triton_final_response"


class InferenceServicer:
    """Answers the protocol's six RPCs and its extensions.

    Args:
        catalogue: The models in service.
        inference: Runs their requests.
        boundary: Turns errors into status codes.
        streams: Carries those of its RPCs that stream.
    """

    def __init__(
        self,
        catalogue: Models,
        inference: Inference,
        boundary: CallBoundary,
        streams: Streams,
    ) -> None:
        self._catalogue = catalogue
        self._inference = inference
        self._boundary = boundary
        self._streams = streams
        self._heads = HeadCache()

    async def ServerLive(
        self,
        request: pb.ServerLiveRequest,
        context: Context,
    ) -> pb.ServerLiveResponse:
        """Says that the process is up."""
        async with self._boundary.answering("ServerLive", context):
            return pb.ServerLiveResponse(live=True)

    async def ServerReady(
        self,
        request: pb.ServerReadyRequest,
        context: Context,
    ) -> pb.ServerReadyResponse:
        """Says whether every model is loaded and the server does not drain."""
        async with self._boundary.answering("ServerReady", context):
            return pb.ServerReadyResponse(ready=self._catalogue.ready)

    async def ModelReady(
        self,
        request: pb.ModelReadyRequest,
        context: Context,
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
        context: Context,
    ) -> pb.ServerMetadataResponse:
        """Names the server and the extensions that work."""
        async with self._boundary.answering("ServerMetadata", context):
            return pb.ServerMetadataResponse(
                name=SERVER_NAME, version=SERVER_VERSION, extensions=EXTENSIONS
            )

    async def ModelMetadata(
        self,
        request: pb.ModelMetadataRequest,
        context: Context,
    ) -> pb.ModelMetadataResponse:
        """Describes a model's tensors and what really runs it."""
        async with self._boundary.answering("ModelMetadata", context) as call:
            model = call.uses(self._inference.find(request.name, request.version))
            return pb.ModelMetadataResponse(
                name=model.name,
                versions=[str(model.version)],
                platform=model.runs_on.platform,
                inputs=[_tensor_metadata(model.manifest.input)],
                outputs=map(_tensor_metadata, model.manifest.outputs),
                properties={"device": model.runs_on.device, "provider": model.runs_on.provider},
            )

    async def ModelInfer(self, message: bytes, context: Context) -> bytes:
        """Runs a batch of images, given as pixels or as files; both messages as on the wire."""
        async with self._boundary.answering("ModelInfer", context) as call:
            fields = split(message)
            head = self._heads.read(fields) if fields else None
            if fields and head:
                model = self._catalogue.find(head.model, head.version)
                plan = head.plan(model)
                if plan and plan.size_bytes == len(message) - fields.start:
                    call.requests = model.requests
                    options = plan.options
                    prediction = await model.batcher.infer(
                        plan.images(message, fields),
                        call.within(options.timeout_s),
                        options.priority,
                        call.client,
                    )
                    return plan.reply(fields, prediction.outputs)
            reply = await self._answer(_parsed(message), call)
            return reply.SerializeToString()

    async def ModelStreamInfer(
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> None:
        """Answers requests as they are ready; one that fails leaves the stream as it is."""

        async def answer(request: pb.ModelInferRequest) -> pb.ModelStreamInferResponse:
            reply = await self._boundary.attempt(
                "ModelStreamInfer",
                context,
                lambda call: self._answer(request, call, _STREAM_PARAMETERS),
            )
            if isinstance(reply, Failure):
                named = pb.ModelInferResponse(id=request.id)
                return pb.ModelStreamInferResponse(
                    error_message=reply.message, infer_response=named
                )
            # One request has one reply here, so each is the last.
            reply.parameters[_FINAL].bool_param = True
            return pb.ModelStreamInferResponse(infer_response=reply)

        await self._streams.answer_as_ready(requests, context, answer)

    async def ModelConfig(
        self, request: pb.ModelConfigRequest, context: Context
    ) -> pb.ModelConfigResponse:
        """Says how a model is served."""
        async with self._boundary.answering("ModelConfig", context) as call:
            model = call.uses(self._inference.find(request.name, request.version))
            return pb.ModelConfigResponse(config=model_config(model))

    async def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, context: Context
    ) -> pb.ModelStatisticsResponse:
        """Says what a model, or each of them, has done so far."""
        async with self._boundary.answering("ModelStatistics", context) as call:
            if request.name:
                models = [call.uses(self._inference.find(request.name, request.version))]
            else:
                models = list(self._catalogue)
            return pb.ModelStatisticsResponse(
                model_stats=[await model_statistics(model) for model in models]
            )

    async def _answer(
        self, request: pb.ModelInferRequest, call: Call, known: Collection[str] = ()
    ) -> pb.ModelInferResponse:
        # A wrong name is the first thing to tell; the fast way too looks for the model first.
        call.uses(self._inference.find(request.model_name, request.model_version))
        query = InferenceQuery(
            request.model_name,
            request.model_version,
            inputs_of(request),
            requested_outputs_of(request),
            read_options(parameters_of(request.parameters), known),
        )
        answer = await self._inference.answer(query, call)
        reply = pb.ModelInferResponse(
            model_name=answer.model.name, model_version=str(answer.model.version), id=request.id
        )
        add_outputs(reply, answer.tensors)
        return reply


def _parsed(message: bytes) -> pb.ModelInferRequest:
    try:
        return pb.ModelInferRequest.FromString(message)
    except DecodeError:
        raise InvalidRequestError("message: expected a ModelInferRequest") from None


def _tensor_metadata(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(
        name=spec.name, datatype=spec.datatype, shape=spec.shape
    )
