"""Images to a server, many in a request where it takes that, and its answers as rows."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import numpy as np
from PIL import Image

from clients.batch.rows import Item, Row
from clients.errors import ServerError, UnsupportedError, from_rpc_error, from_status
from clients.images import classify_request
from convoy.v1 import classifier_pb2 as pb
from convoy.v1 import classifier_pb2_grpc

_CODES = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """Which model to ask where.

    Attributes:
        address: As `AsyncClient` takes it.
        model: Its name; may stay empty where the server serves one.
        version: 0 for the one in service, also when that changes.
        timeout_s: What one request may take.
        in_flight: Images under way, at most.
        patience_s: For how long the server may answer nothing before the job gives up.
    """

    address: str | None
    model: str
    version: int
    top_k: int
    timeout_s: float
    in_flight: int
    patience_s: float


@dataclass(frozen=True, slots=True)
class Sendable:
    """An item in the form that the wire takes."""

    key: str
    image: pb.Image


def sendable(item: Item, size_px: tuple[int, int]) -> Sendable:
    """Reads an item.

    Args:
        item: A file, its bytes or pixels.
        size_px: Height and width of the model. Pixels of another size go as a picture, which the
            server resizes.

    Raises:
        ImageError: The file cannot be read.
    """
    image = item.image
    if isinstance(image, np.ndarray) and image.shape[:2] != size_px:
        request = classify_request(Image.fromarray(image), "", 0, 0)
    else:
        request = classify_request(image, "", 0, 0)
    if request.HasField("raw"):
        return Sendable(item.key, pb.Image(raw=request.raw))
    return Sendable(item.key, pb.Image(encoded=request.encoded))


class ServerCalls:
    """Calls for one model on one channel.

    Args:
        channel: To the server.
        metadata: Of each call.
        remote: What to ask for.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        metadata: Sequence[tuple[str, str]],
        remote: RemoteModel,
    ) -> None:
        self._stub = classifier_pb2_grpc.ClassifierServiceStub(channel)
        self._metadata = metadata
        self._remote = remote
        self._takes_batches = True

    async def classify(self, images: Sequence[Sendable]) -> list[Row | ServerError]:
        """Returns a row, or what its own call would have raised, for each image.

        Raises:
            ServerError: The request failed as a whole.
        """
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
            version=remote.version,
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
        request = pb.ClassifyRequest(model=remote.model, version=remote.version, top_k=remote.top_k)
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
    return from_status(_CODES.get(error.code, grpc.StatusCode.UNKNOWN), error.message)
