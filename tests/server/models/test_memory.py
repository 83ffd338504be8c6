"""Replaced and rejected versions are freed at once, without the garbage collector."""

import asyncio
import contextlib
import gc
import weakref
from collections.abc import AsyncIterator, Iterator

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from prometheus_client import generate_latest

from convoy.server.backends.onnx import OnnxBackend
from convoy.server.errors import UnavailableError
from tests.processes import running_server
from tests.server.conftest import change_samples, seal
from tests.server.models.test_manager import IMAGE, Live, ended

ROUNDS = 10
MIB = 1024 * 1024
WEIGHT_BYTES = 32 * MIB


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def backends(monkeypatch) -> list[weakref.ref[OnnxBackend]]:
    """Weak references to all backends that are loaded."""
    references: list[weakref.ref[OnnxBackend]] = []
    load = OnnxBackend.__init__

    def note(backend, *arguments, **options):
        references.append(weakref.ref(backend))
        load(backend, *arguments, **options)

    monkeypatch.setattr(OnnxBackend, "__init__", note)
    return references


def alive(references) -> int:
    return sum(reference() is not None for reference in references)


@pytest.fixture
async def live(publish, tmp_path, backends) -> AsyncIterator[Live]:
    publish(1)
    it = Live(tmp_path / "models")
    await it.manager.start()
    yield it
    await it.manager.close()


@contextlib.asynccontextmanager
async def load_on(live: Live) -> AsyncIterator[None]:
    """Keeps requests in flight, whichever version is the default."""

    async def ask() -> None:
        while True:
            # A call that found a version just before it ended fails; a lease would prevent it.
            with contextlib.suppress(UnavailableError):
                await live.models.find("colors").batcher.infer(IMAGE)

    tasks = [asyncio.create_task(ask()) for _ in range(4)]
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def idle(live: Live) -> AsyncIterator[None]:
    yield


@pytest.mark.parametrize("traffic", [idle, load_on])
async def test_replaced_versions_are_freed_at_once(live, publish, backends, no_collector, traffic):
    async with traffic(live):
        for version in range(2, 2 + ROUNDS):
            publish(version)
            await live.manager.refresh()
            generate_latest(live.registry)
            await ended(live, version - 1)
            await live.models.find("colors").batcher.infer(IMAGE)
            assert alive(backends) == 1
    assert len(backends) == 1 + ROUNDS


def spoil_answers(folder) -> None:
    change_samples(folder, lambda arrays: arrays.update(logits=arrays["logits"] + np.float32(0.1)))


def spoil_graph(folder) -> None:
    model = onnx.load(folder / "model.onnx")
    model.graph.output[0].name = "scores"
    for node in model.graph.node:
        node.input[:] = ["scores" if name == "logits" else name for name in node.input]
        node.output[:] = ["scores" if name == "logits" else name for name in node.output]
    onnx.save(model, folder / "model.onnx")
    seal(folder)


@pytest.mark.parametrize("traffic", [idle, load_on])
@pytest.mark.parametrize("spoil", [spoil_answers, spoil_graph])
async def test_rejected_versions_are_freed_at_once(
    live, publish, backends, no_collector, spoil, traffic
):
    async with traffic(live):
        for version in range(2, 2 + ROUNDS):
            publish(version, spoil=spoil)
            await live.manager.refresh()
            assert alive(backends) == 1
    assert live.default() == 1
    assert len(backends) == 1 + ROUNDS


def add_weights(folder) -> None:
    """Adds a large table that the answers look into, and do not depend on."""
    model = onnx.load(folder / "model.onnx")
    table = np.random.default_rng(0).random((WEIGHT_BYTES // 4096, 1024), np.float32)
    for name, value in (
        ("table", table),
        ("zero", np.float32(0)),
        ("second_axis", np.array([1])),
    ):
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    nodes = list(model.graph.node)
    (divide,) = (node for node in nodes if node.op_type == "Div")
    divide.output[0] = "means_of_1"
    make = onnx.helper.make_node
    nodes[nodes.index(divide) + 1 : 0] = [
        make("ArgMax", ["means_of_1"], ["row"], axis=1, keepdims=0),
        make("Gather", ["table", "row"], ["found"]),
        make("ReduceMean", ["found", "second_axis"], ["mean"]),
        make("Mul", ["mean", "zero"], ["nothing"]),
        make("Add", ["means_of_1", "nothing"], ["logits"]),
    ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, folder / "model.onnx")
    seal(folder)


def resident_bytes(process_id: int) -> int:
    with open(f"/proc/{process_id}/status", encoding="ascii") as status:
        (line,) = (line for line in status if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def spoil_both(folder) -> None:
    add_weights(folder)
    spoil_answers(folder)


def test_the_memory_of_a_server_stays_flat_over_replaced_and_rejected_versions(publish, tmp_path):
    publish(1, spoil=add_weights)
    flags = ("--device", "cpu", "--poll-s", "0.05")
    with running_server(tmp_path / "models", *flags, collector=False) as server:
        served, sizes = 1, []
        for version in range(2, 2 + 2 * ROUNDS, 2):
            publish(version, spoil=add_weights)
            server.wait_for("version switched", new=version)
            server.wait_for("version unloaded", version=served)
            served = version
            publish(version + 1, spoil=spoil_both)
            server.wait_for("version rejected", version=version + 1)
            sizes.append(resident_bytes(server.process.pid))
    # The allocator keeps a part of what the first rounds needed beside the version in service.
    assert max(sizes[2:]) - sizes[1] < WEIGHT_BYTES, [size // MIB for size in sizes]
