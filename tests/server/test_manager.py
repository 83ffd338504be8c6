"""The live repository, with real files, real loading and a real event loop."""

import asyncio
import json
import shutil
import threading

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from server.backends.devices import Device
from server.backends.onnx import OnnxBackend
from server.backends.runtimes import Runtime
from server.batcher import BatchingLimits
from server.canary import CanaryLimits
from server.catalogue import ModelCatalogue, ServerState
from server.errors import ModelNotFoundError, RepositoryError, UnavailableError
from server.loading import LoadOptions, ModelLoader
from server.manager import ModelManager
from server.metrics import ServerMetrics
from server.policy import VersionPolicy
from server.refusals import Refusals
from server.repository import ModelRepository
from server.rollout import Rollout
from server.version_state import VersionState
from tests.server.conftest import change_samples, mean_colour_logits, seal

IMAGE = np.full((1, 4, 6, 3), 51, np.uint8)


class Live:
    """A model manager with what it acts on."""

    def __init__(
        self,
        root,
        policy: str = "latest:1",
        hang_timeout_s: float = 60.0,
        canary: CanaryLimits | None = None,
    ) -> None:
        self.root = root
        self.registry = CollectorRegistry()
        self.catalogue = ModelCatalogue()
        self.catalogue.state = ServerState.SERVING
        self.told: list[tuple[str, bool | None]] = []
        metrics = ServerMetrics(self.registry)
        limits = BatchingLimits(4, max_queue_size=16, hang_timeout_s=hang_timeout_s)
        options = LoadOptions(Runtime.ONNX_RUNTIME, (Device("cpu"),), 1, limits)
        self.manager = ModelManager(
            ModelRepository(root),
            VersionPolicy.parse(policy),
            ModelLoader(options, metrics),
            catalogue=self.catalogue,
            rollout=Rollout(self.catalogue, metrics, lambda *told: self.told.append(told)),
            refusals=Refusals(metrics.models),
            canary=canary,
        )

    @property
    def served(self) -> list[tuple[str, int]]:
        return [(model.name, model.version) for model in self.catalogue]

    def default(self, name: str = "colours") -> int:
        return self.catalogue.find(name).version

    def value(self, metric: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(metric, labels)

    def refusals(self, reason: str) -> float | None:
        return self.value("convoy_version_refusals_total", model="colours", reason=reason)


@pytest.fixture
async def live(publish, tmp_path):
    """Started on version 1 of `colours`."""
    publish(1)
    it = Live(tmp_path / "models")
    await it.manager.start()
    yield it
    await it.manager.close()


def promote(live: Live, version: int, *previous: int) -> None:
    policy = {"schema_version": 1, "version": version, "previous": previous}
    (live.root / "colours" / "policy.json").write_text(json.dumps(policy))


def damage(folder) -> None:
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)


async def state(live: Live, version: int) -> VersionState | None:
    return {s.version: s.state for s in await live.manager.index()}.get(version)


async def ended(live: Live, version: int) -> None:
    """Waits until a version that was taken out has ended, and checks that nothing is left of it."""
    while await state(live, version) is VersionState.UNLOADING:
        pass
    assert f'version="{version}"' not in generate_latest(live.registry).decode()


async def test_a_newer_version_takes_over_and_the_old_one_ends(live, publish):
    publish(2)
    await live.manager.refresh()
    assert live.served == [("colours", 2)]
    assert live.default() == 2
    assert live.value("convoy_version_swaps_total", model="colours") == 1
    assert live.value("convoy_model_ready", model="colours") == 1
    await ended(live, 1)
    with pytest.raises(ModelNotFoundError, match="served in version 2, got 1"):
        live.catalogue.find("colours", 1)


async def test_a_version_that_is_held_answers_after_the_swap_and_then_ends(live, publish):
    old = live.catalogue.find("colours")
    with old.users:
        publish(2)
        await live.manager.refresh()
        assert live.default() == 2
        # As a call does whose image took its time to decode.
        prediction = await old.batcher.infer(IMAGE)
        np.testing.assert_allclose(prediction.outputs.logits, mean_colour_logits(IMAGE), atol=1e-6)
        states = {s.version: s.state for s in await live.manager.index()}
        assert states == {1: VersionState.UNLOADING, 2: VersionState.READY}
    await ended(live, 1)
    with pytest.raises(UnavailableError):
        await old.batcher.infer(IMAGE)


