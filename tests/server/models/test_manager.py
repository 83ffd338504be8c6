"""The live repository, with real files, real loading and a real event loop."""

import asyncio
import contextlib
import errno
import json
import os
import shutil
import threading

import numpy as np
import onnx
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from convoy.server.backends.device import Device, Runtime
from convoy.server.backends.onnx import OnnxBackend
from convoy.server.batching import BatchingLimits, Health
from convoy.server.errors import (
    InferenceError,
    ModelNotFoundError,
    RepositoryError,
    UnavailableError,
    UnreadableError,
)
from convoy.server.metrics.readiness import ReadinessCollector
from convoy.server.metrics.requests import ServerMetrics
from convoy.server.models import manager
from convoy.server.models.canary import CanaryLimits
from convoy.server.models.loader import LoadOptions, ModelLoader
from convoy.server.models.manager import ModelManager
from convoy.server.models.policy import VersionPolicy
from convoy.server.models.readiness import ServerState
from convoy.server.models.registry import ModelRegistry
from convoy.server.models.repository import ModelRepository
from convoy.server.models.versions import RejectedVersions, VersionState, VersionSwitch
from tests.server.conftest import change_samples, mean_color_logits, mount, seal

IMAGE = np.full((1, 4, 6, 3), 51, np.uint8)


class Live:
    """A model manager with what it acts on."""

    def __init__(
        self,
        root,
        policy: str = "latest:1",
        hang_timeout_s: float = 60.0,
        canary: CanaryLimits | None = None,
        repository: ModelRepository | None = None,
        **options: object,
    ) -> None:
        self.root = root
        repository = repository or ModelRepository(root)
        self.registry = CollectorRegistry()
        self.models = ModelRegistry()
        self.models.state = ServerState.SERVING
        # Whether each model was ready, after each change of that.
        self.seen: list[dict[str, bool]] = [{}]
        self.models.watch(self._look)
        self.registry.register(ReadinessCollector(self.models))
        metrics = ServerMetrics(self.registry)
        limits = BatchingLimits(4, max_queue_size=16, hang_timeout_s=hang_timeout_s)
        load_options = LoadOptions(Runtime.ONNX_RUNTIME, (Device("cpu"),), 1, limits)
        self.manager = ModelManager(
            repository,
            VersionPolicy.parse(policy),
            ModelLoader(load_options, metrics),
            models=self.models,
            switch=VersionSwitch(self.models, metrics),
            rejections=RejectedVersions(metrics.models, fingerprint=repository.fingerprint),
            canary=canary,
            **options,
        )

    def _look(self) -> None:
        now = dict(self.models.readiness.models)
        if now != self.seen[-1]:
            self.seen.append(now)

    @property
    def served(self) -> list[tuple[str, int]]:
        return [(model.name, model.version) for model in self.models]

    def default(self, name: str = "colors") -> int:
        return self.models.find(name).version

    def value(self, metric: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(metric, labels)

    def rejections(self, reason: str) -> float | None:
        return self.value("convoy_rejected_versions_total", model="colors", reason=reason)


@pytest.fixture
async def live(publish, tmp_path):
    """Started on version 1 of `colors`."""
    publish(1)
    it = Live(tmp_path / "models")
    await it.manager.start()
    yield it
    await it.manager.close()


def promote(live: Live, version: int, *previous: int) -> None:
    policy = {"schema_version": 1, "version": version, "previous": previous}
    (live.root / "colors" / "policy.json").write_text(json.dumps(policy))


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
    assert live.served == [("colors", 2)]
    assert live.default() == 2
    assert live.value("convoy_version_swaps_total", model="colors") == 1
    assert live.value("convoy_model_ready", model="colors") == 1
    await ended(live, 1)
    with pytest.raises(ModelNotFoundError, match="served in version 2, got 1"):
        live.models.find("colors", 1)


async def test_a_version_that_is_held_answers_after_the_swap_and_then_ends(live, publish):
    old = live.models.find("colors")
    with old.lease():
        publish(2)
        await live.manager.refresh()
        assert live.default() == 2
        # As a call does whose image took its time to decode.
        prediction = await old.batcher.infer(IMAGE)
        np.testing.assert_allclose(prediction.outputs.logits, mean_color_logits(IMAGE), atol=1e-6)
        states = {s.version: s.state for s in await live.manager.index()}
        assert states == {1: VersionState.UNLOADING, 2: VersionState.READY}
    await ended(live, 1)
    with pytest.raises(UnavailableError):
        await old.batcher.infer(IMAGE)


async def test_a_bad_version_is_rejected_once_and_the_old_one_keeps_serving(live, publish, capsys):
    folder = publish(2)
    damage(folder)
    for _ in range(3):
        await live.manager.refresh()
    assert live.served == [("colors", 1)]
    assert live.rejections("files") == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "version rejected" in line]
    assert len(lines) == 1
    assert "model.onnx: expected SHA-256" in lines[0]
    (status,) = [s for s in await live.manager.index() if s.version == 2]
    assert status.state is VersionState.UNAVAILABLE
    assert "expected SHA-256" in status.reason


