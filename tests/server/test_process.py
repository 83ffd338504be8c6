"""The server as a process: how it starts, fails to start, and stops."""

import asyncio
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from itertools import islice

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import inference_pb2_grpc
from convoy.server import __version__
from convoy.server.backends.device import count_cuda_devices
from tests.image_files import with_scans
from tests.processes import run_module, running_server


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def infer_request(count: int = 1) -> pb.ModelInferRequest:
    images = np.full((count, 4, 6, 3), 51, np.uint8)
    return pb.ModelInferRequest(
        model_name="colors",
        inputs=[{"name": "image", "datatype": "UINT8", "shape": images.shape}],
        raw_input_contents=[images.tobytes()],
    )


@pytest.fixture
def models(publish):
    publish()
    return publish(2, name="shades").parent.parent


def test_it_serves_every_model_and_tells_so(models):
    with running_server(models, "--device", "cpu") as server:
        assert get(f"{server.metrics}/healthz") == (200, "live\n")
        assert get(f"{server.metrics}/readyz") == (200, "ready\n")
        assert get(f"{server.url}/secret")[0] == 404
        with grpc.insecure_channel(server.address) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            reply = stub.ModelInfer(infer_request())
            assert np.frombuffer(reply.raw_output_contents[0], "<f4") == pytest.approx([0.2] * 3)
            for name, version in (("colors", "1"), ("shades", "2")):
                assert stub.ModelReady(pb.ModelReadyRequest(name=name, version=version)).ready
            unnamed = infer_request()
            unnamed.model_name = ""
            with pytest.raises(grpc.RpcError, match="expected one of colors, shades, got ''"):
                stub.ModelInfer(unnamed)
        loaded = [event for event in server.events if event["event"] == "model loaded"]
        assert {event["device"] for event in loaded} == {"cpu"}
        assert server.stop() == 0


def test_several_devices_answer_behind_one_queue_and_are_named(models):
    with running_server(models, "--device", "cpu,cpu", "--instances", "1") as server:
        with grpc.insecure_channel(server.address) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            for reply in [stub.ModelInfer.future(infer_request(count=3)) for _ in range(20)]:
                logits = np.frombuffer(reply.result().raw_output_contents[0], "<f4")
                assert logits == pytest.approx([0.2] * 9)
            metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name="colors"))
            assert metadata.properties["device"] == "cpu,cpu"
        text = get(f"{server.metrics}/metrics")[1]
        assert 'convoy_instances{model="colors",version="1"} 2.0' in text
        assert 'device="cpu,cpu"' in text
        (serving,) = (event for event in server.events if event["event"] == "serving")
        assert serving["device"] == "cpu,cpu"
        assert server.stop() == 0


def test_metrics_tell_what_was_done(models):
    with running_server(models, "--device", "cpu") as server:
        with grpc.insecure_channel(server.address) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            for _ in range(5):
                stub.ModelInfer(infer_request(count=3))
            with pytest.raises(grpc.RpcError):
                stub.ModelInfer(pb.ModelInferRequest(model_name="made-up"))
        text = get(f"{server.metrics}/metrics")[1]
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }

    def value(name: str, **labels: str) -> float:
        return samples[name, tuple(sorted(labels.items()))]

    model = {"model": "colors", "version": "1"}
    done = {**model, "method": "ModelInfer", "code": "OK"}
    assert value("convoy_request_duration_seconds_count", **done) == 5
    assert value("convoy_queue_duration_seconds_count", **model) == 5
    assert value("convoy_inference_duration_seconds_count", **model) == 5
    assert value("convoy_batch_size_images_sum", **model) == 15
    assert value("convoy_queued_images", **model) == 0
    assert value("convoy_inference_duration_seconds_sum", **model) < value(
        "convoy_request_duration_seconds_sum", **done
    )
    rejected = {"model": "", "version": "", "method": "ModelInfer", "code": "NOT_FOUND"}
    assert value("convoy_request_duration_seconds_count", **rejected) == 1
    assert "made-up" not in text
    device = {"platform": "onnx_onnxv1", "device": "cpu", "provider": "CPUExecutionProvider"}
    assert value("convoy_model_info", **model, **device, precision="fp32") == 1
    assert value("convoy_model_load_seconds", **model) > value(
        "convoy_model_warmup_seconds", **model
    )
    assert value("convoy_outcomes_total", **model, reason="ok") == 5
    assert value("convoy_outcomes_total", model="", version="", reason="invalid") == 1
    assert value("convoy_in_slo_requests_total", **model) == 5
    assert value("convoy_decode_duration_seconds_count", **model) == 0
    assert value("convoy_loading_versions", model="colors") == 0
    largest = value("convoy_max_batch_size_images", **model)
    assert 1 <= value("convoy_preferred_batch_size_images", **model) <= largest
    build = {"version": __version__, "python": platform.python_version(), "backend": "onnx"}
    assert value("convoy_build_info", **build) == 1
    assert 0 < value("process_start_time_seconds") <= time.time()
    assert value("process_resident_memory_bytes") > 0
    bounds = {
        float(dict(labels)["le"])
        for name, labels in samples
        if name == "convoy_request_duration_seconds_bucket"
    }
    assert (min(bounds), sorted(bounds)[-2]) == (0.00025, 10.0)


