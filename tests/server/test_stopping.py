"""How the server ends: in the order that load balancers, callers and supervisors count on."""

import signal
import subprocess
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import inference_pb2_grpc
from tests.processes import running_server
from tests.server.test_process import infer_request

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture
def models(publish):
    return publish().parent.parent


def test_a_lame_duck_reports_not_serving_and_answers_on(models):
    # Long enough for a busy machine; the second signal cuts it short.
    flags = ("--device", "cpu", "--lame-duck-seconds", "600")
    with (
        running_server(models, *flags) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        server.process.send_signal(signal.SIGTERM)
        assert next(watch).status == NOT_SERVING
        for _ in range(3):
            assert stub.ModelInfer(infer_request()).model_version == "1"
        assert not stub.ServerReady(pb.ServerReadyRequest()).ready
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=30) == -signal.SIGTERM


def test_after_the_lame_duck_it_drains_and_exits_0(models):
    """An open Watch does not hold it up."""
    flags = ("--device", "cpu", "--lame-duck-seconds", "0.2", "--drain-timeout-s", "100")
    with (
        running_server(models, *flags) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        assert server.stop() == 0
        assert next(watch).status == NOT_SERVING


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(models, number):
    """The first one waits for a batch that cannot fill."""
    flags = ("--max-queue-delay-ms", "600000", "--device", "cpu", "--lame-duck-seconds", "600")
    with (
        running_server(models, *flags) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        call = inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer.future(
            infer_request()
        )
        server.process.send_signal(number)
        server.wait_for("draining")
        server.process.send_signal(number)
        assert server.process.wait(timeout=30) == -number
        assert call.exception(timeout=30).code() is grpc.StatusCode.UNAVAILABLE


def test_told_to_stop_while_it_starts_it_ends_with_0(publish):
    """Many versions keep it loading."""
    for number in range(1, 40):
        publish(number)
    models = publish(40).parent.parent
    command = [sys.executable, "-m", "server", "--repository", models, "--device", "cpu"]
    command += ["--port", "0", "--http-port", "0", "--version-policy", "all"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            if "model loaded" in line:
                break
        process.terminate()
        log = process.stderr.read()
        assert process.wait(timeout=60) == 0
    assert "stopped while starting" in log
    assert "Traceback" not in log
