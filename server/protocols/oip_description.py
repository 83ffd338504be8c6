"""What the protocol's extensions tell about a model: its configuration and its work."""

from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import model_config_pb2 as config_pb
from server.backends.runtimes import Runtime
from server.manifest import TensorSpec
from server.served_model import ServedModel
from server.statistics import Durations

_US_PER_S = 1_000_000
# Platform and backend under the names that Triton has for them.
_PLATFORMS = {
    Runtime.ONNX_RUNTIME: ("onnxruntime_onnx", "onnxruntime"),
    Runtime.TORCHSCRIPT: ("pytorch_libtorch", "pytorch"),
}
_DATATYPES = {"UINT8": config_pb.TYPE_UINT8, "FP32": config_pb.TYPE_FP32}


def model_config(model: ServedModel) -> config_pb.ModelConfig:
    """Returns how a model is served."""
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
    """Returns what a model has done so far.

    Moving the pixels is part of inference here, so the stages around it are counted and take no
    time; there is no cache.
    """
    done = await model.statistics()
    moved = pb.StatisticDuration(count=done.inference.count)
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
            compute_input=moved,
            compute_infer=_duration(done.inference),
            compute_output=moved,
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
        # The protocol counts those of each GPU.
        group.count = instances // len(devices)
    return group


def _duration(durations: Durations) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=durations.count, ns=durations.total_ns)