def test_decoding_is_a_part_of_the_time_and_a_backlog(models):
    """Files that take long keep the threads busy, so that more of them wait."""
    file = with_scans(300, 3000)
    request = pb.ModelInferRequest(
        model_name="colors",
        inputs=[{"name": "image", "datatype": "BYTES", "shape": [1]}],
        raw_input_contents=[len(file).to_bytes(4, "little") + file],
    )
    with (
        running_server(models, "--device", "cpu") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        infer = inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        calls = [infer.future(request) for _ in range(12)]
        while server.metric("convoy_decode_queued_images") < len(calls) // 2:
            time.sleep(0.01)
        assert server.metric("convoy_decode_queue_limit_images") == 1024
        for call in calls:
            call.cancel()
        while server.metric("convoy_decode_queued_images"):
            time.sleep(0.01)
        model = {"model": "colors", "version": "1"}
        assert server.metric("convoy_decode_duration_seconds_count", **model) == len(calls)
        assert server.metric("convoy_decode_queue_duration_seconds_sum", **model) > 0
        assert server.metric("convoy_decode_duration_seconds_sum") >= server.metric(
            "convoy_decode_queue_duration_seconds_sum"
        )


def test_a_deadline_ends_a_request(models):
    # The batch never fills and the delay is long: only the deadline can end the request.
    with (
        running_server(models, "--max-queue-delay-ms", "60000", "--device", "cpu") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(infer_request(), timeout=0.3)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert stub.ServerLive(pb.ServerLiveRequest()).live


def test_a_full_queue_is_resource_exhausted(models):
    flags = ("--max-queue-delay-ms", "60000", "--max-queue-size", "4", "--max-batch-size", "8")
    with running_server(models, *flags, "--device", "cpu") as server:

        async def overload() -> list[grpc.StatusCode]:
            async with grpc.aio.insecure_channel(server.address) as channel:
                stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
                calls = [stub.ModelInfer(infer_request(), timeout=60) for _ in range(6)]
                codes = [asyncio.ensure_future(call.code()) for call in calls]
                first = [await code for code in islice(asyncio.as_completed(codes), 2)]
                assert sum(code.done() for code in codes) == 2
                for call in calls:
                    call.cancel()
                return first

        assert asyncio.run(overload()) == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 2


def test_sigterm_answers_what_was_accepted_and_exits_0(models):
    """The requests wait for a batch that cannot fill, so the drain alone can answer them."""
    flags = ("--max-queue-delay-ms", "60000", "--device", "cpu")
    with running_server(models, *flags) as server:
        with grpc.insecure_channel(server.address) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            calls = [stub.ModelInfer.future(infer_request()) for _ in range(5)]
            queued = 'convoy_queued_images{model="colors",version="1"} 5.0'
            while queued not in get(f"{server.metrics}/metrics")[1]:
                time.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
            replies = [call.result(timeout=20) for call in calls]
        assert [reply.model_name for reply in replies] == ["colors"] * 5
        assert server.process.wait(timeout=30) == 0


def test_every_line_of_the_log_is_the_servers_own(models):
    """h2corn has a banner, which would be no JSON of ours; nor does it log a caller that leaves."""
    with running_server(models, "--device", "cpu") as server:
        assert get(f"{server.url}/v2")[0] == 200
        with grpc.insecure_channel(server.address) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            assert stub.ServerLive(pb.ServerLiveRequest(), timeout=20).live
            requests = stub.ModelStreamInfer(iter(()), timeout=20)
            requests.cancel()
    assert [line for line in server.events if "timestamp" not in line] == []


def assert_one_line(result: object, *words: str) -> None:
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("convoy-server: ")
    for word in words:
        assert word in result.stderr


def assert_last_line(result: object, text: str) -> None:
    """After the log lines of the versions that were loaded or rejected."""
    *events, last = result.stderr.splitlines()
    assert result.returncode == 2
    assert any("version rejected" in event for event in events)
    assert "Traceback" not in result.stderr
    assert last.startswith("convoy-server: ")
    assert text in last


def test_start_up_mistakes_are_one_line_and_exit_2(models, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    quick = ("--port", "0", "--metrics-port", "0", "--exit-on-error")
    assert_one_line(run_module("convoy.server"), "--repository is required")
    assert_one_line(run_module("convoy.server", "--repository", empty, *quick), "holds no model")
    nowhere = ("--repository", tmp_path / "nowhere", "--port", "0", "--metrics-port", "0")
    assert_one_line(run_module("convoy.server", *nowhere), "repository: expected a folder")
    assert_last_line(
        run_module("convoy.server", "--repository", models, *quick, "--backend", "torchscript"),
        "'torchscript' in fp32, found onnx",
    )
    (models / "colors" / "1" / "manifest.json").write_text("{")
    assert_last_line(
        run_module("convoy.server", "--repository", models, *quick), "'colors' version 1"
    )


def test_a_server_without_a_free_file_descriptor_keeps_its_models(models):
    with running_server(models, "--device", "cpu", "--poll-s", "0.05") as server:
        pid = server.process.pid
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        used = max(map(int, os.listdir(f"/proc/{pid}/fd"))) + 1
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used, limits[1]))
        server.wait_for("repository error")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        assert server.metric("convoy_repository_errors_total", error="EMFILE") > 0
        assert server.metric("convoy_model_ready", model="colors") == 1
        assert server.stop() == 0


def test_an_empty_repository_waits_for_a_model_and_is_not_ready(publish, tmp_path):
    (tmp_path / "models").mkdir()
    with running_server(tmp_path / "models", "--device", "cpu", "--poll-s", "0.05") as server:
        assert get(f"{server.metrics}/readyz")[0] == 503
        publish(1)
        server.wait_for("model loaded")
        while get(f"{server.metrics}/readyz")[0] != 200:
            time.sleep(0.01)
        with grpc.insecure_channel(server.address) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            assert stub.ModelInfer(infer_request(), timeout=20).model_name == "colors"
            health = health_pb2_grpc.HealthStub(channel)
            reply = health.Check(health_pb2.HealthCheckRequest(), timeout=20)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("flag", ["--port", "--metrics-port"])
def test_a_port_in_use_is_one_line(models, flag):
    other = {"--port": "--metrics-port", "--metrics-port": "--port"}[flag]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run_module("convoy.server", "--repository", models, flag, port, other, "0")
    lines = [line for line in result.stderr.splitlines() if line.startswith("convoy-server: ")]
    assert result.returncode == 2
    assert lines == [result.stderr.splitlines()[-1]]
    assert f"{flag}: cannot listen on 127.0.0.1:{port}" in lines[0]
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(count_cuda_devices() > 0, reason="this machine has a CUDA device")
def test_cuda_without_a_gpu_is_a_start_up_error(models):
    result = run_module("convoy.server", "--repository", models, "--device", "cuda", "--port", "0")
    assert_one_line(result, "device 'cuda'", "0 CUDA devices")


def test_an_onnx_server_never_imports_torch(models):
    code = (
        "import asyncio, sys\n"
        "from prometheus_client import CollectorRegistry\n"
        "from convoy.server.app import App\n"
        "from convoy.server.settings import parse_settings\n"
        "async def main():\n"
        f"    flags = ['--repository', {str(models)!r}, '--port', '0', '--metrics-port', '0']\n"
        "    async with App(parse_settings([*flags, '--device', 'cpu']), CollectorRegistry()):\n"
        "        print('torch' in sys.modules, 'onnxruntime' in sys.modules)\n"
        "asyncio.run(main())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "False True" in result.stdout.splitlines()