async def test_a_rejected_version_is_loaded_again_when_its_files_change(live, publish):
    folder = publish(2)
    damage(folder)
    await live.manager.refresh()
    assert live.default() == 1
    seal(folder)
    await live.manager.refresh()
    # The flipped bit was in a place that the runtime or the golden samples mind.
    assert live.rejections("files") == 1
    shutil.copy(live.root / "colors" / "1" / "model.onnx", folder / "model.onnx")
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
async def test_a_rejection_is_counted_by_its_reason(live, publish, breaks, reason):
    await breaks(publish(2))
    await live.manager.refresh()
    assert live.served == [("colors", 1)]
    assert live.rejections(reason) == 1


async def test_promotion_and_rollback_are_followed(live, publish):
    for version in (2, 3):
        publish(version)
    promote(live, 2, 1)
    await live.manager.refresh()
    assert live.served == [("colors", 2)]
    publish(4)
    await live.manager.refresh()
    assert live.served == [("colors", 2)]
    promote(live, 1)
    await live.manager.refresh()
    assert live.served == [("colors", 1)]
    (live.root / "colors" / "policy.json").unlink()
    await live.manager.refresh()
    assert live.served == [("colors", 4)]


async def test_a_promoted_version_that_is_bad_leaves_the_old_one_and_no_other(live, publish):
    publish(2)
    damage(publish(3))
    promote(live, 3)
    await live.manager.refresh()
    assert live.served == [("colors", 1)]
    promote(live, 7)
    for _ in range(2):
        await live.manager.refresh()
    assert live.served == [("colors", 1)]
    assert live.rejections("load") == 1


async def test_a_server_that_starts_beside_a_bad_version_serves_the_one_before(publish, tmp_path):
    """A restart must not end what a running server had survived."""
    publish(1)
    damage(publish(2))
    live = Live(tmp_path / "models")
    await live.manager.start()
    assert live.served == [("colors", 1)]
    assert live.rejections("files") == 1
    await live.manager.close()


async def test_good_models_start_although_another_is_bad(publish, tmp_path):
    publish(1, name="shades")
    folder = publish(1)
    damage(folder)
    live = Live(tmp_path / "models")
    await live.manager.start()
    assert live.served == [("shades", 1)]
    assert live.rejections("files") == 1
    shutil.rmtree(folder)
    publish(1)
    await live.manager.refresh()
    assert live.served == [("colors", 1), ("shades", 1)]
    await live.manager.close()


async def test_exit_on_error_ends_the_start_with_a_model_without_a_good_version(publish, tmp_path):
    publish(1, name="shades")
    damage(publish(1))
    live = Live(tmp_path / "models", exit_on_error=True)
    with pytest.raises(RepositoryError, match="'colors' version 1"):
        await live.manager.start()
    await live.manager.close()


