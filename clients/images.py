"""Pictures in the forms people have them, to the two forms the wire takes."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clients.errors import ClientError, ImageError, UsageError
from convoy.v1 import classifier_pb2 as pb

# A file's path, a file's bytes, an opened picture, or RGB pixels [H, W, 3] of the model's size.
ImageLike = str | Path | bytes | Image.Image | NDArray[np.uint8]


def classify_request(image: ImageLike, model: str, version: int, top_k: int) -> pb.ClassifyRequest:
    """Builds the request for one picture.

    Raises:
        ImageError: The file cannot be read, or the array is not `[H, W, 3]` uint8.
    """
    request = pb.ClassifyRequest(model=model, version=version, top_k=top_k)
    match image:
        case np.ndarray():
            request.raw.CopyFrom(_raw(image))
        case Image.Image():
            request.encoded = _png(image)
        case bytes():
            request.encoded = image
        case _:
            request.encoded = _read(Path(image))
    return request


def classify_requests(
    images: Iterable[ImageLike], model: str, version: int, top_k: int
) -> Iterator[pb.ClassifyRequest | ClientError]:
    """Builds a request for each picture, or says what is wrong with it."""
    for image in images:
        try:
            yield classify_request(image, model, version, top_k)
        except ClientError as error:
            yield error


def check_in_flight(in_flight: int) -> None:
    """Lets a window of at least one request pass.

    Raises:
        UsageError: It would never send anything.
    """
    if in_flight < 1:
        raise UsageError(f"in_flight: expected at least 1, got {in_flight}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or 'cannot be read'}") from error


def _raw(pixels: NDArray[np.uint8]) -> pb.RawImage:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ImageError(
            f"image: expected an array uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}"
        )
    height, width, _ = pixels.shape
    return pb.RawImage(height=height, width=width, pixels=pixels.tobytes())


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
