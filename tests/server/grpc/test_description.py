"""What the protocol's extensions tell about a model."""

from dataclasses import replace

from convoy.oip.v2 import model_config_pb2 as config_pb
from convoy.server.grpc.oip_messages import model_config
from convoy.server.metrics.requests import RunsOn
from tests.server.inprocess import servicers


async def test_instances_are_counted_as_triton_counts_them(publish):
    """Those of each GPU, but all of them on the processors."""
    async with servicers(publish(), instances=4) as served:
        model = served.models.default("colors")
        gpus = RunsOn("onnx_onnxv1", "cuda:2,cuda:0", "CUDAExecutionProvider", "fp32")
        (on_gpus,) = model_config(replace(model, runs_on=gpus)).instance_group
        (on_cpu,) = model_config(model).instance_group
    groups = config_pb.ModelInstanceGroup
    assert (on_gpus.kind, on_gpus.count, list(on_gpus.gpus)) == (groups.KIND_GPU, 2, [2, 0])
    assert (on_cpu.kind, on_cpu.count, list(on_cpu.gpus)) == (groups.KIND_CPU, 4, [])
