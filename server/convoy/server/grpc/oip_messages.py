"""The messages of the Open Inference Protocol: convert requests, replies and descriptions."""

from collections.abc import Iterable, Mapping, Sequence

from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import model_config_pb2 as config_pb
from convoy.server.backends.device import Runtime
from convoy.server.errors import InvalidRequestError, UnsupportedError
from convoy.server.metrics.batches import Durations
from convoy.server.models.manifest import TensorSpec
from convoy.server.models.registry import ServedModel
from convoy.server.protocol.parameters import Parameter
from convoy.server.protocol.tensors import (
    InputTensor,
    OutputTensor,
    RequestedOutput,
    describe_tensor,
)

# The field of typed contents for a datatype; no model has an input of another datatype.
_CONTENTS = {"UINT8": "uint_contents", "BYTES": "bytes_contents"}
_US_PER_S = 1_000_000
# Platform and backend under the names that Triton gives them.
_PLATFORMS = {
    Runtime.ONNX_RUNTIME: ("onnxruntime_onnx", "onnxruntime"),
    Runtime.TORCHSCRIPT: ("pytorch_libtorch", "pytorch"),
}
_DATATYPES = {"UINT8": config_pb.TYPE_UINT8, "FP32": config_pb.TYPE_FP32}


def inputs_of(request: pb.ModelInferRequest) -> list[InputTensor]:
    """Return the request's inputs with their contents, raw or typed.

    Raises:
        InvalidRequestError: There are both kinds of contents, or not one raw entry for each input.
        UnsupportedError: The contents are in shared memory.
    """
    raw = request.raw_input_contents
    for tensor in request.inputs:
        _reject_shared_memory(tensor)
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
    """Return the outputs that the request names.

    Raises:
        InvalidRequestError: A parameter has no value.
    """
    return [
        RequestedOutput(output.name, parameters_of(output.parameters)) for output in request.outputs
    ]


def parameters_of(parameters: Mapping[str, pb.InferParameter]) -> dict[str, Parameter]:
    """Return parameters by name.

    Raises:
        InvalidRequestError: One has no value.
    """
    return {name: _value(name, parameter) for name, parameter in parameters.items()}


def add_outputs(reply: pb.ModelInferResponse, tensors: Iterable[OutputTensor]) -> None:
    """Append outputs to a reply, with raw contents."""
    for tensor in tensors:
        reply.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        reply.raw_output_contents.append(tensor.raw())


def model_metadata(model: ServedModel) -> pb.ModelMetadataResponse:
    """Return the description of a model: its tensors, and what runs it."""
    return pb.ModelMetadataResponse(
        name=model.name,
        versions=[str(model.version)],
        platform=model.runs_on.platform,
        inputs=[_tensor_metadata(model.manifest.input)],
        outputs=map(_tensor_metadata, model.manifest.outputs),
        properties={"device": model.runs_on.device, "provider": model.runs_on.provider},
    )


def model_config(model: ServedModel) -> config_pb.ModelConfig:
    """Return the configuration of a model: its instances, limits and batching."""
    limits = model.batcher.limits
    platform, backend = _PLATFORMS.get(model.runtime, ("", model.runtime.value))
    return config_pb.ModelConfig(
        name=model.name,
        platform=platform,
        backend=backend,
        max_batch_size=limits.max_batch_size,
        input=[
            config_pb.ModelInput(
                name=model.manifest.input.name,
                data_type=_DATATYPES[model.manifest.input.datatype],
                format=config_pb.ModelInput.FORMAT_NHWC,
                dims=model.manifest.input.shape[1:],
            )
        ],
        output=map(_output, model.manifest.outputs),
        instance_group=[_instances(model)],
        dynamic_batching=config_pb.ModelDynamicBatching(
            preferred_batch_size=[limits.preferred_batch_size or limits.max_batch_size],
            max_queue_delay_microseconds=int(limits.max_queue_delay_s * _US_PER_S),
        ),
    )


async def model_statistics(model: ServedModel) -> pb.ModelStatistics:
    """Return the statistics of a model.

    Inference includes copying the pixels, so the copy stages have a count and no time; there is no
    cache.
    """
    done = await model.statistics()
    copies = pb.StatisticDuration(count=done.inference.count)
    return pb.ModelStatistics(
        name=model.name,
        version=str(model.version),
        last_inference=done.last_inference_ms,
        inference_count=done.images,
        execution_count=done.batches,
        inference_stats=pb.InferStatistics(
            success=_duration(done.success),
            fail=_duration(done.failure),
            queue=_duration(done.queue),
            compute_input=copies,
            compute_infer=_duration(done.inference),
            compute_output=copies,
        ),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=size,
                compute_input=pb.StatisticDuration(count=durations.count),
                compute_infer=_duration(durations),
                compute_output=pb.StatisticDuration(count=durations.count),
            )
            for size, durations in sorted(done.by_batch_size.items())
        ],
    )


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


def _reject_shared_memory(tensor: pb.ModelInferRequest.InferInputTensor) -> None:
    if any(name.startswith("shared_memory") for name in tensor.parameters):
        raise UnsupportedError(f"input {tensor.name!r}: shared memory is not supported")


def _value(name: str, parameter: pb.InferParameter) -> Parameter:
    field = parameter.WhichOneof("parameter_choice")
    if field is None:
        raise InvalidRequestError(f"parameters: {name}: expected a value, got none")
    value: Parameter = getattr(parameter, field)
    return value


def _tensor_metadata(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(**describe_tensor(spec))  # type: ignore[arg-type]


def _output(spec: TensorSpec) -> config_pb.ModelOutput:
    return config_pb.ModelOutput(
        name=spec.name, data_type=_DATATYPES[spec.datatype], dims=spec.shape[1:]
    )


def _instances(model: ServedModel) -> config_pb.ModelInstanceGroup:
    instances, devices = model.batcher.limits.instances, model.runs_on.device.split(",")
    group = config_pb.ModelInstanceGroup(
        name=model.name, count=instances, kind=config_pb.ModelInstanceGroup.KIND_CPU
    )
    if devices[0].startswith("cuda:"):
        group.kind = config_pb.ModelInstanceGroup.KIND_GPU
        group.gpus.extend(int(device.removeprefix("cuda:")) for device in devices)
        # The protocol counts the instances of each GPU.
        group.count = instances // len(devices)
    return group


def _duration(durations: Durations) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=durations.count, ns=durations.total_ns)