async def test_a_bad_version_is_refused_once_and_the_old_one_serves_on(live, publish, capsys):
    folder = publish(2)
    damage(folder)
    for _ in range(3):
        await live.manager.refresh()
    assert live.served == [("colours", 1)]
    assert live.refusals("files") == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "version refused" in line]
    assert len(lines) == 1
    assert "model.onnx: expected SHA-256" in lines[0]
    (status,) = [s for s in await live.manager.index() if s.version == 2]
    assert status.state is VersionState.UNAVAILABLE
    assert "expected SHA-256" in status.reason


async def test_a_refused_version_is_tried_again_when_its_files_change(live, publish):
    folder = publish(2)
    damage(folder)
    await live.manager.refresh()
    assert live.default() == 1
    seal(folder)
    await live.manager.refresh()
    # The flipped bit was in a place that the runtime or the golden samples mind.
    assert live.refusals("files") == 1
    shutil.copy(live.root / "colours" / "1" / "model.onnx", folder / "model.onnx")
    seal(folder)
    await live.manager.refresh()
    assert live.default() == 2


async def break_manifest(folder):
    (folder / "manifest.json").write_text("{")


async def break_samples(folder):
    change_samples(folder, lambda arrays: arrays.update(logits=arrays["logits"] + np.float32(0.1)))


async def break_graph(folder):
    (folder / "model.onnx").write_bytes(b"not a graph")
    seal(folder)


@pytest.mark.parametrize(
    ("breaks", "reason"),
    [(break_manifest, "manifest"), (break_samples, "golden samples"), (break_graph, "graph")],
)
async def test_a_refusal_is_counted_by_its_reason(live, publish, breaks, reason):
    await breaks(publish(2))
    await live.manager.refresh()
    assert live.served == [("colours", 1)]
    assert live.refusals(reason) == 1


async def test_promotion_and_rollback_are_followed(live, publish):
    for version in (2, 3):
        publish(version)
    promote(live, 2, 1)
    await live.manager.refresh()
    assert live.served == [("colours", 2)]
    publish(4)
    await live.manager.refresh()
    assert live.served == [("colours", 2)]
    promote(live, 1)
    await live.manager.refresh()
    assert live.served == [("colours", 1)]
    (live.root / "colours" / "policy.json").unlink()
    await live.manager.refresh()
    assert live.served == [("colours", 4)]


async def test_a_promoted_version_that_is_bad_leaves_the_old_one_and_no_other(live, publish):
    publish(2)
    damage(publish(3))
    promote(live, 3)
    await live.manager.refresh()
    assert live.served == [("colours", 1)]
    promote(live, 7)
    for _ in range(2):
        await live.manager.refresh()
    assert live.served == [("colours", 1)]
    assert live.refusals("load") == 1


async def test_a_server_that_starts_beside_a_bad_version_serves_the_one_before(publish, tmp_path):
    """A restart must not end what a running server had survived."""
    publish(1)
    damage(publish(2))
    live = Live(tmp_path / "models")
    await live.manager.start()
    assert live.served == [("colours", 1)]
    assert live.refusals("files") == 1
    await live.manager.close()


async def test_a_model_without_a_good_version_ends_the_start(publish, tmp_path):
    publish(1, name="shades")
    damage(publish(1))
    live = Live(tmp_path / "models")
    with pytest.raises(RepositoryError, match="'colours' version 1"):
        await live.manager.start()
    await live.manager.close()


@pytest.mark.parametrize(
    ("policy", "served", "then"),
    [
        ("latest:1", [4], [5]),
        ("latest:2", [3, 4], [4, 5]),
        ("all", [1, 2, 3, 4], [1, 2, 3, 4, 5]),
    ],
)
async def test_a_policy_keeps_as_many_versions_as_it_says(publish, tmp_path, policy, served, then):
    for version in (1, 2, 3, 4):
        publish(version)
    live = Live(tmp_path / "models", policy)
    await live.manager.start()
    assert [version for _, version in live.served] == served
    assert live.default() == 4
    assert live.catalogue.find("colours", served[0]).version == served[0]
    publish(5)
    await live.manager.refresh()
    assert [version for _, version in live.served] == then
    assert live.default() == 5
    await live.manager.close()


