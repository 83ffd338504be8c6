"""Front ends as processes: they die, hold versions, and end with their owner."""

import asyncio
import json
import os
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import numpy as np
import pytest

from convoy.oip.v2 import inference_pb2_grpc
from tests.chaos.traffic import Traffic, request_for
from tests.processes import GRPC_FLAGS, ServerProcess, run_module, running_server
from tests.server.conftest import HEIGHT, WIDTH

FLAGS = ("--device", "cpu", *GRPC_FLAGS["front ends"])
IMAGES = np.zeros((2, HEIGHT, WIDTH, 3), np.uint8)


def front_ends_of(server: ServerProcess) -> set[int]:
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    return {int(pid) for pid in children.read_text().split()}


def runs(pid: int) -> bool:
    """Whether a process has not ended; whoever adopts it may not reap it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def counted(server: ServerProcess, reason: str = "ok") -> float:
    """Requests that ended so, as /metrics shows them."""
    with urllib.request.urlopen(f"{server.metrics}/metrics") as reply:
        lines = reply.read().decode().splitlines()
    start = f'convoy_outcomes_total{{model="colors",reason="{reason}",'
    found = [line for line in lines if line.startswith(start)]
    return sum(float(line.split()[-1]) for line in found)


def shown(server: ServerProcess) -> dict:
    """What the page of one of the front ends shows."""
    with urllib.request.urlopen(f"{server.url}/ui/state?model=colors") as reply:
        return json.load(reply)


def example(server: ServerProcess, number: int) -> str | int:
    """The type of a golden sample that the page offers, or the status where there is none."""
    path = f"/ui/models/colors/versions/1/examples/{number}"
    try:
        with urllib.request.urlopen(server.url + path) as reply:
            return reply.headers["Content-Type"]
    except urllib.error.HTTPError as error:
        return error.code


async def until_counted(server: ServerProcess, requests: float) -> None:
    while counted(server) < requests:  # noqa: ASYNC110  the counts are another process's
        await asyncio.sleep(0.05)


async def test_a_front_end_that_is_killed_is_replaced_and_no_count_falls(publish):
    with running_server(publish().parent.parent, *FLAGS) as server:
        before = front_ends_of(server)
        assert len(before) == 2
        traffic = Traffic(server.address)
        async with traffic.flowing():
            await until_counted(server, 100)
            seen = counted(server)
            for pid in before:
                os.kill(pid, signal.SIGKILL)
            for pid in before:
                await asyncio.to_thread(server.wait_for, "front end ended", pid=pid)
            assert counted(server) >= seen
            await traffic.answers(100)
            await until_counted(server, seen + 100)
        assert not before & front_ends_of(server)
        # The pages of those in their place know what was before them, and the examples.
        while not all(shown(server)["traffic"]["window"]["answered"] > 100 for _ in range(8)):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        assert [model["examples"] for model in shown(server)["models"]] == [8]
        assert (example(server, 7), example(server, 8)) == ("image/png", 404)
        assert server.stop() == 0
    # The requests that the dead had in hand, and those that found nobody for a moment.
    assert set(traffic.tally.codes) <= {"OK", "UNAVAILABLE"}
    assert traffic.tally.wrong == 0


async def test_cancelled_requests_leave_the_memory_free(publish):
    """More are placed and given up than the memory has room for."""
    flags = (*FLAGS, "--max-queue-delay-ms", "600000", "--max-batch-size", "64")
    flags += ("--max-queue-mib", "0.1", "--max-message-mib", "0.1", "--max-request-images", "64")
    flags += ("--max-buffered-mib", "0.5")
    blocks = 512 // 4  # KiB
    request = request_for(np.zeros((32, HEIGHT, WIDTH, 3), np.uint8))
    with running_server(publish().parent.parent, *flags) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            infer = inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
            while counted(server, "cancelled") < 2 * blocks:
                call = infer(request)
                await asyncio.sleep(0.005)
                call.cancel()
            # Two of them fill a batch, if there is room for them.
            replies = await asyncio.gather(infer(request), infer(request))
        assert [reply.model_version for reply in replies] == ["1", "1"]


async def test_who_finds_the_server_ready_is_answered_by_every_front_end(publish):
    with running_server(publish().parent.parent, *FLAGS) as server:
        for _ in range(20):
            async with grpc.aio.insecure_channel(server.address) as channel:
                stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
                assert (await stub.ModelInfer(request_for(IMAGES))).model_version == "1"


def test_front_ends_end_with_an_owner_that_is_killed(publish):
    with running_server(publish().parent.parent, *FLAGS) as server:
        pids = front_ends_of(server)
        server.process.kill()
        server.process.wait()
        while any(map(runs, pids)):
            time.sleep(0.01)


def test_a_signal_to_the_whole_group_drains_as_one_to_the_owner(publish):
    with running_server(publish().parent.parent, *FLAGS) as server:
        for pid in front_ends_of(server):
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        with grpc.insecure_channel(server.address) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            assert stub.ModelInfer(request_for(IMAGES)).model_version == "1"
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--front-ends", "2", "--transport", "grpcio"), "expected also --transport h2corn"),
        (("--front-ends", "2", "--port", "{taken}"), "the port is in use"),
    ],
)
def test_what_cannot_be_is_said_at_the_start(publish, flags, message):
    models = publish().parent.parent
    with running_server(models, "--device", "cpu") as other:
        taken = other.address.rpartition(":")[2]
        flags = [flag.format(taken=taken) for flag in flags]
        if "--port" not in flags:
            flags += ["--port", "0"]
        result = run_module("convoy.server", "--repository", models, "--metrics-port", "0", *flags)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
