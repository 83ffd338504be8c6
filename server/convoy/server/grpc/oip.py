"""inference.GRPCInferenceService: the Open Inference Protocol, version 2, with its extensions.

`admin` has the RPCs that manage the repository: they are for the admin port.
"""

from collections.abc import AsyncIterator, Collection

from google.protobuf.message import DecodeError

from convoy.oip.v2 import inference_pb2 as pb
from convoy.server import SERVER_NAME, __version__
from convoy.server.errors import InvalidRequestError, ModelNotFoundError, UnavailableError
from convoy.server.grpc.context import Context, GrpcBoundary
from convoy.server.grpc.fast_infer import HeadCache, split
from convoy.server.grpc.oip_messages import (
    add_outputs,
    inputs_of,
    model_config,
    model_metadata,
    model_statistics,
    parameters_of,
    requested_outputs_of,
)
from convoy.server.grpc.streams import Streams
from convoy.server.models.registry import Models
from convoy.server.protocol.calls import Call, Failure
from convoy.server.protocol.inference import INFERENCE_EXTENSIONS, Inference, InferenceQuery
from convoy.server.protocol.parameters import read_options

# The protocol's extensions that this service supports.
EXTENSIONS = (*INFERENCE_EXTENSIONS, "model_configuration", "statistics")
# It asks for an empty last reply after several; here every request has one reply.
_STREAM_PARAMETERS = frozenset({"triton_enable_empty_final_response"})
_FINAL = "triton_final_response"


class InferenceServicer:
    """Answers the protocol's six RPCs and its extensions.

    Args:
        models: The models in service.
        inference: Runs their requests.
        boundary: Maps errors to status codes.
        streams: The open streams.
    """

    def __init__(
        self,
        models: Models,
        inference: Inference,
        boundary: GrpcBoundary,
        streams: Streams,
    ) -> None:
        self._models = models
        self._inference = inference
        self._boundary = boundary
        self._streams = streams
        self._heads = HeadCache()

    async def ServerLive(
        self,
        request: pb.ServerLiveRequest,
        context: Context,
    ) -> pb.ServerLiveResponse:
        """Report whether the process is live."""
        async with self._boundary.answering("ServerLive", context):
            return pb.ServerLiveResponse(live=self._models.readiness.live)

    async def ServerReady(
        self,
        request: pb.ServerReadyRequest,
        context: Context,
    ) -> pb.ServerReadyResponse:
        """Report whether callers should send requests to this server."""
        async with self._boundary.answering("ServerReady", context):
            return pb.ServerReadyResponse(ready=self._models.readiness.ready)

    async def ModelReady(
        self,
        request: pb.ModelReadyRequest,
        context: Context,
    ) -> pb.ModelReadyResponse:
        """Report whether a model is ready; an unknown model is not, without an error."""
        async with self._boundary.answering("ModelReady", context) as call:
            try:
                model = call.uses(self._inference.find(request.name, request.version))
            except (ModelNotFoundError, UnavailableError):
                return pb.ModelReadyResponse(ready=False)
            ready = self._models.readiness.versions[model.name, model.version]
            return pb.ModelReadyResponse(ready=ready)

    async def ServerMetadata(
        self,
        request: pb.ServerMetadataRequest,
        context: Context,
    ) -> pb.ServerMetadataResponse:
        """Return the server's name, version and supported extensions."""
        async with self._boundary.answering("ServerMetadata", context):
            return pb.ServerMetadataResponse(
                name=SERVER_NAME, version=__version__, extensions=EXTENSIONS
            )

    async def ModelMetadata(
        self,
        request: pb.ModelMetadataRequest,
        context: Context,
    ) -> pb.ModelMetadataResponse:
        """Describe a model's tensors, and the device and provider in use."""
        async with self._boundary.answering("ModelMetadata", context) as call:
            model = call.uses(self._inference.find(request.name, request.version))
            return model_metadata(model)

    async def ModelInfer(self, message: bytes, context: Context) -> bytes:
        """Run images, given as pixels or as files.

        Args:
            message: A serialized ModelInferRequest.
            context: The call.

        Returns:
            A serialized ModelInferResponse.
        """
        async with self._boundary.answering("ModelInfer", context) as call:
            fields = split(message)
            head = self._heads.read(fields) if fields else None
            if fields and head:
                model = self._models.find(head.model, head.version)
                plan = head.plan(model)
                if plan and plan.size_bytes == len(message) - fields.start:
                    call.requests = model.requests
                    options = plan.options
                    call.within(options.timeout_s)
                    images = plan.images(message, fields)
                    prediction = await call.infer(model, images, options.priority)
                    return plan.reply(fields, prediction.outputs)
            reply = await self._answer(_parsed(message), call)
            return reply.SerializeToString()

    async def ModelStreamInfer(
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> None:
        """Answer each request of a stream when it is ready; an error does not end the stream."""

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
            # Every request has one reply, so each is the final one.
            reply.parameters[_FINAL].bool_param = True
            return pb.ModelStreamInferResponse(infer_response=reply)

        await self._streams.answer_as_ready(requests, context, answer)

    async def ModelConfig(
        self, request: pb.ModelConfigRequest, context: Context
    ) -> pb.ModelConfigResponse:
        """Return the configuration of a model."""
        async with self._boundary.answering("ModelConfig", context) as call:
            model = call.uses(self._inference.find(request.name, request.version))
            return pb.ModelConfigResponse(config=model_config(model))

    async def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, context: Context
    ) -> pb.ModelStatisticsResponse:
        """Return the statistics of one model, or of all."""
        async with self._boundary.answering("ModelStatistics", context) as call:
            if request.name:
                models = [call.uses(self._inference.find(request.name, request.version))]
            else:
                models = list(self._models)
            return pb.ModelStatisticsResponse(
                model_stats=[await model_statistics(model) for model in models]
            )

    async def _answer(
        self, request: pb.ModelInferRequest, call: Call, known: Collection[str] = ()
    ) -> pb.ModelInferResponse:
        # An unknown model is reported before any other error, as on the fast path.
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
