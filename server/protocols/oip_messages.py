"""Messages of the Open Inference Protocol to what the other modules understand, and back."""

from collections.abc import Iterable, Mapping, Sequence

from convoy.oip.v2 import inference_pb2 as pb
from server.errors import InvalidRequestError, UnsupportedError
from server.protocols.options import Parameter
from server.protocols.outputs import OutputTensor, RequestedOutput
from server.protocols.tensors import InputTensor

# The field of typed contents that belongs to a datatype; no model takes the others.
_CONTENTS = {"UINT8": "uint_contents", "BYTES": "bytes_contents"}


def inputs_of(request: pb.ModelInferRequest) -> list[InputTensor]:
    """Returns the request's inputs with their contents, raw or typed.

    Raises:
        InvalidRequestError: There are both kinds of contents, or not one raw entry for each input.
        UnsupportedError: The contents lie in shared memory.
    """
    raw = request.raw_input_contents
    for tensor in request.inputs:
        _refuse_shared_memory(tensor)
        if raw and tensor.HasField("contents"):
            raise InvalidRequestError(
                f"input {tensor.name!r}: expected contents or raw_input_contents, got both"
            )
    if not raw:
        return [_input(tensor, _typed(tensor)) for tensor in request.inputs]
    if len(raw) != len(request.inputs):
        expected = len(request.inputs)
        raise InvalidRequestError(
            f"raw_input_contents: expected {expected} {'entry' if expected == 1 else 'entries'}, "
            f"got {len(raw)}"
        )
    return [_input(tensor, data) for tensor, data in zip(request.inputs, raw, strict=True)]


def requested_outputs_of(request: pb.ModelInferRequest) -> list[RequestedOutput]:
    """Returns the outputs that the request names.

    Raises:
        InvalidRequestError: A parameter has no value.
    """
    return [
        RequestedOutput(output.name, parameters_of(output.parameters)) for output in request.outputs
    ]


def parameters_of(parameters: Mapping[str, pb.InferParameter]) -> dict[str, Parameter]:
    """Returns parameters by name.

    Raises:
        InvalidRequestError: One has no value.
    """
    return {name: _value(name, parameter) for name, parameter in parameters.items()}


def add_outputs(reply: pb.ModelInferResponse, tensors: Iterable[OutputTensor]) -> None:
    """Appends outputs to a reply, with raw contents."""
    for tensor in tensors:
        reply.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        reply.raw_output_contents.append(tensor.raw())


def _input(
    tensor: pb.ModelInferRequest.InferInputTensor, data: bytes | Sequence[int] | Sequence[bytes]
) -> InputTensor:
    return InputTensor(tensor.name, tensor.datatype, tuple(tensor.shape), data)


def _typed(
    tensor: pb.ModelInferRequest.InferInputTensor,
) -> Sequence[int] | Sequence[bytes]:
    expected = _CONTENTS.get(tensor.datatype)
    if expected is None:
        return ()
    for field, values in tensor.contents.ListFields():
        if field.name != expected:
            raise InvalidRequestError(
                f"input {tensor.name!r}: contents: expected {expected} for {tensor.datatype}, "
                f"got {len(values)} elements in {field.name}"
            )
    elements: Sequence[int] | Sequence[bytes] = getattr(tensor.contents, expected)
    return elements


def _refuse_shared_memory(tensor: pb.ModelInferRequest.InferInputTensor) -> None:
    if any(name.startswith("shared_memory") for name in tensor.parameters):
        raise UnsupportedError(f"input {tensor.name!r}: shared memory is not offered")


def _value(name: str, parameter: pb.InferParameter) -> Parameter:
    field = parameter.WhichOneof("parameter_choice")
    if field is None:
        raise InvalidRequestError(f"parameters: {name}: expected a value, got none")
    value: Parameter = getattr(parameter, field)
    return value