@pytest.mark.parametrize("exit_on_error", [False, True])
async def test_a_policy_that_names_a_pruned_version_leaves_the_one_before(
    publish, tmp_path, exit_on_error
):
    publish(1, name="shades")
    for version in (1, 2):
        publish(version)
    live = Live(tmp_path / "models", exit_on_error=exit_on_error)
    promote(live, 3, 1)
    if exit_on_error:
        with pytest.raises(RepositoryError, match="names version 3, found 1, 2"):
            await live.manager.start()
    else:
        await live.manager.start()
        assert live.served == [("colors", 1), ("shades", 1)]
        await live.manager.refresh()
        assert live.served == [("colors", 1), ("shades", 1)]
    await live.manager.close()


async def test_an_empty_repository_waits_for_a_model_and_is_not_ready(publish, tmp_path, capsys):
    (tmp_path / "models").mkdir()
    live = Live(tmp_path / "models")
    await live.manager.start()
    assert "no model is in service yet" in capsys.readouterr().out
    assert not live.models.readiness.ready
    publish(1)
    await live.manager.refresh()
    assert live.models.readiness.ready
    assert live.default() == 1
    await live.manager.close()


async def test_the_cause_of_a_rejection_is_in_the_log_and_in_the_index(live, publish, capsys):
    def empty_graph(folder):
        model = onnx.load(folder / "model.onnx")
        del model.graph.node[0]
        onnx.save(model, folder / "model.onnx")
        seal(folder)

    publish(2, spoil=empty_graph)
    await live.manager.refresh()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "version rejected" in line]
    (status,) = [s for s in await live.manager.index() if s.version == 2]
    for text in (line, status.reason):
        assert "ONNX Runtime cannot load it: " in text
        # What the runtime itself says: the input of a node that is missing.
        assert "pixels" in text


class Stuck:
    """Holds up the loading of some models until it is opened, then continues it."""

    def __init__(self, monkeypatch, *names: str) -> None:
        self.gate = threading.Event()
        load = ModelLoader.load

        def held_up(loader, folder):
            if folder.parent.name in names:
                self.gate.wait()
            return load(loader, folder)

        monkeypatch.setattr(ModelLoader, "load", held_up)
        monkeypatch.setattr(manager, "_TURN_TIMEOUT_S", 0.05)


async def test_a_load_that_never_ends_blocks_nothing_else(live, publish, monkeypatch):
    stuck = Stuck(monkeypatch, "stuck")
    publish(1, name="stuck")
    publish(1, name="shades")
    await live.manager._begin_updates()
    # Another model loads, is replaced, rolled back and unloaded meanwhile.
    publish(2)
    await live.manager.load("shades")
    await live.manager.load("colors")
    assert live.default("shades") == 1
    assert live.default() == 2
    promote(live, 1)
    await live.manager.load("colors")
    assert live.default() == 1
    await live.manager.unload("shades")
    states = {s.model: s.state for s in await live.manager.index()}
    assert states["stuck"] is VersionState.LOADING
    # So does a request to unload the model itself.
    await live.manager.unload("stuck")
    (status,) = [s for s in await live.manager.index() if s.model == "stuck"]
    assert (status.state, status.reason) == (VersionState.UNAVAILABLE, "unloaded by request")
    stuck.gate.set()


async def test_a_load_that_never_ends_does_not_keep_the_manager_open(live, publish, monkeypatch):
    stuck = Stuck(monkeypatch, "stuck")
    publish(1, name="stuck")
    await live.manager._begin_updates()
    await asyncio.wait_for(live.manager.close(), timeout=30)
    stuck.gate.set()


async def test_a_load_that_takes_too_long_is_rejected_and_freed(publish, tmp_path, monkeypatch):
    stuck = Stuck(monkeypatch, "stuck")
    closed = threading.Event()
    monkeypatch.setattr(OnnxBackend, "close", lambda backend: closed.set())
    publish(1, name="stuck")
    publish(1)
    live = Live(tmp_path / "models", load_timeout_s=0.3)
    await live.manager.start()
    assert live.served == [("colors", 1)]
    (status,) = [s for s in await live.manager.index() if s.model == "stuck"]
    assert status.state is VersionState.UNAVAILABLE
    assert "loading took more than 0.3 s" in status.reason
    assert live.value("convoy_rejected_versions_total", model="stuck", reason="timeout") == 1
    stuck.gate.set()
    assert await asyncio.to_thread(closed.wait, 30)
    await live.manager.close()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("call", ["scandir", "open", "lstat"])
