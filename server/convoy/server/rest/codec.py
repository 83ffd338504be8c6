"""The bodies of REST requests: JSON, followed by raw tensors if the caller requests them.

The binary tensor data extension: a body begins with JSON, whose length is in the header field
`Inference-Header-Content-Length`; the tensors that have a `binary_data_size` follow in their order.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr
from pydantic import ValidationError as SchemaError

from convoy.server.errors import InvalidRequestError
from convoy.server.protocol.parameters import Parameter
from convoy.server.protocol.tensors import InputTensor, OutputTensor, RequestedOutput

HEADER_LENGTH = "Inference-Header-Content-Length"
_BINARY_SIZE = "binary_data_size"
_BINARY = "binary_data"
_BINARY_BY_DEFAULT = "binary_data_output"
# A header that a caller repeats is parsed once.
_CACHED_HEADERS = 256
_MAX_CACHED_HEADER_BYTES = 4096

_Parameters = dict[str, StrictBool | StrictInt | StrictFloat | StrictStr]


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True)


class _Input(_Message):
    name: str
    datatype: str
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    parameters: _Parameters = {}
    data: list[object] | None = None


class _Output(_Message):
    name: str
    parameters: _Parameters = {}


class _InferRequest(_Message):
    id: str = ""
    parameters: _Parameters = {}
    inputs: tuple[_Input, ...]
    outputs: tuple[_Output, ...] = ()


@dataclass(frozen=True, slots=True)
class InferBody:
    """The parsed infer request.

    Attributes:
        binary_outputs: Names of the outputs to send as raw tensors.
        binary_by_default: Whether those that the request does not name are sent so.
    """

    id: str
    parameters: dict[str, Parameter]
    inputs: tuple[InputTensor, ...]
    outputs: tuple[RequestedOutput, ...]
    binary_outputs: frozenset[str]
    binary_by_default: bool

    def wants_binary(self, output: str) -> bool:
        """Return whether an output is sent as a raw tensor."""
        return output in self.binary_outputs or (self.binary_by_default and not self.outputs)


def read_infer_body(body: bytes, header_bytes: int | None) -> InferBody:
    """Read the body of an infer request.

    Args:
        body: All of it.
        header_bytes: Length of its JSON; None if it is JSON only.

    Raises:
        InvalidRequestError: It is malformed; the message names the field.
    """
    end = len(body) if header_bytes is None else header_bytes
    if not 0 <= end <= len(body):
        raise InvalidRequestError(
            f"{HEADER_LENGTH}: expected at most the body's {len(body)} bytes, got {end}"
        )
    header = _read_header(body[:end])
    default = header.parameters.get(_BINARY_BY_DEFAULT, False) is True
    return InferBody(
        header.id,
        dict(header.parameters),
        _inputs(header.inputs, memoryview(body)[end:]),
        tuple(RequestedOutput(output.name, output.parameters) for output in header.outputs),
        frozenset(o.name for o in header.outputs if o.parameters.get(_BINARY, default) is True),
        default,
    )


def write_infer_body(
    head: dict[str, object], outputs: Sequence[OutputTensor], request: InferBody
) -> tuple[bytes, int | None]:
    """Write the body of a reply.

    Args:
        head: The fields before the outputs: the model's name, its version, the request's id.
        outputs: The answer.
        request: Selects the outputs to send as raw tensors.

    Returns:
        The body and the length of its JSON; None if it is JSON only.
    """
    described: list[dict[str, object]] = []
    raw: list[bytes] = []
    for output in outputs:
        tensor: dict[str, object] = {
            "name": output.name,
            "datatype": output.datatype,
            "shape": list(output.shape),
        }
        if request.wants_binary(output.name):
            raw.append(output.raw())
            tensor["parameters"] = {_BINARY_SIZE: len(raw[-1])}
        else:
            tensor["data"] = _plain(output)
        described.append(tensor)
    text = json.dumps({**head, "outputs": described}, allow_nan=False).encode()
    return b"".join((text, *raw)), len(text) if raw else None


def _read_header(text: bytes) -> _InferRequest:
    return _cached_header(text) if len(text) <= _MAX_CACHED_HEADER_BYTES else _parse(text)


def _parse(text: bytes) -> _InferRequest:
    try:
        return _InferRequest.model_validate_json(text)
    except SchemaError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "body"
        raise InvalidRequestError(f"{where}: {problem['msg'].lower()}") from None


_cached_header = lru_cache(_CACHED_HEADERS)(_parse)


def _inputs(described: Sequence[_Input], raw: memoryview) -> tuple[InputTensor, ...]:
    inputs: list[InputTensor] = []
    end = 0
    for tensor in described:
        size = tensor.parameters.get(_BINARY_SIZE)
        if size is None:
            data: memoryview | list[object] = _flatten(tensor)
        elif isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise InvalidRequestError(
                f"input {tensor.name!r}: {_BINARY_SIZE}: expected a number of bytes, got {size!r}"
            )
        elif tensor.data is not None:
            raise InvalidRequestError(
                f"input {tensor.name!r}: expected data or {_BINARY_SIZE}, got both"
            )
        else:
            start, end = end, end + size
            data = raw[start:end]
        inputs.append(InputTensor(tensor.name, tensor.datatype, tensor.shape, data))
    if end != len(raw):
        raise InvalidRequestError(
            f"body: expected {end} bytes of raw tensors after the JSON, got {len(raw)}"
        )
    return tuple(inputs)


def _flatten(tensor: _Input) -> list[object]:
    """Return the elements of data that is flat or nested like the shape, strings as UTF-8."""
    if tensor.data is None:
        raise InvalidRequestError(f"input {tensor.name!r}: expected data or {_BINARY_SIZE}")
    flat = tensor.data
    for _ in tensor.shape[1:]:
        if not flat or not isinstance(flat[0], list):
            break
        if not all(isinstance(row, list) for row in flat):
            raise InvalidRequestError(f"input {tensor.name!r}: data: expected rows of one depth")
        flat = [element for row in flat if isinstance(row, list) for element in row]
    return [element.encode() if isinstance(element, str) else element for element in flat]


def _plain(output: OutputTensor) -> list[object]:
    if isinstance(output.data, tuple):
        return [element.decode() for element in output.data]
    scores = output.data.ravel()
    elements: list[object] = [*scores.tolist()]
    if np.isfinite(scores).all():
        return elements
    # JSON has neither NaN nor infinity.
    return [
        each if finite else None for each, finite in zip(elements, np.isfinite(scores), strict=True)
    ]
