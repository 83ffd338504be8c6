"""The timeout parameter and --slo-ms end a call whose run takes longer, on every path."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import httpx
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import inference_pb2_grpc
from convoy.server.assembly import message_limits
from convoy.server.backends.device import Runtime
from convoy.server.batching import BatchingLimits, DynamicBatcher, Runner
from convoy.server.metrics.batches import ModelStatistics
from convoy.server.metrics.requests import RunsOn, ServerMetrics
from convoy.server.models.readiness import ServerState
from convoy.server.models.registry import LoadedModel, ModelRegistry
from convoy.server.models.repository import read_manifest
from convoy.server.ports import Served, open_caller_port
from convoy.server.requests import Images, Outputs
from convoy.server.settings import parse_settings
from convoy.v1 import classifier_pb2, classifier_pb2_grpc
from tests.server.conftest import CLASSES, HEIGHT, WIDTH, publish_version

LIMIT_S = 0.1
# No run ends before the test does: without a limit a call would last so long.
HANG_S = 30
PIXELS = np.zeros((1, HEIGHT, WIDTH, 3), np.uint8)


@dataclass(frozen=True)
class Stubs:
    """The services of a server in this process, and its metrics."""

    rest: httpx.AsyncClient
    inference: inference_pb2_grpc.GRPCInferenceServiceStub
    classifier: classifier_pb2_grpc.ClassifierServiceStub
    registry: CollectorRegistry


@contextlib.asynccontextmanager
async def serving(folder, *flags: str) -> AsyncIterator[Stubs]:
    """Serves a model whose runs wait for the end of the test."""
    gate = threading.Event()

    def run(images: Images) -> Outputs:
        gate.wait(HANG_S)
        scores = np.zeros((len(images), CLASSES), np.float32)
        return Outputs(scores, scores)

    registry = CollectorRegistry()
    metrics = ServerMetrics(registry)
    manifest = read_manifest(publish_version(folder))
    limits = BatchingLimits(
        max_batch_size=1, max_queue_size=64, instances=8, hang_timeout_s=2 * HANG_S
    )
    statistics = ModelStatistics()
    batcher = DynamicBatcher([Runner(run)], manifest.sample_shape, limits, statistics)
    batcher.start()
    model = LoadedModel(
        manifest,
        Runtime.ONNX_RUNTIME,
        RunsOn("onnx_onnxv1", "cpu", "none", "fp32"),
        batcher,
        metrics.requests_of(manifest.name, manifest.version),
        statistics.read,
    )
    models = ModelRegistry()
    models.add(model)
    models.make_default(model)
    models.state = ServerState.SERVING
    settings = parse_settings(["--repository", str(folder), "--port", "0", *flags])
    served = Served(models, metrics, list, message_limits(settings, models), 1)
    async with contextlib.AsyncExitStack() as cleanup:
        port = open_caller_port(settings, served, cleanup)
        await port.start()
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{port.port}") as channel,
            httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{port.port}", timeout=HANG_S / 2, trust_env=False
            ) as rest,
        ):
            yield Stubs(
                rest,
                inference_pb2_grpc.GRPCInferenceServiceStub(channel),
                classifier_pb2_grpc.ClassifierServiceStub(channel),
                registry,
            )
        gate.set()
        await port.drain()
        await batcher.drain()


def infer_request(fast: bool) -> pb.ModelInferRequest:
    """A request with raw contents, which the fast path answers, or with typed ones."""
    tensor = {"name": "image", "datatype": "UINT8", "shape": PIXELS.shape}
    if fast:
        return pb.ModelInferRequest(
            model_name="colors", inputs=[tensor], raw_input_contents=[PIXELS.tobytes()]
        )
    contents = {"uint_contents": PIXELS.ravel().tolist()}
    return pb.ModelInferRequest(model_name="colors", inputs=[{**tensor, "contents": contents}])


async def infer_by_rest(client: httpx.AsyncClient, binary: bool, **parameters: int) -> int:
    """Posts a request with binary pixels, which the fast path answers once it has a plan, or JSON.

    Returns:
        The status of the reply.
    """
    tensor: dict[str, object] = {"name": "image", "datatype": "UINT8", "shape": PIXELS.shape}
    if binary:
        tensor["parameters"] = {"binary_data_size": PIXELS.nbytes}
        pixels, head = PIXELS.tobytes(), json.dumps({"inputs": [tensor], "parameters": parameters})
        headers = {"Inference-Header-Content-Length": str(len(head))}
    else:
        tensor["data"] = PIXELS.ravel().tolist()
        pixels, head, headers = b"", json.dumps({"inputs": [tensor], "parameters": parameters}), {}
    path = "/v2/models/colors/infer"
    reply = await client.post(path, content=head.encode() + pixels, headers=headers)
    return reply.status_code


def classify_request() -> classifier_pb2.ClassifyRequest:
    raw = {"height": HEIGHT, "width": WIDTH, "pixels": PIXELS.tobytes()}
    return classifier_pb2.ClassifyRequest(raw=raw)


async def ends_late(call: grpc.aio.UnaryUnaryCall) -> float:
    """Awaits DEADLINE_EXCEEDED from the server; returns how long it took."""
    started_s = asyncio.get_running_loop().time()
    async with asyncio.timeout(HANG_S / 2):
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    return asyncio.get_running_loop().time() - started_s


@pytest.mark.parametrize("transport", ["h2corn", "grpcio"])
async def test_the_timeout_parameter_ends_a_call_that_runs(tmp_path, transport):
    async with serving(tmp_path / "colors" / "1", "--transport", transport) as stubs:
        for fast in (True, False):
            request = infer_request(fast)
            request.parameters["timeout"].int64_param = int(LIMIT_S * 1e6)
            assert await ends_late(stubs.inference.ModelInfer(request)) >= LIMIT_S
        labels = {"model": "colors", "version": "1", "reason": "deadline"}
        assert stubs.registry.get_sample_value("convoy_outcomes_total", labels) == 2


@pytest.mark.parametrize("transport", ["h2corn", "grpcio"])
async def test_the_objective_ends_a_call_that_runs(tmp_path, transport):
    flags = ("--transport", transport, "--slo-ms", str(LIMIT_S * 1e3))
    async with serving(tmp_path / "colors" / "1", *flags) as stubs:
        calls = [stubs.inference.ModelInfer(infer_request(fast)) for fast in (True, False)]
        calls.append(stubs.classifier.Classify(classify_request()))
        # Later than the objective, so that the caller's own deadline is not what ends it.
        calls.append(stubs.inference.ModelInfer(infer_request(fast=True), timeout=HANG_S))
        for call in calls:
            assert await ends_late(call) < HANG_S / 2
        labels = {"model": "colors", "version": "1", "reason": "deadline"}
        assert stubs.registry.get_sample_value("convoy_outcomes_total", labels) == len(calls)


@pytest.mark.parametrize("limit", ["the objective", "the timeout parameter"])
async def test_a_call_by_rest_that_runs_is_ended(tmp_path, limit):
    flags, parameters = (), {}
    if limit == "the objective":
        flags = ("--slo-ms", str(LIMIT_S * 1e3))
    else:
        parameters = {"timeout": int(LIMIT_S * 1e6)}
    async with serving(tmp_path / "colors" / "1", *flags) as stubs:
        # The first binary request makes the plan that the second is answered by.
        for binary in (True, True, False):
            assert await infer_by_rest(stubs.rest, binary, **parameters) == 504
        labels = {"model": "colors", "version": "1", "reason": "deadline"}
        assert stubs.registry.get_sample_value("convoy_outcomes_total", labels) == 3
