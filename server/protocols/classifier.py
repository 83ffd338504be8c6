"""convoy.v1.ClassifierService: images in, classes out."""

import time

import grpc
import numpy as np

from convoy.v1 import classifier_pb2 as pb
from server.catalogue import ModelCatalogue
from server.decoding import ImageDecoder
from server.errors import InvalidRequestError
from server.loading import ServedModel
from server.protocols.calls import CallBoundary
from server.requests import Images, Prediction

_NS_PER_S = 1_000_000_000


class ClassifierServicer:
    """Answers Classify and ListModels.

    Args:
        catalogue: The models in service.
        decoder: Brings image files to pixels.
        boundary: Turns errors into status codes.
    """

    def __init__(
        self, catalogue: ModelCatalogue, decoder: ImageDecoder, boundary: CallBoundary
    ) -> None:
        self._catalogue = catalogue
        self._decoder = decoder
        self._boundary = boundary

    async def Classify(
        self,
        request: pb.ClassifyRequest,
        context: grpc.aio.ServicerContext[pb.ClassifyRequest, pb.ClassifyResponse],
    ) -> pb.ClassifyResponse:
        """Classifies one image."""
        async with self._boundary.answering("Classify", context) as call:
            model = call.uses(self._catalogue.find(request.model, request.version))
            started_s = time.monotonic()
            images = await self._pixels(request, model, call.deadline_s)
            decode_s = time.monotonic() - started_s if request.HasField("encoded") else 0.0
            prediction = await model.batcher.infer(images, call.deadline_s)
            return _response(model, request.top_k, prediction, decode_s)

    async def ListModels(
        self,
        request: pb.ListModelsRequest,
        context: grpc.aio.ServicerContext[pb.ListModelsRequest, pb.ListModelsResponse],
    ) -> pb.ListModelsResponse:
        """Lists the versions in service."""
        async with self._boundary.answering("ListModels", context):
            models = [_model_status(model, self._catalogue.ready) for model in self._catalogue]
            return pb.ListModelsResponse(models=models)

    async def _pixels(
        self, request: pb.ClassifyRequest, model: ServedModel, deadline_s: float
    ) -> Images:
        match request.WhichOneof("image"):
            case "encoded":
                steps = model.manifest.preprocessing
                return await self._decoder.decode([request.encoded], steps, deadline_s)
            case "raw":
                return _raw_pixels(request.raw, model)
            case _:
                raise InvalidRequestError("image: expected encoded or raw, got neither")


def _raw_pixels(image: pb.RawImage, model: ServedModel) -> Images:
    height, width, channels = model.manifest.sample_shape
    if (image.height, image.width) != (height, width):
        raise InvalidRequestError(
            f"raw: model {model.name!r} takes {height} x {width} pixels, "
            f"got {image.height} x {image.width}"
        )
    expected = height * width * channels
    if len(image.pixels) != expected:
        raise InvalidRequestError(f"raw.pixels: expected {expected} bytes, got {len(image.pixels)}")
    return np.frombuffer(image.pixels, np.uint8).reshape(1, height, width, channels)


def _response(
    model: ServedModel, top_k: int, prediction: Prediction, decode_s: float
) -> pb.ClassifyResponse:
    probabilities = prediction.outputs.probabilities[0]  # [K]
    best = np.argsort(-probabilities, kind="stable")[: max(1, top_k)]
    return pb.ClassifyResponse(
        model=model.name,
        version=model.version,
        classes=[
            pb.ClassScore(
                label=model.manifest.labels[index],
                index=int(index),
                probability=float(probabilities[index]),
            )
            for index in best
        ],
        times=pb.StageTimes(
            decode_ns=int(decode_s * _NS_PER_S),
            queue_ns=int(prediction.queue_s * _NS_PER_S),
            inference_ns=int(prediction.inference_s * _NS_PER_S),
        ),
        batch_size=prediction.batch_size,
    )


def _model_status(model: ServedModel, ready: bool) -> pb.ModelStatus:
    height, width, _ = model.manifest.sample_shape
    return pb.ModelStatus(
        model=model.name,
        version=model.version,
        ready=ready,
        height=height,
        width=width,
        labels=model.manifest.labels,
        backend=model.format.value,
        device=model.backend.device,
        provider=model.backend.provider,
        max_batch_size=model.batcher.limits.max_batch_size,
    )
