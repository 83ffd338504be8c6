"""How the server ends: in the order that load balancers, callers and supervisors count on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from onnx import helper, numpy_helper

from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import inference_pb2_grpc
from tests.processes import running_server
from tests.server.conftest import seal
from tests.server.test_process import infer_request

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture
def models(publish):
    return publish().parent.parent


def test_a_lame_duck_reports_not_serving_and_keeps_answering(models):
    # Long enough for a busy machine; the second signal cuts it short.
    flags = ("--device", "cpu", "--lame-duck-s", "600")
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
    flags = ("--device", "cpu", "--lame-duck-s", "0.2", "--drain-timeout-s", "100")
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
    flags = ("--max-queue-delay-ms", "600000", "--device", "cpu", "--lame-duck-s", "600")
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


def never_end(folder: Path) -> None:
    """Lets the graph of a version loop for centuries, from its first run on."""
    model = onnx.load(folder / "model.onnx")
    tensors = [helper.make_tensor_value_info(name, 1, None) for name in ("x", "y")]
    flags = [helper.make_tensor_value_info(name, 9, []) for name in ("go", "go_on")]
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Neg", ["x"], ["y"]),
        ],
        "body",
        [helper.make_tensor_value_info("turn", 7, []), flags[0], tensors[0]],
        [flags[1], tensors[1]],
    )
    turns = numpy_helper.from_array(np.array(2**62), "turns")
    always = numpy_helper.from_array(np.array(True), "always")
    model.graph.initializer.extend([turns, always])
    loop = helper.make_node("Loop", ["turns", "always", "pixels"], ["looped"], body=body)
    model.graph.node[1].input[0] = "looped"
    model.graph.node.insert(1, loop)
    onnx.save(model, folder / "model.onnx")
    seal(folder)


def busy_s(process_id: int) -> float:
    """The processor time that a process has used."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_until_busy(process_id: int) -> None:
    """Waits until a process that has nothing else to do runs the graph that never ends."""
    since_s = busy_s(process_id)
    while busy_s(process_id) < since_s + 0.5:
        time.sleep(0.01)


def test_sigterm_ends_a_server_whose_load_hangs(publish):
    models = publish().parent.parent
    with running_server(models, "--device", "cpu", "--poll-s", "0.1") as server:
        publish(name="stuck", spoil=never_end)
        server.wait_for("loading", model="stuck")
        wait_until_busy(server.process.pid)
        with grpc.insecure_channel(server.address) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            assert stub.ModelInfer(infer_request()).model_version == "1"
        assert server.stop() == 0
        server.wait_for("stopped")


def test_sigterm_ends_a_start_that_hangs_in_a_load(publish):
    models = publish(spoil=never_end).parent.parent
    command = [sys.executable, "-m", "convoy.server", "--repository", models, "--device", "cpu"]
    command += ["--port", "0", "--metrics-port", "0", "--log-format", "json"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        assert any('"loading"' in line for line in process.stderr)
        wait_until_busy(process.pid)
        process.terminate()
        log = process.stderr.read()
        assert process.wait(timeout=60) == 0
    assert "stopped while starting" in log


def test_stopped_while_it_starts_it_exits_with_0(publish):
    """Many versions keep it loading."""
    for number in range(1, 40):
        publish(number)
    models = publish(40).parent.parent
    command = [sys.executable, "-m", "convoy.server", "--repository", models, "--device", "cpu"]
    command += ["--port", "0", "--metrics-port", "0", "--version-policy", "all"]
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


# A process namespace of its own, as a container has.
FIRST = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def may_unshare() -> bool:
    if not shutil.which("unshare"):
        return False
    return subprocess.run([*FIRST, "true"], capture_output=True, check=False).returncode == 0


def first_process(unshare: subprocess.Popen[str]) -> int:
    """Return the number that the first process of the namespace has outside of it."""
    children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children")
    while not (pids := children.read_text().split()):
        time.sleep(0.001)
    return int(pids[0])


def catches_sigterm(pid: int) -> bool:
    """Whether the process has a handler for SIGTERM."""
    (mask,) = [
        line.split()[1]
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("SigCgt")
    ]
    return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)


def has_mapped(library: str) -> Callable[[int], bool]:
    return lambda pid: library in Path(f"/proc/{pid}/maps").read_text()


# Moments of the start: at its first line of code, in the imports, while the runtime is imported.
# None of them waits for time to pass.
MOMENTS = {
    "first line": catches_sigterm,
    "imports": has_mapped("pydantic_core"),
    "transport": has_mapped("h2corn"),
    "runtime": has_mapped("onnxruntime"),
}


@pytest.mark.skipif(not may_unshare(), reason="needs the right to make a process namespace")
@pytest.mark.parametrize("moment", MOMENTS)
def test_as_the_first_process_of_a_container_it_ends_at_any_moment_of_the_start(models, moment):
    command = [*FIRST, sys.executable, "-m", "convoy.server", "--repository", str(models)]
    command += ["--port", "0", "--metrics-port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        pid = first_process(process)
        while not (catches_sigterm(pid) and MOMENTS[moment](pid)):
            time.sleep(0.001)
        os.kill(pid, signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert process.stderr
        assert "Traceback" not in process.stderr.read()


@pytest.mark.skipif(not may_unshare(), reason="needs the right to make a process namespace")
def test_as_the_first_process_of_a_container_a_second_signal_ends_it_at_once(models):
    command = [*FIRST, sys.executable, "-m", "convoy.server", "--repository", str(models)]
    command += ["--port", "0", "--metrics-port", "0", "--device", "cpu", "--lame-duck-s", "600"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        pid = first_process(process)
        assert process.stderr
        for line in process.stderr:
            if "serving" in line:
                os.kill(pid, signal.SIGTERM)
            if "draining" in line:
                os.kill(pid, signal.SIGTERM)
                break
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
