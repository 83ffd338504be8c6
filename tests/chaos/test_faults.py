"""Faults of every kind beside traffic that must not notice."""

import asyncio
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import inference_pb2_grpc
from tests.chaos.traffic import Traffic
from tests.processes import GRPC_FLAGS, ServerProcess, running_server
from tests.server.test_process import infer_request

FLAGS = ("--device", "cpu", "--poll-s", "0.05")

# Publishes by export's own code, and stops where its argument says.
PUBLISHER = """
import sys, time
from pathlib import Path
from convoy.export.repository import ModelFolder
from tests.server.conftest import publish_version
import shutil

repository, scratch, until = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def pause(at):
    if at == until:
        print("there", flush=True)
        time.sleep(600)

def seal(staged, version):
    whole = publish_version(scratch / "colors" / str(version))
    shutil.copy(whole / "manifest.json", staged)
    pause("manifest")

folder = ModelFolder(repository, "colors")
with folder.stage() as staged:
    pause("staged")
    whole = publish_version(scratch / "draft" / "1")
    shutil.copy(whole / "model.onnx", staged)
    pause("model")
    shutil.copy(whole / "samples.npz", staged)
    print("published", folder.publish(staged, seal), flush=True)
"""


def publisher(models: Path, scratch: Path, until: str, **options) -> subprocess.Popen[str]:
    scratch.mkdir()
    command = [sys.executable, "-c", PUBLISHER, str(models), str(scratch), until]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


async def test_a_publisher_killed_at_any_point_leaves_nothing_to_see(publish, tmp_path):
    models = publish(1).parent.parent
    with running_server(models, *FLAGS) as server:
        traffic = Traffic(server.address)
        async with traffic.flowing():
            for until in ("staged", "model", "manifest"):
                with publisher(models, tmp_path / f"scratch-{until}", until) as process:
                    assert process.stdout
                    assert await asyncio.to_thread(process.stdout.readline) == "there\n"
                    process.kill()
                await traffic.answers(10)
            with publisher(models, tmp_path / "whole", "never") as process:
                assert process.stdout
                assert await asyncio.to_thread(process.stdout.readline) == "published 2\n"
            await asyncio.to_thread(server.wait_for, "version switched", new=2)
            await traffic.answers(10)
        assert server.stop() == 0
    assert set(traffic.tally.codes) == {"OK"}
    assert not [line for line in server.events if "rejected" in str(line["event"])]


async def test_a_full_disk_under_the_publisher_publishes_nothing(publish, tmp_path):
    """A limit on the size of files stands for the full disk: writes fail in the middle alike."""
    models = publish(1).parent.parent

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))

    with running_server(models, *FLAGS) as server:
        traffic = Traffic(server.address)
        async with traffic.flowing():
            with publisher(
                models, tmp_path / "full", "never", preexec_fn=limit, stderr=subprocess.PIPE
            ) as process:
                _, complaint = await asyncio.to_thread(process.communicate)
            assert "File too large" in complaint
            await traffic.answers(20)
        assert server.stop() == 0
    assert set(traffic.tally.codes) == {"OK"}
    assert [path.name for path in (models / "colors").iterdir()] == ["1"]


def test_a_log_that_cannot_be_written_stops_neither_answers_nor_swaps(publish):
    """/dev/full fails every write as a full disk does."""
    models = publish(1).parent.parent
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "convoy.server", "--repository", models, *FLAGS]
    command += ["--port", str(port), "--metrics-port", "0"]
    with (
        open("/dev/full", "w") as full,
        subprocess.Popen(
            [*command, "--port", str(port), "--metrics-port", "0"], stderr=full
        ) as server,
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)

        def version() -> str:
            return stub.ModelInfer(infer_request(), wait_for_ready=True, timeout=60).model_version

        while not stub.ServerReady(pb.ServerReadyRequest(), wait_for_ready=True).ready:
            pass
        assert version() == "1"
        publish(2)
        while version() != "2":
            pass
        server.terminate()
        assert server.wait(timeout=60) == 0


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@pytest.mark.parametrize("transport", GRPC_FLAGS)
async def test_slow_and_vanishing_clients_do_not_disturb_the_others(publish, transport):
    with running_server(publish(1).parent.parent, *FLAGS, *GRPC_FLAGS[transport]) as server:
        host, port = server.address.split(":")
        slow = []
        traffic = Traffic(server.address)
        async with traffic.flowing():
            # Some say nothing, some half a preface, some a preface and half a frame.
            for number in range(60):
                connection = socket.create_connection((host, int(port)))
                connection.sendall((b"", PREFACE[:7], PREFACE + b"\x00\x00")[number % 3])
                slow.append(connection)
            await asyncio.gather(*(vanish(server) for _ in range(3)))
            await traffic.answers(40)
            for connection in slow:
                connection.close()
            await traffic.answers(20)
        assert server.stop() == 0
    assert set(traffic.tally.codes) == {"OK"}
    assert traffic.tally.wrong == 0


async def vanish(server: ServerProcess) -> None:
    """Sends a request and tears the connection down without a word."""
    script = (
        "import grpc, os, sys; import numpy as np\n"
        "from convoy.oip.v2 import inference_pb2_grpc\n"
        "from tests.chaos.traffic import request_for\n"
        "channel = grpc.insecure_channel(sys.argv[1])\n"
        "stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)\n"
        "images = np.zeros((3, 4, 6, 3), np.uint8)\n"
        "stub.ModelInfer(request_for(images))\n"
        "calls = [stub.ModelInfer.future(request_for(images)) for _ in range(20)]\n"
        "os._exit(0)\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, server.address)
    assert await process.wait() == 0


@pytest.mark.parametrize("transport", ["h2corn", "front ends"])
async def test_sigterm_under_load_loses_nothing_that_was_accepted(publish, transport):
    with running_server(publish(1).parent.parent, *FLAGS, *GRPC_FLAGS[transport]) as server:
        traffic = Traffic(server.address)
        async with traffic.flowing(callers=8):
            await traffic.answers(50)
            server.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(server.process.wait, 60) == 0
    assert set(traffic.tally.codes) <= {"OK", "UNAVAILABLE"}
    assert traffic.tally.wrong == 0
