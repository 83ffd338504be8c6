"""Tensors of the Open Inference Protocol to arrays and back."""

import math
from collections.abc import Iterable

import numpy as np

from convoy.oip.v2 import inference_pb2 as pb
from server.errors import InvalidRequestError
from server.manifest import Manifest
from server.requests import Images, Outputs, Scores


def images_from(request: pb.ModelInferRequest, manifest: Manifest) -> Images:
    """Returns the request's image tensor as `[N, H, W, 3]`, a view of the message where it is raw.

    Raises:
        InvalidRequestError: Name, datatype, shape, count or contents are not those of the model.
    """
    if len(request.inputs) != 1:
        raise InvalidRequestError(
            f"inputs: expected 1 tensor named {manifest.input.name!r}, got {len(request.inputs)}"
        )
    tensor = request.inputs[0]
    _check_header(tensor, manifest)
    count = math.prod(tensor.shape)
    if request.raw_input_contents:
        return _from_raw(request, count).reshape(tensor.shape)
    return _from_typed(tensor, count).reshape(tensor.shape)


def _check_header(tensor: pb.ModelInferRequest.InferInputTensor, manifest: Manifest) -> None:
    expected = manifest.input
    if tensor.name != expected.name:
        raise InvalidRequestError(
            f"inputs[0].name: expected {expected.name!r}, got {tensor.name!r}"
        )
    if tensor.datatype != expected.datatype:
        raise InvalidRequestError(
            f"input {tensor.name!r}: datatype: expected {expected.datatype}, "
            f"got {tensor.datatype!r}"
        )
    sample = manifest.sample_shape
    if len(tensor.shape) != 4 or tuple(tensor.shape[1:]) != sample or tensor.shape[0] < 1:
        raise InvalidRequestError(
            f"input {tensor.name!r}: shape: expected {[-1, *sample]} with at least one image, "
            f"got {list(tensor.shape)}"
        )


def _from_raw(request: pb.ModelInferRequest, count: int) -> Images:
    name = request.inputs[0].name
    if request.inputs[0].HasField("contents"):
        raise InvalidRequestError(
            f"input {name!r}: expected contents or raw_input_contents, got both"
        )
    if len(request.raw_input_contents) != 1:
        raise InvalidRequestError(
            f"raw_input_contents: expected 1 entry, got {len(request.raw_input_contents)}"
        )
    raw = request.raw_input_contents[0]
    if len(raw) != count:
        raise InvalidRequestError(
            f"raw_input_contents[0]: input {name!r}: expected {count} bytes, got {len(raw)}"
        )
    return np.frombuffer(raw, np.uint8)


def _from_typed(tensor: pb.ModelInferRequest.InferInputTensor, count: int) -> Images:
    values = tensor.contents.uint_contents
    if len(values) != count:
        raise InvalidRequestError(
            f"input {tensor.name!r}: contents.uint_contents: expected {count} values, "
            f"got {len(values)}"
        )
    wide = np.fromiter(values, np.uint32, count)
    if wide.max() > np.iinfo(np.uint8).max:
        raise InvalidRequestError(
            f"input {tensor.name!r}: contents.uint_contents: expected 0 to 255, got {wide.max()}"
        )
    return wide.astype(np.uint8)


def wanted_outputs(request: pb.ModelInferRequest, manifest: Manifest) -> list[str]:
    """Returns the names of the outputs to send, all of them where the request names none.

    Raises:
        InvalidRequestError: An output is named that the model has not.
    """
    offered = [output.name for output in manifest.outputs]
    wanted = [output.name for output in request.outputs]
    for name in wanted:
        if name not in offered:
            raise InvalidRequestError(f"outputs: expected {' or '.join(offered)}, got {name!r}")
    return wanted or offered


def add_outputs(reply: pb.ModelInferResponse, names: Iterable[str], outputs: Outputs) -> None:
    """Appends outputs to a reply as raw float32 tensors `[N, K]`."""
    tensors: dict[str, Scores] = {"logits": outputs.logits, "probabilities": outputs.probabilities}
    for name in names:
        scores = tensors[name]
        reply.outputs.add(name=name, datatype="FP32", shape=scores.shape)
        reply.raw_output_contents.append(scores.astype("<f4", copy=False).tobytes())
