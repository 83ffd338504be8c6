"""The input and output tensors of the Open Inference Protocol, for gRPC and REST.

A model has one input, in two forms: pixels, `UINT8 [N, H, W, 3]`, or image files, `BYTES [N]`. The
datatype says which. Contents are raw (row-major; in BYTES each element follows its length in four
bytes, little-endian) or a sequence of elements. Outputs are `FP32 [N, K]`, or with the
classification extension `BYTES [N, k]` of `value:index:label`.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convoy.server.errors import InvalidRequestError, UnsupportedError
from convoy.server.models.manifest import Manifest, TensorSpec
from convoy.server.protocol.parameters import Parameter, whole_number
from convoy.server.requests import Images, Outputs, Scores

PIXELS = "UINT8"
ENCODED = "BYTES"
_LENGTH = struct.Struct("<I")
_CLASSIFICATION = "classification"

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


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output that a request names, with its parameters."""

    name: str
    parameters: Mapping[str, Parameter]


@dataclass(frozen=True, slots=True)
class WantedOutput:
    """An output to send.

    Attributes:
        classes: The number of classes to send instead of the scores; 0 for the scores.
    """

    name: str
    classes: int = 0


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One output of a reply.

    Attributes:
        data: float32 scores `[N, K]`, or the elements of a BYTES tensor in row-major order.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Scores | tuple[bytes, ...]

    def raw(self) -> bytes:
        """Return the contents in the form of raw contents."""
        if isinstance(self.data, tuple):
            return b"".join(_LENGTH.pack(len(element)) + element for element in self.data)
        return self.data.astype("<f4", copy=False).tobytes()


def images_of(
    inputs: Sequence[InputTensor], manifest: Manifest, max_images: int
) -> Images | EncodedImages:
    """Return a request's pixels as a view of its raw contents, or its encoded image files.

    Args:
        inputs: All inputs of the request.
        manifest: The manifest of the model.
        max_images: The most images that a request may hold.

    Raises:
        InvalidRequestError: Name, datatype, shape, count or contents do not fit the model.
    """
    if len(inputs) != 1:
        raise InvalidRequestError(
            f"inputs: expected 1 tensor named {manifest.input.name!r}, got {len(inputs)}"
        )
    tensor = inputs[0]
    check_header(tensor, manifest, max_images)
    return _files(tensor) if tensor.datatype == ENCODED else _pixels(tensor)


def check_header(tensor: InputTensor, manifest: Manifest, max_images: int) -> None:
    """Check everything but the contents against the model's input.

    Raises:
        InvalidRequestError: Name, datatype or shape do not fit the model.
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
            # Clients that send a batch of scalars write [N, 1].
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


def wanted_outputs(
    requested: Sequence[RequestedOutput], manifest: Manifest
) -> tuple[WantedOutput, ...]:
    """Return the outputs to send: those that the request names, or all of the model.

    Raises:
        InvalidRequestError: The request names an unknown output, names one twice, or asks for less
            than one class.
        UnsupportedError: The request asks for an output in shared memory.
    """
    offered = [output.name for output in manifest.outputs]
    if not requested:
        return tuple(map(WantedOutput, offered))
    wanted: dict[str, WantedOutput] = {}
    for output in requested:
        if output.name not in offered:
            raise InvalidRequestError(
                f"outputs: expected {' or '.join(offered)}, got {output.name!r}"
            )
        if output.name in wanted:
            raise InvalidRequestError(f"outputs: {output.name!r} is named twice")
        if any(name.startswith("shared_memory") for name in output.parameters):
            raise UnsupportedError(f"output {output.name!r}: shared memory is not supported")
        wanted[output.name] = WantedOutput(output.name, _classes(output))
    return tuple(wanted.values())


def output_tensors(
    wanted: Sequence[WantedOutput], outputs: Outputs, labels: Sequence[str]
) -> list[OutputTensor]:
    """Return the outputs of a model in the form that the request asks for.

    Args:
        wanted: The outputs, in the order to send them.
        outputs: The model's outputs for the request's N images.
        labels: The K class names.
    """
    scores = {"logits": outputs.logits, "probabilities": outputs.probabilities}
    return [_output_tensor(output, scores[output.name], labels) for output in wanted]


def best_classes(scores: Scores, count: int) -> NDArray[np.intp]:
    """Return the indices of the highest scores along the last axis, the lower index first in a tie.

    Args:
        scores: `[..., K]`.
        count: How many of them.

    Returns:
        `[..., count]`.
    """
    best: NDArray[np.intp] = np.argsort(-scores, axis=-1, kind="stable")[..., :count]
    return best


def describe_tensor(spec: TensorSpec) -> dict[str, object]:
    """Return the fields of a tensor's metadata, which gRPC and REST share."""
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _pixels(tensor: InputTensor) -> Images:
    count = math.prod(tensor.shape)
    if isinstance(tensor.data, bytes | memoryview):
        _check_count(tensor, count, len(tensor.data), "bytes")
        return np.frombuffer(tensor.data, np.uint8).reshape(tensor.shape)
    _check_count(tensor, count, len(tensor.data), "values")
    try:
        # Rejects fractions and values beyond 8 bits, unlike the conversion of an array.
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


def _output_tensor(output: WantedOutput, scores: Scores, labels: Sequence[str]) -> OutputTensor:
    if not output.classes:
        return OutputTensor(output.name, "FP32", scores.shape, scores)
    best = best_classes(scores, output.classes)  # [N, k]
    elements = tuple(
        f"{row[index]:f}:{index}:{labels[index]}".encode()
        for row, indices in zip(scores, best, strict=True)
        for index in indices
    )
    return OutputTensor(output.name, "BYTES", best.shape, elements)


def _classes(output: RequestedOutput) -> int:
    """Return how many of the best classes to send, by the classification extension."""
    if _CLASSIFICATION not in output.parameters:
        return 0
    where = f"output {output.name!r}: {_CLASSIFICATION}"
    classes = whole_number(where, output.parameters[_CLASSIFICATION])
    if classes < 1:
        raise InvalidRequestError(f"{where}: expected at least 1 class, got {classes}")
    return classes
