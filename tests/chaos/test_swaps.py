"""Versions come, go and turn out bad while real clients send requests to a real server."""

import asyncio
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.chaos.traffic import Traffic
from tests.processes import GRPC_FLAGS, running_server
from tests.server.conftest import seal


@pytest.mark.parametrize("transport", ["h2corn", "front ends"])
async def test_no_request_fails_while_versions_swap_every_second(publish, transport):
    models = publish(1).parent.parent
    flags = ("--device", "cpu", "--poll-s", "0.05", *GRPC_FLAGS[transport])
    with running_server(models, *flags) as server:
        traffic = Traffic(server.address)
        async with traffic.flowing():
            for version in range(2, 7):
                await traffic.answers(20)
                publish(version)
                await asyncio.to_thread(server.wait_for, "version switched", new=version)
                await traffic.answered_by(version)
        for version in range(1, 6):
            await asyncio.to_thread(server.wait_for, "version unloaded", version=version)
        assert server.stop() == 0
    assert set(traffic.tally.codes) == {"OK"}
    assert traffic.tally.wrong == 0
    assert set(traffic.tally.versions) == {"1", "2", "3", "4", "5", "6"}


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)


def cut_off(folder: Path) -> None:
    """As a full disk leaves it."""
    os.truncate(folder / "model.onnx", 100)


def answer_otherwise(folder: Path) -> None:
    """Whole and signed for, but not what was exported: only the golden samples can tell."""
    model = onnx.load(folder / "model.onnx")
    (scale,) = (tensor for tensor in model.graph.initializer if tensor.name == "scale")
    scale.CopyFrom(numpy_helper.from_array(np.array(254, np.float32), "scale"))
    onnx.save(model, folder / "model.onnx")
    seal(folder)


async def test_bad_versions_under_load_hurt_nobody(publish):
    models = publish(1).parent.parent
    with running_server(models, "--device", "cpu", "--poll-s", "0.05") as server:
        traffic = Traffic(server.address)
        async with traffic.flowing():
            for version, spoil in ((2, flip_a_bit), (3, cut_off), (4, answer_otherwise)):
                await traffic.answers(20)
                publish(version, spoil=spoil)
                await asyncio.to_thread(server.wait_for, "version rejected", version=version)
            await traffic.answers(20)
            publish(5)
            await asyncio.to_thread(server.wait_for, "version switched", new=5)
            await traffic.answered_by(5)
        assert server.stop() == 0
    assert set(traffic.tally.codes) == {"OK"}
    assert traffic.tally.wrong == 0
    assert set(traffic.tally.versions) == {"1", "5"}
    rejected = [
        (line["version"], line["reason"])
        for line in server.events
        if line["event"] == "version rejected"
    ]
    assert rejected == [(2, "files"), (3, "files"), (4, "golden samples")]
