"""Requests of a batch job to a server, and its answers as rows."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convoy.client.batch.items import Floats, Item, Row, best_classes, with_outputs
from convoy.client.errors import (
    STATUS_CODES,
    ImageError,
    ModelNotFoundError,
    ServerError,
    UnsupportedError,
    from_rpc_error,
    from_status,
)
from convoy.client.images import image_form
from convoy.client.results import ModelStatus
from convoy.client.tensors import infer_request, inference
from convoy.oip.v2 import inference_pb2_grpc
from convoy.v1 import classifier_pb2 as pb
from convoy.v1 import classifier_pb2_grpc

INPUT = "image"


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """A model on a server.

    Attributes:
        address: As `AsyncClient` takes it.
        model: Its name; may be empty if the server serves one.
        version: 0 for the one in service when the job starts, as long as it is served.
        timeout_s: The deadline of one request.
        in_flight: The most images in flight.
        patience_s: The job ends when the server has answered nothing for this long.
        outputs: Outputs of the model that become columns.
    """

    address: str | None
    model: str
    version: int
    top_k: int
    timeout_s: float
    in_flight: int
    patience_s: float
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sendable:
    """An item in the form of the protocol."""

    key: str
    image: pb.Image


def sendable(item: Item, size_px: tuple[int, int]) -> Sendable:
    """Read an item.

    Args:
        item: A file, its bytes or pixels.
        size_px: Height and width of the model. Pixels of another size are sent as an encoded
            image, which the server resizes.

    Raises:
        ImageError: The file cannot be read.
    """
    image = item.image
    if isinstance(image, ImageError):
        raise image
    if isinstance(image, np.ndarray) and image.shape[:2] != size_px:
        form = image_form(Image.fromarray(image))
    else:
        form = image_form(image)
    message = pb.Image(encoded=form) if isinstance(form, bytes) else pb.Image(raw=form)
    return Sendable(item.key, message)


class ServerCalls:
    """Calls for one model on one channel.

    Args:
        channel: To the server.
        metadata: Of each call.
        remote: The model.
        version: The version to request first; 0 for the one in service.

    Attributes:
        version: The version that is requested. After the first answer it is the version that
            answered, until the server no longer has it.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        metadata: Sequence[tuple[str, str]],
        remote: RemoteModel,
        version: int,
    ) -> None:
        self._stub = classifier_pb2_grpc.ClassifierServiceStub(channel)
        self._metadata = metadata
        self._remote = remote
        self._takes_batches = True
        self.version = version

    async def classify(self, images: Sequence[Sendable]) -> list[Row | ServerError]:
        """Return for each image its row, or the error that a call of its own would have raised.

        Raises:
            ServerError: The request failed as a whole.
        """
        answers = await self._classify(images)
        self.version = self.version or next(
            (each.version for each in answers if isinstance(each, Row) and each.version), 0
        )
        return answers

    async def drop_missing_version(self) -> None:
        """From now on request the version in service, if the server no longer lists the one so far.

        A server that starts, and lists no version or not yet this one, changes nothing.

        Raises:
            ServerError: The server does not list its versions.
        """
        served = await self._served()
        ready = any(each.ready for each in served)
        if ready and self.version not in {each.version for each in served}:
            self.version = self._remote.version

    async def _served(self) -> list[pb.ModelStatus]:
        """Return the versions of the model that the server has."""
        remote = self._remote
        try:
            reply = await self._stub.ListModels(
                pb.ListModelsRequest(), timeout=remote.timeout_s, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return [each for each in reply.models if remote.model in ("", each.model)]

    async def _classify(self, images: Sequence[Sendable]) -> list[Row | ServerError]:
        if self._takes_batches:
            try:
                return await self._batch(images)
            except UnsupportedError:
                self._takes_batches = False
        return list(await asyncio.gather(*map(self._one, images)))

    async def _batch(self, images: Sequence[Sendable]) -> list[Row | ServerError]:
        remote = self._remote
        request = pb.ClassifyBatchRequest(
            model=remote.model,
            version=self.version,
            top_k=remote.top_k,
            images=[each.image for each in images],
        )
        try:
            reply = await self._stub.ClassifyBatch(
                request, timeout=remote.timeout_s, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return [
            _error(result.error)
            if result.HasField("error")
            else _row(each.key, result.classes, reply.model, reply.version)
            for each, result in zip(images, reply.results, strict=True)
        ]

    async def _one(self, sent: Sendable) -> Row | ServerError:
        remote = self._remote
        request = pb.ClassifyRequest(model=remote.model, version=self.version, top_k=remote.top_k)
        if sent.image.HasField("raw"):
            request.raw.CopyFrom(sent.image.raw)
        else:
            request.encoded = sent.image.encoded
        try:
            reply = await self._stub.Classify(
                request, timeout=remote.timeout_s, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error)
        return _row(sent.key, reply.classes, reply.model, reply.version)


class OutputCalls(ServerCalls):
    """Calls that also return outputs of the model, by the Open Inference Protocol."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        metadata: Sequence[tuple[str, str]],
        remote: RemoteModel,
        version: int,
        *,
        versions: Sequence[ModelStatus],
    ) -> None:
        super().__init__(channel, metadata, remote, version)
        self._inference = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        self._labels = {each.version: np.array(each.labels, object) for each in versions}

    async def _classify(self, images: Sequence[Sendable]) -> list[Row | ServerError]:
        forms = {each.image.WhichOneof("form") for each in images}
        if len(forms) == 1:
            return await self._infer(images)
        # One tensor holds image files or pixels.
        return [answer for image in images for answer in await self._alone(image)]

    async def _alone(self, image: Sendable) -> list[Row | ServerError]:
        try:
            return await self._infer([image])
        except ServerError as error:
            return [error]

    async def _infer(self, images: Sequence[Sendable]) -> list[Row | ServerError]:
        remote = self._remote
        version = str(self.version or "")
        outputs = ("probabilities", *remote.outputs)
        request = infer_request(remote.model, {INPUT: _tensor(images)}, version, outputs)
        try:
            reply = await self._inference.ModelInfer(
                request, timeout=remote.timeout_s, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        found = inference(reply)
        number = int(found.version)
        labels = await self._labels_of(number)
        classes = best_classes(_floats(found.outputs["probabilities"]), labels, remote.top_k)
        rows = [
            Row(each.key, *best, found.model, number)
            for each, best in zip(images, classes, strict=True)
        ]
        further = {name: _floats(found.outputs[name]) for name in remote.outputs}
        return [*with_outputs(rows, further)]

    async def _labels_of(self, version: int) -> NDArray[np.object_]:
        if version not in self._labels:
            for each in await self._served():
                self._labels[each.version] = np.array(each.labels, object)
        try:
            return self._labels[version]
        except KeyError:
            raise ModelNotFoundError(
                f"version {version} answered, but the server no longer lists it"
            ) from None


def _tensor(images: Sequence[Sendable]) -> NDArray[np.generic]:
    """Return image files `[n]`, or pixels `[n, H, W, 3]`."""
    if images[0].image.HasField("raw"):
        raws = [each.image.raw for each in images]
        pixels = [np.frombuffer(raw.pixels, np.uint8) for raw in raws]
        return np.stack(pixels).reshape(len(raws), raws[0].height, raws[0].width, 3)
    return np.array([each.image.encoded for each in images], object)


def _floats(values: NDArray[np.generic]) -> Floats:
    return values.astype(np.float32, copy=False)


def _row(key: str, classes: Sequence[pb.ClassScore], model: str, version: int) -> Row:
    return Row(
        key,
        tuple([score.label for score in classes]),
        tuple([score.index for score in classes]),
        tuple([score.probability for score in classes]),
        model,
        version,
    )


def _error(error: pb.Error) -> ServerError:
    return from_status(STATUS_CODES.get(error.code, grpc.StatusCode.UNKNOWN), error.message)