async def test_an_error_of_the_storage_keeps_the_version_in_service(
    live, publish, monkeypatch, code, call
):
    publish(2)
    real, broken = getattr(os, call), True
    colors = str(live.root / "colors")

    def fail(path, *arguments, **options):
        if broken and str(path).startswith(colors):
            raise OSError(code, os.strerror(code))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, call, fail)
    for _ in range(2):
        await live.manager.refresh()
        assert live.served == [("colors", 1)]
    name = errno.errorcode[code]
    assert live.value("convoy_repository_errors_total", model="colors", error=name) >= 1
    broken = False
    # What could not be read is not rejected for good.
    await live.manager.load("colors")
    assert live.default() == 2


async def test_an_unreadable_version_is_loaded_again_after_a_while(tmp_path):
    now_s = 0.0
    rejections = RejectedVersions(ServerMetrics(CollectorRegistry()).models, lambda: now_s)
    folder = tmp_path / "colors" / "1"
    for expected_s in (2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0):
        rejected = rejections.add(folder, UnreadableError("model", "EIO"), ())
        assert rejections.still_holds(rejected)
        assert rejected.retry_at_s == now_s + expected_s
        now_s = rejected.retry_at_s
        assert not rejections.still_holds(rejected)


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
    assert live.models.find("colors", served[0]).version == served[0]
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
    assert live.served == [("colors", 1)]
    await live.manager.close()


async def test_models_come_and_go(live, publish):
    publish(3, name="shades")
    await live.manager.refresh()
    assert live.served == [("colors", 1), ("shades", 3)]
    shutil.rmtree(live.root / "shades")
    await live.manager.refresh()
    assert live.served == [("colors", 1)]
    both = {"colors": True, "shades": True}
    assert live.seen == [{}, {"colors": True}, both, {"colors": True}]
    assert live.value("convoy_model_ready", model="shades") is None


async def test_a_repository_that_vanishes_unloads_no_model(live):
    live.root.rename(live.root.with_name("elsewhere"))
    for _ in range(2):
        await live.manager.refresh()
    assert live.served == [("colors", 1)]
    live.root.mkdir()
    await live.manager.refresh()
    assert live.served == [("colors", 1)]


async def test_a_version_that_is_being_written_is_not_seen(live, publish):
    folder = publish(2)
    hidden = folder.with_name(".2.x7f.partial")
    folder.rename(hidden)
    await live.manager.refresh()
    assert live.served == [("colors", 1)]
    hidden.rename(folder)
    await live.manager.refresh()
    assert live.served == [("colors", 2)]


async def test_unload_and_load_by_request(live):
    await live.manager.unload("colors")
    assert live.served == []
    await live.manager.refresh()
    assert live.served == []
    (status,) = await live.manager.index()
    assert (status.state.value, status.reason) in (
        ("UNLOADING", ""),
        ("UNAVAILABLE", "unloaded by request"),
    )
    await live.manager.load("colors")
    assert live.served == [("colors", 1)]
    with pytest.raises(ModelNotFoundError):
        await live.manager.unload("cats")
    with pytest.raises(ModelNotFoundError):
        await live.manager.load("../colors")


async def test_load_by_request_loads_a_rejected_version_again_and_says_why_not(live, publish):
    damage(publish(2))
    await live.manager.refresh()
    with pytest.raises(UnavailableError, match=r"version 2: model\.onnx: expected SHA-256"):
        await live.manager.load("colors")
    assert live.rejections("files") == 2
    assert live.served == [("colors", 1)]


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
        await live.models.find("colors").batcher.infer(IMAGE)
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
    model = live.models.find("colors")
    await model.batcher.infer(IMAGE)
    hangs.set()
    with pytest.raises(UnavailableError, match="hangs"):
        await model.batcher.infer(IMAGE)
    assert live.seen == [{}, {"colors": True}, {"colors": False}]
    assert not live.models.readiness.live
    assert live.value("convoy_model_ready", model="colors") == 0
    gate.set()
    await live.manager.close()


