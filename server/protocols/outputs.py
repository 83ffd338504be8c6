"""Which outputs a request wants, and the answer as tensors of the Open Inference Protocol."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from server.errors import InvalidRequestError, UnsupportedError
from server.manifest import Manifest
from server.protocols.options import Parameter, whole_number
from server.requests import Outputs, Scores

_LENGTH = struct.Struct("<I")
_CLASSIFICATION = "classification"


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output that a request names, with its parameters."""

    name: str
    parameters: Mapping[str, Parameter]


@dataclass(frozen=True, slots=True)
class WantedOutput:
    """An output to send.

    Attributes:
        classes: How many classes to send in place of the scores; 0 for the scores.
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
        """Returns the contents as raw contents hold them."""
        if isinstance(self.data, tuple):
            return b"".join(_LENGTH.pack(len(element)) + element for element in self.data)
        return self.data.astype("<f4", copy=False).tobytes()


def wanted_outputs(
    requested: Sequence[RequestedOutput], manifest: Manifest
) -> tuple[WantedOutput, ...]:
    """Returns the outputs to send, all of the model's where the request names none.

    Raises:
        InvalidRequestError: An output is named that the model has not, or twice, or wants less than
            one class.
        UnsupportedError: An output shall go into shared memory.
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
            raise UnsupportedError(f"output {output.name!r}: shared memory is not offered")
        wanted[output.name] = WantedOutput(output.name, _classes(output))
    return tuple(wanted.values())


def output_tensors(
    wanted: Sequence[WantedOutput], outputs: Outputs, labels: Sequence[str]
) -> list[OutputTensor]:
    """Returns a model's answer in the form that the request asked for.

    Args:
        wanted: The outputs, in the order to send them.
        outputs: The model's answer to the request's N images.
        labels: The K class names.
    """
    scores = {"logits": outputs.logits, "probabilities": outputs.probabilities}
    return [_tensor(output, scores[output.name], labels) for output in wanted]


def _tensor(output: WantedOutput, scores: Scores, labels: Sequence[str]) -> OutputTensor:
    if not output.classes:
        return OutputTensor(output.name, "FP32", scores.shape, scores)
    best = np.argsort(-scores, axis=1, kind="stable")[:, : output.classes]  # [N, k]
    elements = tuple(
        f"{row[index]:f}:{index}:{labels[index]}".encode()
        for row, indices in zip(scores, best, strict=True)
        for index in indices
    )
    return OutputTensor(output.name, "BYTES", best.shape, elements)


def _classes(output: RequestedOutput) -> int:
    """The classification extension: `value:index:label` of the k best, k being the parameter."""
    if _CLASSIFICATION not in output.parameters:
        return 0
    where = f"output {output.name!r}: {_CLASSIFICATION}"
    classes = whole_number(where, output.parameters[_CLASSIFICATION])
    if classes < 1:
        raise InvalidRequestError(f"{where}: expected at least 1 class, got {classes}")
    return classes
