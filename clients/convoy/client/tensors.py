"""Arrays to tensors of the Open Inference Protocol, version 2, and back.

Requests carry raw contents, row-major and little-endian; replies may be raw or typed. In raw
contents each element of a BYTES tensor comes after its length in four bytes.
"""

import math
import struct
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from convoy.client.errors import TensorError
from convoy.client.results import Inference
from convoy.oip.v2 import inference_pb2 as pb

Array = NDArray[np.generic]

_LENGTH = struct.Struct("<I")
_BYTES = "BYTES"
# Datatype to NumPy's type and the field that typed contents come in.
_DATATYPES: dict[str, tuple[np.dtype[np.generic], str]] = {
    "BOOL": (np.dtype("?"), "bool_contents"),
    "UINT8": (np.dtype("u1"), "uint_contents"),
    "UINT16": (np.dtype("<u2"), "uint_contents"),
    "UINT32": (np.dtype("<u4"), "uint_contents"),
    "UINT64": (np.dtype("<u8"), "uint64_contents"),
    "INT8": (np.dtype("i1"), "int_contents"),
    "INT16": (np.dtype("<i2"), "int_contents"),
    "INT32": (np.dtype("<i4"), "int_contents"),
    "INT64": (np.dtype("<i8"), "int64_contents"),
    "FP16": (np.dtype("<f2"), ""),
    "FP32": (np.dtype("<f4"), "fp32_contents"),
    "FP64": (np.dtype("<f8"), "fp64_contents"),
}
_DATATYPE_OF = {dtype: datatype for datatype, (dtype, _) in _DATATYPES.items()}


def infer_request(
    model: str,
    inputs: Mapping[str, Array],
    version: str,
    outputs: Sequence[str],
    request_id: str = "",
) -> pb.ModelInferRequest:
    """Build the request that runs a model on named arrays.

    Raises:
        TensorError: An array has a type that the protocol lacks.
    """
    request = pb.ModelInferRequest(model_name=model, model_version=version, id=request_id)
    for name, array in inputs.items():
        datatype, raw = _encode(name, np.asarray(array))
        request.inputs.add(name=name, datatype=datatype, shape=np.shape(array))
        request.raw_input_contents.append(raw)
    for name in outputs:
        request.outputs.add(name=name)
    return request


def inference(reply: pb.ModelInferResponse) -> Inference:
    """Convert a reply.

    Raises:
        TensorError: A tensor in it has an unknown datatype, or not as many elements as it says.
    """
    raw = reply.raw_output_contents
    if raw and len(raw) != len(reply.outputs):
        raise TensorError(f"reply: expected {len(reply.outputs)} raw contents, got {len(raw)}")
    arrays = {}
    for number, tensor in enumerate(reply.outputs):
        flat = _from_raw(tensor, raw[number]) if raw else _from_typed(tensor)
        # NumPy would take a negative length as "whatever fits".
        if min(tensor.shape, default=0) < 0 or math.prod(tensor.shape) != flat.size:
            raise TensorError(
                f"reply: {tensor.name!r}: expected {list(tensor.shape)}, got {flat.size} elements"
            )
        arrays[tensor.name] = flat.reshape(tensor.shape)
    return Inference(reply.model_name, reply.model_version, arrays, reply.id)


def dtype_of(datatype: str) -> np.dtype[np.generic]:
    """Return NumPy's type for a datatype; object, holding bytes, for BYTES.

    Raises:
        TensorError: The datatype is unknown, or NumPy lacks it.
    """
    if datatype == _BYTES:
        return np.dtype(object)
    try:
        return _DATATYPES[datatype][0]
    except KeyError:
        raise TensorError(
            f"datatype: expected {', '.join(_DATATYPES)} or {_BYTES}, got {datatype!r}"
        ) from None


def _encode(name: str, array: Array) -> tuple[str, bytes]:
    if array.dtype.kind in "SUO":
        return _BYTES, b"".join(_length_prefixed(name, array))
    datatype = _DATATYPE_OF.get(array.dtype.newbyteorder("<"))
    if datatype is None:
        raise TensorError(f"input {name!r}: the protocol has no datatype for {array.dtype}")
    return datatype, array.astype(dtype_of(datatype), copy=False).tobytes()


def _length_prefixed(name: str, array: Array) -> Iterator[bytes]:
    for element in array.flat:
        match element:
            case str():
                encoded = element.encode()
            case bytes():
                encoded = bytes(element)
            case _:
                raise TensorError(f"input {name!r}: expected str or bytes, got {type(element)}")
        yield _LENGTH.pack(len(encoded))
        yield encoded


def _from_raw(tensor: pb.ModelInferResponse.InferOutputTensor, raw: bytes) -> Array:
    dtype = dtype_of(tensor.datatype)
    try:
        return _split(raw) if tensor.datatype == _BYTES else np.frombuffer(raw, dtype)
    except (ValueError, struct.error):
        raise TensorError(
            f"reply: {tensor.name!r}: {len(raw)} bytes are not whole elements of {tensor.datatype}"
        ) from None


def _split(raw: bytes) -> Array:
    elements, position = [], 0
    while position < len(raw):
        (length,) = _LENGTH.unpack_from(raw, position)
        position += _LENGTH.size + length
        elements.append(raw[position - length : position])
    if position != len(raw):
        raise ValueError("the last element is incomplete")
    return np.array(elements, object)


def _from_typed(tensor: pb.ModelInferResponse.InferOutputTensor) -> Array:
    dtype = dtype_of(tensor.datatype)
    field = "bytes_contents" if tensor.datatype == _BYTES else _DATATYPES[tensor.datatype][1]
    if not field:
        raise TensorError(f"reply: {tensor.name!r}: {tensor.datatype} comes in raw contents only")
    try:
        return np.array(getattr(tensor.contents, field), dtype)
    except OverflowError as error:
        raise TensorError(f"reply: {tensor.name!r}: not {tensor.datatype}: {error}") from None