async def becomes(live: Live, health: Health) -> None:
    """Sends requests until the version in service is in that health."""
    batcher = live.models.find("colors").batcher
    while batcher.health is not health:
        with contextlib.suppress(InferenceError, UnavailableError):
            await batcher.infer(IMAGE)
        await asyncio.sleep(0.001)


async def test_a_version_that_fails_every_run_is_seen_and_recovers(spoiled, live, capsys):
    spoiled.backends.update(live.models.find("colors").backends)
    await becomes(live, Health.FAILING)
    reason = "every run fails: RuntimeError: the device is lost"
    (status,) = await live.manager.index()
    assert (status.state, status.reason) == (VersionState.UNAVAILABLE, reason)
    labels = {"model": "colors", "version": "1"}
    assert live.value("convoy_version_healthy", **labels) == 0
    assert live.value("convoy_model_ready", model="colors") == 0
    (line,) = [s for s in capsys.readouterr().out.splitlines() if "version is not healthy" in s]
    assert reason in line
    spoiled.backends.clear()
    await becomes(live, Health.HEALTHY)
    assert "version is healthy again" in capsys.readouterr().out
    (status,) = await live.manager.index()
    assert (status.state, status.reason) == (VersionState.READY, "")
    assert live.value("convoy_version_healthy", **labels) == 1
    assert live.seen == [{}, {"colors": True}, {"colors": False}, {"colors": True}]
    # A version whose every run fails is unloaded like any other.
    spoiled.backends.update(live.models.find("colors").backends)
    await becomes(live, Health.FAILING)
    await live.manager.unload("colors")


async def test_batches_that_do_not_fit_are_seen(spoiled, live, capsys):
    model = live.models.find("colors")
    labels = {"model": "colors", "version": "1"}
    full_size = model.batcher.snapshot().max_batch_size
    images = np.repeat(IMAGE, full_size, axis=0)
    assert live.value("convoy_max_batch_size_images", **labels) == full_size > 1
    spoiled.memory_images = 1
    prediction = await model.batcher.infer(images)
    np.testing.assert_allclose(prediction.outputs.logits, mean_color_logits(images), atol=1e-6)
    assert live.value("convoy_max_batch_size_images", **labels) == 1
    assert live.value("convoy_out_of_memory_batches_total", **labels) == 1
    assert "no memory for larger ones" in capsys.readouterr().out


async def test_a_version_serves_with_the_largest_batch_that_the_warm_up_found_room_for(
    spoiled, publish, tmp_path, capsys
):
    spoiled.memory_images = 2
    publish()
    live = Live(tmp_path / "models")
    await live.manager.start()
    assert live.models.find("colors").batcher.limits.max_batch_size <= 2
    (line,) = [s for s in capsys.readouterr().out.splitlines() if "no memory for larger" in s]
    assert "images=4" in line
    await live.manager.close()


async def test_a_version_mounted_by_kubernetes_is_served_and_its_replacement_noticed(
    publish, tmp_path
):
    folder = publish()
    mount(folder, "..2026_11_29")
    damaged = folder / "..2026_11_29" / "model.onnx"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1])
    live = Live(tmp_path / "models")
    await live.manager.start()
    assert live.served == []
    (folder / "..2026_11_30").mkdir()
    for path in (folder / "..2026_11_29").iterdir():
        shutil.copy(path, folder / "..2026_11_30" / path.name)
    (folder / "..2026_11_30" / "model.onnx").write_bytes(content)
    (folder / "..next").symlink_to("..2026_11_30")
    (folder / "..next").replace(folder / "..data")
    await live.manager.refresh()
    assert live.served == [("colors", 1)]
    await live.manager.close()
