"""Images in the forms that programs use, converted to the two forms of the protocol."""

import io
import os
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convoy.client.errors import ClientError, ImageError, UsageError
from convoy.client.image_file import to_rgb, upright
from convoy.client.urls import describe_error, is_url, read_bytes, shown
from convoy.v1 import classifier_pb2 as pb

# 16-bit RGBA at the limit of pixels needs 381 MiB uncompressed.
MAX_FILE_BYTES = 512 * 2**20
_READ_BYTES = 2**20

_PREMULTIPLIED = {"RGBa": "RGBA", "La": "LA"}


class BinaryFile(Protocol):
    """A file object opened for reading bytes."""

    def read(self) -> bytes:
        """Read the rest of the file."""


class TorchTensor(Protocol):
    """A torch tensor; this package does not import torch."""

    def detach(self) -> Any:
        """Return the tensor without its gradient history."""

    def cpu(self) -> Any:
        """Return the tensor in host memory."""


# A path, a URL, a file's bytes, an open file, a PIL image of any mode, or RGB pixels uint8 of the
# model's size: NumPy [H, W, 3], torch [3, H, W] or [H, W, 3].
ImageLike = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | BinaryFile
    | Image.Image
    | NDArray[np.uint8]
    | TorchTensor
)


def classify_request(image: ImageLike, model: str, version: int, top_k: int) -> pb.ClassifyRequest:
    """Build the request for one image.

    Raises:
        ImageError: The image cannot be read, or no image has this type, dtype or shape.
    """
    form = image_form(image)
    if isinstance(form, bytes):
        return pb.ClassifyRequest(model=model, version=version, top_k=top_k, encoded=form)
    return pb.ClassifyRequest(model=model, version=version, top_k=top_k, raw=form)


def image_form(image: ImageLike) -> bytes | pb.RawImage:
    """Return an image as a file or as pixels.

    Raises:
        ImageError: The image cannot be read, or no image has this type, dtype or shape.
    """
    try:
        if isinstance(image, np.ndarray):
            return _raw(image)
        if _is_tensor(image):
            return _raw(_tensor_pixels(image))
        return _encoded(image)
    except ClientError:
        raise
    except OSError as error:
        named = shown(os.fspath(image)) if isinstance(image, str | os.PathLike) else "image"
        raise ImageError(f"{named}: {describe_error(error)}") from error
    # A user's file object, or a damaged image that Pillow loads only now, can raise anything.
    except Exception as error:
        raise ImageError(f"image: {type(error).__name__}: {error}") from error


def classify_requests(
    images: Iterable[ImageLike], model: str, version: int, top_k: int
) -> Iterator[pb.ClassifyRequest | ClientError]:
    """Build a request for each image, or the error of an image that cannot be sent."""
    for image in images:
        try:
            yield classify_request(image, model, version, top_k)
        except ClientError as error:
            yield error


def read_image(path: str | os.PathLike[str]) -> bytes:
    """Read an image file.

    Raises:
        OSError: It cannot be read.
        ImageError: It is larger than an image file may be.
    """
    # A file object would make twice as many system calls.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size_bytes = os.fstat(descriptor).st_size
        check_size(size_bytes)
        content = os.read(descriptor, size_bytes + 1)
        if len(content) == size_bytes > 0:
            return content
        # A pipe has no size, and a large file takes several calls.
        return content + b"".join(iter(lambda: os.read(descriptor, _READ_BYTES), b""))
    finally:
        os.close(descriptor)


def download_image(url: str) -> bytes:
    """Read an image file at a URL.

    Raises:
        OSError: It cannot be read.
        ImageError: It is larger than an image file may be.
    """
    content = read_bytes(url, MAX_FILE_BYTES)
    if content is None:
        raise ImageError(f"{shown(url)}: expected at most {MAX_FILE_BYTES} bytes, got more")
    return content


def check_size(size_bytes: int) -> None:
    """Check the size of an image file.

    Raises:
        ImageError: It is larger than an image file may be.
    """
    if size_bytes > MAX_FILE_BYTES:
        raise ImageError(f"image: expected at most {MAX_FILE_BYTES} bytes, got {size_bytes}")


def check_in_flight(in_flight: int) -> None:
    """Check the largest number of concurrent requests.

    Raises:
        UsageError: It is below 1.
    """
    if in_flight < 1:
        raise UsageError(f"in_flight: expected at least 1, got {in_flight}")


def _encoded(image: object) -> bytes:
    match image:
        case bytes():
            return image
        case bytearray() | memoryview():
            return bytes(image)
        case Image.Image():
            return _png(image)
        case str() if is_url(image):
            return download_image(image)
        case str() | os.PathLike():
            return read_image(image)
    if callable(read := getattr(image, "read", None)):
        content = read()
        if isinstance(content, bytes):
            return content
        raise ImageError(f"image: expected a binary file, got one of {type(content).__name__}")
    raise ImageError(
        "image: expected a path, a URL, bytes, a binary file, a PIL image, a NumPy array or a "
        f"torch tensor, got {type(image).__module__}.{type(image).__qualname__}"
    )


def _is_tensor(image: object) -> TypeGuard[TorchTensor]:
    # isinstance with a protocol would cost more than reading a small file.
    return callable(getattr(image, "detach", None)) and callable(getattr(image, "cpu", None))


def _tensor_pixels(tensor: TorchTensor) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = np.asarray(tensor.detach().cpu())
    if pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.shape[2] != 3:
        return pixels.transpose(1, 2, 0)  # [3, H, W] to [H, W, 3]
    return pixels


def _raw(pixels: NDArray[np.uint8]) -> pb.RawImage:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ImageError(
            f"image: expected an array uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}"
        )
    height, width, _ = pixels.shape
    return pb.RawImage(height=height, width=width, pixels=pixels.tobytes())


def _png(image: Image.Image) -> bytes:
    if image.mode in _PREMULTIPLIED:  # Pillow converts these to their straight form only
        image = image.convert(_PREMULTIPLIED[image.mode])
    buffer = io.BytesIO()
    # Level 1: the pixels travel once, so a small file is worth less than the time to make it.
    to_rgb(upright(image)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
