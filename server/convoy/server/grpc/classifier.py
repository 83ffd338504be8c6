"""convoy.v1.ClassifierService: images in, classes out."""

import time
from collections.abc import AsyncIterator, Iterator, Sequence

import numpy as np

from convoy.server.errors import InvalidRequestError
from convoy.server.grpc.context import CODE_OF, Context, GrpcBoundary
from convoy.server.grpc.streams import Streams
from convoy.server.images.decoding import ImageDecoder
from convoy.server.models.manifest import Manifest
from convoy.server.models.registry import Models, ServedModel
from convoy.server.protocol.calls import Call, Failure, rejection_of
from convoy.server.protocol.tensors import best_classes
from convoy.server.requests import Images, Prediction, Scores
from convoy.v1 import classifier_pb2 as pb

_NS_PER_S = 1_000_000_000


class ClassifierServicer:
    """Answers the service's RPCs.

    Args:
        models: The models in service.
        decoder: Decodes image files.
        boundary: Maps errors to status codes.
        streams: The open streams.
    """

    def __init__(
        self,
        models: Models,
        decoder: ImageDecoder,
        boundary: GrpcBoundary,
        streams: Streams,
    ) -> None:
        self._models = models
        self._decoder = decoder
        self._boundary = boundary
        self._streams = streams

    async def Classify(self, request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        """Classify one image."""
        async with self._boundary.answering("Classify", context) as call:
            return await self._classify(request, call)

    async def ClassifyStream(
        self, requests: AsyncIterator[pb.ClassifyStreamRequest], context: Context
    ) -> None:
        """Classify the images of a stream, and answer each when it is ready."""

        async def answer(request: pb.ClassifyStreamRequest) -> pb.ClassifyStreamResponse:
            reply = await self._boundary.attempt(
                "ClassifyStream", context, lambda call: self._classify(request.request, call)
            )
            if isinstance(reply, Failure):
                return pb.ClassifyStreamResponse(id=request.id, error=_error(reply))
            return pb.ClassifyStreamResponse(id=request.id, response=reply)

        await self._streams.answer_as_ready(requests, context, answer)

    async def ClassifyBatch(
        self, request: pb.ClassifyBatchRequest, context: Context
    ) -> pb.ClassifyBatchResponse:
        """Classify many images; one that cannot be decoded fails alone."""
        async with self._boundary.answering("ClassifyBatch", context) as call:
            model = call.uses(self._models.find(request.model, request.version))
            _check_count(len(request.images), model)
            started_s = time.monotonic()
            pixels = await self._each_pixels(request.images, model, call.deadline_s)
            decode_s = time.monotonic() - started_s
            reply = pb.ClassifyBatchResponse(model=model.name, version=model.version)
            classes: Iterator[tuple[list[pb.ClassScore], bool]] = iter(())
            intact = [each for each in pixels if isinstance(each, np.ndarray)]
            if intact:
                prediction = await call.infer(model, np.concatenate(intact), request.priority)
                probabilities = prediction.outputs.probabilities
                classes = _classes(probabilities, request.top_k, model.manifest)
                reply.times.CopyFrom(_times(prediction, decode_s))
                reply.batch_size = prediction.batch_size
            for each in pixels:
                if isinstance(each, InvalidRequestError):
                    reply.results.add(error=_invalid(each))
                    continue
                scores, abstain = next(classes)
                reply.results.add(classes=scores, abstain=abstain)
            return reply

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """List the versions in service."""
        async with self._boundary.answering("ListModels", context):
            ready = self._models.readiness.versions
            return pb.ListModelsResponse(
                models=[_status(each, ready[each.name, each.version]) for each in self._models]
            )

    async def _classify(self, request: pb.ClassifyRequest, call: Call) -> pb.ClassifyResponse:
        model = call.uses(self._models.find(request.model, request.version))
        started_s = time.monotonic()
        match request.WhichOneof("image"):
            case "encoded":
                steps = model.manifest.preprocessing
                images = await self._decoder.decode(
                    [request.encoded], steps, call.deadline_s, model.requests.decoded
                )
                decode_s = time.monotonic() - started_s
            case "raw":
                images, decode_s = _raw_pixels(request.raw, model), 0.0
            case _:
                raise InvalidRequestError("image: expected encoded or raw, got neither")
        prediction = await call.infer(model, images, request.priority)
        return _response(model, request.top_k, prediction, decode_s)

    async def _each_pixels(
        self, images: Sequence[pb.Image], model: ServedModel, deadline_s: float
    ) -> list[Images | InvalidRequestError]:
        """Return for each image its pixels `[1, H, W, 3]`, or the error of decoding it."""
        encoded = [image.encoded for image in images if image.WhichOneof("form") == "encoded"]
        steps = model.manifest.preprocessing
        decoded = iter(
            await self._decoder.decode_each(encoded, steps, deadline_s, model.requests.decoded)
        )
        pixels: list[Images | InvalidRequestError] = []
        for image in images:
            match image.WhichOneof("form"):
                case "encoded":
                    pixels.append(next(decoded))
                case "raw":
                    pixels.append(_raw_or_error(image.raw, model))
                case _:
                    pixels.append(
                        InvalidRequestError("image: expected encoded or raw, got neither")
                    )
        return pixels


def _check_count(count: int, model: ServedModel) -> None:
    most = model.batcher.limits.max_request_images
    if not 1 <= count <= most:
        raise InvalidRequestError(f"images: expected 1 to {most}, got {count}")


def _raw_or_error(image: pb.RawImage, model: ServedModel) -> Images | InvalidRequestError:
    try:
        return _raw_pixels(image, model)
    except InvalidRequestError as error:
        return error


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
    probabilities = prediction.outputs.probabilities  # [1, K]
    ((classes, abstain),) = _classes(probabilities, top_k, model.manifest)
    return pb.ClassifyResponse(
        model=model.name,
        version=model.version,
        classes=classes,
        times=_times(prediction, decode_s),
        batch_size=prediction.batch_size,
        abstain=abstain,
    )


def _classes(
    probabilities: Scores, top_k: int, manifest: Manifest
) -> Iterator[tuple[list[pb.ClassScore], bool]]:
    """Yield the most probable classes of each image, at least one, and whether it abstains.

    NaN never reaches the threshold.

    Args:
        probabilities: `[N, K]`.
        top_k: How many classes.
        manifest: Of the model.
    """
    labels = manifest.labels
    best = best_classes(probabilities, max(1, top_k))  # [N, k]
    chosen = np.take_along_axis(probabilities, best, axis=1)
    reached = probabilities.max(axis=1) >= manifest.abstain_threshold
    # As Python's numbers: one conversion for all of them.
    for row in zip(best.tolist(), chosen.tolist(), reached.tolist(), strict=True):
        indices, values, certain = row
        scores = [
            pb.ClassScore(label=labels[index], index=index, probability=value)
            for index, value in zip(indices, values, strict=True)
        ]
        yield scores, not certain


def _times(prediction: Prediction, decode_s: float) -> pb.StageTimes:
    return pb.StageTimes(
        decode_ns=int(decode_s * _NS_PER_S),
        queue_ns=int(prediction.queue_s * _NS_PER_S),
        inference_ns=int(prediction.inference_s * _NS_PER_S),
    )


def _error(failure: Failure) -> pb.Error:
    return pb.Error(
        code=CODE_OF[failure.status].value[0],
        message=failure.message,
        retry_after_ms=failure.retry_after_ms,
    )


def _invalid(error: InvalidRequestError) -> pb.Error:
    return _error(rejection_of(error))


def _status(model: ServedModel, ready: bool) -> pb.ModelStatus:
    height, width, _ = model.manifest.sample_shape
    return pb.ModelStatus(
        model=model.name,
        version=model.version,
        ready=ready,
        height=height,
        width=width,
        labels=model.manifest.labels,
        backend=model.runtime.value,
        device=model.runs_on.device,
        provider=model.runs_on.provider,
        max_batch_size=model.batcher.limits.max_batch_size,
        max_request_images=model.batcher.limits.max_request_images,
        temperature=model.manifest.temperature,
        abstain_threshold=model.manifest.abstain_threshold,
    )