async def test_specific_serves_only_what_was_promoted(publish, tmp_path):
    publish(1, name="shades")
    publish(1)
    publish(2)
    live = Live(tmp_path / "models", "specific")
    promote(live, 1)
    await live.manager.start()
    assert live.served == [("colours", 1)]
    await live.manager.close()


async def test_models_come_and_go(live, publish):
    publish(3, name="shades")
    await live.manager.refresh()
    assert live.served == [("colours", 1), ("shades", 3)]
    shutil.rmtree(live.root / "shades")
    await live.manager.refresh()
    assert live.served == [("colours", 1)]
    assert live.told == [("colours", True), ("shades", True), ("shades", None)]
    assert live.value("convoy_model_ready", model="shades") is None


async def test_a_repository_that_vanishes_is_no_wish_to_serve_nothing(live):
    live.root.rename(live.root.with_name("elsewhere"))
    for _ in range(2):
        await live.manager.refresh()
    assert live.served == [("colours", 1)]
    live.root.mkdir()
    await live.manager.refresh()
    assert live.served == [("colours", 1)]


async def test_a_version_that_is_being_written_is_not_seen(live, publish):
    folder = publish(2)
    hidden = folder.with_name(".2.x7f.partial")
    folder.rename(hidden)
    await live.manager.refresh()
    assert live.served == [("colours", 1)]
    hidden.rename(folder)
    await live.manager.refresh()
    assert live.served == [("colours", 2)]


async def test_unload_and_load_by_request(live):
    await live.manager.unload("colours")
    assert live.served == []
    await live.manager.refresh()
    assert live.served == []
    (status,) = await live.manager.index()
    assert (status.state.value, status.reason) in (
        ("UNLOADING", ""),
        ("UNAVAILABLE", "unloaded by request"),
    )
    await live.manager.load("colours")
    assert live.served == [("colours", 1)]
    with pytest.raises(ModelNotFoundError):
        await live.manager.unload("cats")
    with pytest.raises(ModelNotFoundError):
        await live.manager.load("../colours")


async def test_load_by_request_tries_a_refused_version_again_and_says_why_not(live, publish):
    damage(publish(2))
    await live.manager.refresh()
    with pytest.raises(UnavailableError, match=r"version 2: model\.onnx: expected SHA-256"):
        await live.manager.load("colours")
    assert live.refusals("files") == 2
    assert live.served == [("colours", 1)]


async def test_loading_leaves_the_event_loop_alone(live, publish, monkeypatch):
    """The loader is held up while requests are answered."""
    release = asyncio.Event()
    loop = asyncio.get_running_loop()
    load = ModelLoader.load

    def held_up(loader, folder):
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result()
        return load(loader, folder)

    monkeypatch.setattr(ModelLoader, "load", held_up)
    publish(2)
    refreshing = asyncio.create_task(live.manager.refresh())
    for _ in range(3):
        await live.catalogue.find("colours").batcher.infer(IMAGE)
    while await state(live, 2) is not VersionState.LOADING:
        pass
    assert live.default() == 1
    release.set()
    await refreshing
    assert live.default() == 2


async def test_a_run_that_hangs_makes_its_model_not_ready(publish, tmp_path, monkeypatch):
    hangs, gate = threading.Event(), threading.Event()
    run = OnnxBackend.run

    def run_or_hang(backend, images):
        if hangs.is_set():
            gate.wait()
        return run(backend, images)

    monkeypatch.setattr(OnnxBackend, "run", run_or_hang)
    publish()
    live = Live(tmp_path / "models", hang_timeout_s=2.0)
    await live.manager.start()
    model = live.catalogue.find("colours")
    await model.batcher.infer(IMAGE)
    hangs.set()
    with pytest.raises(UnavailableError, match="hangs"):
        await model.batcher.infer(IMAGE)
    assert live.told == [("colours", True), ("colours", False)]
    assert live.value("convoy_model_ready", model="colours") == 0
    gate.set()
    await live.manager.close()
