"""The Open Inference Protocol's input tensors to images, whichever face of the server took them in.

A model has one input, in two forms: pixels, `UINT8 [N, H, W, 3]`, or image files, `BYTES [N]`. The
datatype says which. Contents are raw (row-major; in BYTES each element after its length in four
bytes, little-endian) or a sequence of elements.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from server.errors import InvalidRequestError
from server.manifest import Manifest
from server.requests import Images

PIXELS = "UINT8"
ENCODED = "BYTES"
_LENGTH = struct.Struct("<I")

EncodedImages = tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class InputTensor:
    """One input of a request.

    Attributes:
        data: Raw contents, or the elements in row-major order.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | memoryview | Sequence[object]


def images_of(
    inputs: Sequence[InputTensor], manifest: Manifest, max_images: int
) -> Images | EncodedImages:
    """Returns a request's pixels, a view of its raw contents, or its image files still to decode.

    Args:
        inputs: All of the request's inputs.
        manifest: Of the model that was asked for.
        max_images: The most that a request may bring.

    Raises:
        InvalidRequestError: Name, datatype, shape, count or contents are not those of the model.
    """
    if len(inputs) != 1:
        raise InvalidRequestError(
            f"inputs: expected 1 tensor named {manifest.input.name!r}, got {len(inputs)}"
        )
    tensor = inputs[0]
    check_header(tensor, manifest, max_images)
    return _files(tensor) if tensor.datatype == ENCODED else _pixels(tensor)


def check_header(tensor: InputTensor, manifest: Manifest, max_images: int) -> None:
    """Compares all but the contents with what the model takes.

    Raises:
        InvalidRequestError: Name, datatype or shape are not those of the model.
    """
    if tensor.name != manifest.input.name:
        raise InvalidRequestError(
            f"inputs[0].name: expected {manifest.input.name!r}, got {tensor.name!r}"
        )
    where, shape = f"input {tensor.name!r}", tensor.shape
    match tensor.datatype:
        case "UINT8":
            sample = manifest.sample_shape
            if len(shape) != 4 or shape[1:] != sample or shape[0] < 1:
                raise InvalidRequestError(
                    f"{where}: shape: expected {[-1, *sample]} with at least one image, "
                    f"got {list(shape)}"
                )
        case "BYTES":
            # Clients that think of a batch of scalars write [N, 1].
            if not 1 <= len(shape) <= 2 or shape[1:] not in ((), (1,)) or shape[0] < 1:
                raise InvalidRequestError(
                    f"{where}: shape: expected [-1] with at least one image, got {list(shape)}"
                )
        case other:
            raise InvalidRequestError(
                f"{where}: datatype: expected {PIXELS} for pixels or {ENCODED} for image files, "
                f"got {other!r}"
            )
    if shape[0] > max_images:
        raise InvalidRequestError(
            f"{where}: shape: expected 1 to {max_images} images, got {shape[0]}"
        )


def _pixels(tensor: InputTensor) -> Images:
    count = math.prod(tensor.shape)
    if isinstance(tensor.data, bytes | memoryview):
        _check_count(tensor, count, len(tensor.data), "bytes")
        return np.frombuffer(tensor.data, np.uint8).reshape(tensor.shape)
    _check_count(tensor, count, len(tensor.data), "values")
    try:
        # Refuses what is no whole number or beyond 8 bits, unlike the conversion of an array.
        flat = np.frombuffer(bytes(tensor.data), np.uint8)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise InvalidRequestError(
            f"input {tensor.name!r}: expected whole numbers from 0 to 255"
        ) from None
    return flat.reshape(tensor.shape)


def _files(tensor: InputTensor) -> EncodedImages:
    if isinstance(tensor.data, bytes | memoryview):
        return _split(tensor, tensor.data)
    files = tuple(element for element in tensor.data if isinstance(element, bytes))
    _check_count(tensor, tensor.shape[0], len(files), "elements")
    return files


def _split(tensor: InputTensor, raw: bytes | memoryview) -> EncodedImages:
    files, end = [], 0
    for index in range(tensor.shape[0]):
        start = end + _LENGTH.size
        if start > len(raw):
            raise InvalidRequestError(
                f"input {tensor.name!r}: expected {tensor.shape[0]} elements, each after "
                f"its length in {_LENGTH.size} bytes, got {index}"
            )
        (length,) = _LENGTH.unpack_from(raw, end)
        end = start + length
        if end > len(raw):
            raise InvalidRequestError(
                f"input {tensor.name!r}: element {index}: expected {length} bytes, "
                f"got {len(raw) - start}"
            )
        files.append(bytes(raw[start:end]))
    _check_count(tensor, end, len(raw), "bytes")
    return tuple(files)


def _check_count(tensor: InputTensor, expected: int, got: int, what: str) -> None:
    if got != expected:
        raise InvalidRequestError(
            f"input {tensor.name!r}: shape {list(tensor.shape)}: expected {expected} {what}, "
            f"got {got}"
        )
