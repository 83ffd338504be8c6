"""Trials of new versions on live requests, with real models and batchers."""

import asyncio
import errno
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import numpy_helper

from convoy.server.batching import Health
from convoy.server.errors import InferenceError, OverloadedError, UnavailableError
from convoy.server.models.canary import CanaryLimits, CanaryTrial, Verdict, VerdictRecords
from convoy.server.models.versions import VersionState
from convoy.server.requests import Outputs, Prediction
from tests.server.conftest import change_samples, mean_color_logits, seal
from tests.server.models.test_manager import Live, becomes, ended, promote, state

LIMITS = CanaryLimits(share=0.5, requests=20, timeout_s=60, max_slowdown=1000)


def swap_red_and_blue(folder) -> None:
    """A version with other answers that are its own: its golden samples agree with it."""
    model = onnx.load(folder / "model.onnx")
    for node in model.graph.node:
        if node.op_type == "Div":
            node.output[0] = "swapped"
    order = numpy_helper.from_array(np.array([2, 1, 0], np.int64), "order")
    model.graph.initializer.append(order)
    gather = onnx.helper.make_node("Gather", ["swapped", "order"], ["logits"], axis=1)
    model.graph.node.insert(3, gather)
    onnx.save(model, folder / "model.onnx")
    change_samples(folder, lambda arrays: arrays.update(logits=arrays["logits"][:, ::-1]))


def relabel(folder) -> None:
    """The same answers under the same names, with the classes in another order."""
    swap_red_and_blue(folder)
    seal(folder, labels=["blue", "green", "red"])


@pytest.fixture
async def live(publish, tmp_path):
    publish(1)
    it = Live(tmp_path / "models", canary=LIMITS)
    await it.manager.start()
    yield it
    await it.manager.close()


async def answer(live: Live, count: int) -> set[int]:
    """Sends requests and returns the versions that answered; every answer is checked."""
    random = np.random.default_rng(3)
    versions = set()
    for _ in range(count):
        images = random.integers(0, 256, (2, 4, 6, 3), np.uint8)
        model = live.models.find("colors")
        prediction = await model.batcher.infer(images)
        np.testing.assert_allclose(prediction.outputs.logits, mean_color_logits(images), atol=1e-5)
        versions.add(model.version)
    return versions


async def test_a_good_canary_takes_over_after_its_trial(live, publish):
    publish(2)
    await live.manager.refresh()
    assert live.default() == 1
    assert live.served == [("colors", 1), ("colors", 2)]
    while live.default() == 1:
        await answer(live, 1)
    assert live.value("convoy_version_swaps_total", model="colors") == 1
    assert live.value("convoy_rollbacks_total", model="colors", reason="disagreement") is None
    while await state(live, 1) is VersionState.READY:
        pass
    await ended(live, 1)


async def test_a_canary_that_disagrees_is_rolled_back_and_answered_nobody(live, publish):
    publish(2, spoil=swap_red_and_blue)
    await live.manager.refresh()
    while await state(live, 2) is VersionState.READY:
        assert await answer(live, 1) == {1}
    assert live.value("convoy_rollbacks_total", model="colors", reason="disagreement") == 1
    await live.manager.refresh()
    assert live.served == [("colors", 1)]
    (status,) = [s for s in await live.manager.index() if s.version == 2]
    assert status.reason in ("", "the canary failed: disagreement")


async def test_a_version_that_was_rolled_back_stays_so_after_a_restart(publish, tmp_path):
    publish(1)
    records = VerdictRecords(tmp_path / "state")
    first = Live(tmp_path / "models", canary=LIMITS, verdicts=records)
    await first.manager.start()
    folder = publish(2, spoil=swap_red_and_blue)
    await first.manager.refresh()
    while await asyncio.to_thread(records.find, folder) is None:
        assert await answer(first, 1) == {1}
    await first.manager.close()
    # Another process, or another replica with the same state.
    second = Live(tmp_path / "models", canary=LIMITS, verdicts=VerdictRecords(tmp_path / "state"))
    await second.manager.start()
    assert second.served == [("colors", 1)]
    (status,) = [s for s in await second.manager.index() if s.version == 2]
    assert status.reason == "the canary failed in an earlier trial: disagreement"
    assert second.rejections("canary") == 1
    # Published again under the same number it is another version.
    shutil.rmtree(folder)
    publish(2)
    await second.manager.refresh()
    while second.default() == 1:
        await answer(second, 1)
    await second.manager.close()


async def restarted(tmp_path, verdicts: VerdictRecords | None = None) -> Live:
    live = Live(tmp_path / "models", canary=LIMITS, verdicts=verdicts)
    await live.manager.start()
    return live


async def roll_back(live: Live, folder) -> None:
    """Has a version that disagrees tried, until it is rolled back."""
    await live.manager.refresh()
    while await state(live, int(folder.name)) is VersionState.READY:
        assert await answer(live, 1) == {1}
    await live.manager.refresh()


async def test_a_verdict_is_kept_beside_the_version_for_every_replica(publish, tmp_path):
    publish(1)
    first = await restarted(tmp_path, VerdictRecords())
    await roll_back(first, publish(2, spoil=swap_red_and_blue))
    # It is none of the files of the version, which would be loaded again if one changed.
    await first.manager.refresh()
    assert first.served == [("colors", 1)]
    await first.manager.close()
    record = json.loads((tmp_path / "models" / "colors" / "2.canary.json").read_text())
    assert (record["verdict"], "signature" in record) == ("disagreement", False)
    second = await restarted(tmp_path, VerdictRecords())
    assert second.served == [("colors", 1)]
    assert second.rejections("canary") == 1
    await second.manager.close()


async def test_without_room_for_a_record_a_start_tries_the_newest_against_the_last_good_one(
    publish, tmp_path, monkeypatch, capsys
):
    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", read_only)
    publish(1)
    first = await restarted(tmp_path, VerdictRecords())
    await roll_back(first, publish(2, spoil=swap_red_and_blue))
    await first.manager.close()
    assert "canary record cannot be written; --state-dir" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "models" / "colors").iterdir())
    assert names == ["1", "2"]
    second = await restarted(tmp_path, VerdictRecords())
    assert second.default() == 1
    assert second.served == [("colors", 1), ("colors", 2)]
    await second.manager.close()


@pytest.fixture
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def test_a_record_is_believed_if_it_is_signed_by_the_key(publish, key, capsys):
    folder, other = publish(1), publish(2)
    shutil.copy(folder / "manifest.json", other / "manifest.json")
    signed = VerdictRecords(key=key)
    signed.record(folder, Verdict.LATENCY)
    assert signed.find(folder) is Verdict.LATENCY
    assert VerdictRecords(key=Ed25519PrivateKey.generate()).find(folder) is None
    path = folder.parent / "1.canary.json"
    written = path.read_text()
    # As the record of another version, even one with the same manifest, it does not count.
    (folder.parent / "2.canary.json").write_text(written)
    assert signed.find(other) is None
    path.write_text(written.replace("latency", "good"))
    assert signed.find(folder) is None
    VerdictRecords().record(folder, Verdict.GOOD)
    assert signed.find(folder) is None
    assert capsys.readouterr().out.count("expected a signature by --record-key") == 4
    # Where no signature is asked for, none is looked at.
    assert VerdictRecords().find(folder) is Verdict.GOOD


async def test_a_signed_verdict_lasts(publish, tmp_path, key):
    publish(1)
    first = await restarted(tmp_path, VerdictRecords(tmp_path / "state", key))
    folder = publish(2, spoil=swap_red_and_blue)
    await roll_back(first, folder)
    await first.manager.close()
    second = await restarted(tmp_path, VerdictRecords(tmp_path / "state", key))
    assert second.served == [("colors", 1)]
    # An operator may have it tried again.
    await second.manager.load("colors")
    assert second.served == [("colors", 1), ("colors", 2)]
    await second.manager.close()


async def test_without_a_record_a_start_serves_the_version_before_and_tries_the_newest(
    publish, tmp_path
):
    publish(1)
    publish(2)
    live = await restarted(tmp_path)
    assert live.default() == 1
    assert live.served == [("colors", 1), ("colors", 2)]
    while live.default() == 1:
        await answer(live, 1)
    await live.manager.close()


async def test_a_version_that_passed_needs_no_new_trial_after_a_restart(publish, tmp_path):
    publish(1)
    records = VerdictRecords(tmp_path / "state")
    first = await restarted(tmp_path, records)
    folder = publish(2)
    await first.manager.refresh()
    while await asyncio.to_thread(records.find, folder) is None:
        await answer(first, 1)
    await first.manager.close()
    second = await restarted(tmp_path, records)
    assert second.served == [("colors", 2)]
    await second.manager.close()


async def test_a_record_that_cannot_be_used_is_logged_and_forgotten_on_request(
    publish, tmp_path, capsys
):
    folder = publish(1)
    (tmp_path / "state").write_text("a file")
    VerdictRecords(tmp_path / "state").record(folder, Verdict.LATENCY)
    assert "canary record cannot be written" in capsys.readouterr().out
    records = VerdictRecords(tmp_path / "records")
    records.record(folder, Verdict.LATENCY)
    assert records.find(folder) is Verdict.LATENCY
    path = tmp_path / "records" / "colors" / "1.canary.json"
    content = json.loads(path.read_text())
    for bad in ("{", "[]", json.dumps(content | {"schema_version": 9}), '{"verdict": 1}'):
        path.write_text(bad)
        assert records.find(folder) is None
        assert "canary record cannot be used" in capsys.readouterr().out
    path.write_text(json.dumps(content))
    assert records.find(folder) is Verdict.LATENCY
    records.forget(folder)
    assert not path.exists()
    # Nor does it count where it cannot be removed.
    path.write_text(json.dumps(content))
    assert records.find(folder) is None


async def test_classes_are_compared_by_name(live, publish):
    publish(2, spoil=relabel)
    await live.manager.refresh()
    random = np.random.default_rng(3)
    while live.default() == 1:
        await live.models.find("colors").batcher.infer(
            random.integers(0, 256, (2, 4, 6, 3), np.uint8)
        )
    assert live.default() == 2


async def test_what_an_operator_takes_back_needs_no_trial(live, publish):
    publish(2)
    promote(live, 2)
    await live.manager.refresh()
    while live.default() == 1:
        await answer(live, 1)
    promote(live, 1)
    await live.manager.refresh()
    assert live.default() == 1


async def test_a_canary_of_a_superseded_version_ends(live, publish):
    publish(2)
    await live.manager.refresh()
    assert await state(live, 2) is VersionState.READY
    promote(live, 1)
    await live.manager.refresh()
    await ended(live, 2)
    assert live.served == [("colors", 1)]
    await answer(live, 40)
    assert live.default() == 1


async def test_the_successor_of_a_version_that_fails_every_run_needs_no_trial(
    spoiled, live, publish
):
    """Without answers there is nothing to compare with."""
    publish(2)
    await live.manager.refresh()
    assert live.default() == 1
    spoiled.backends.update(live.models.find("colors").backends)
    await becomes(live, Health.FAILING)
    await live.manager.refresh()
    assert live.default() == 2


class Slowly:
    """A batcher whose predictions say that they took long."""

    health = Health.HEALTHY

    def __init__(self, batcher, factor: float) -> None:
        self._batcher = batcher
        self._factor = factor
        self.runs = 0

    async def infer(self, images) -> Prediction:
        self.runs += 1
        prediction = await self._batcher.infer(images)
        return replace(prediction, inference_s=prediction.inference_s * self._factor)


class Broken:
    """A batcher whose model fails."""

    health = Health.HEALTHY

    def __init__(self, batcher, error: Exception) -> None:
        self._error = error

    async def infer(self, images) -> Prediction:
        raise self._error


async def trial_verdict(live: Live, new, limits: CanaryLimits) -> Verdict:
    old = live.models.find("colors")
    running = asyncio.create_task(CanaryTrial(old, new, limits).run())
    while not running.done():
        await answer(live, 1)
    return await running


@pytest.mark.parametrize(("factor", "verdict"), [(1e6, Verdict.LATENCY), (1e-6, Verdict.GOOD)])
async def test_a_slow_canary_is_found_out(live, factor, verdict):
    old = live.models.find("colors")
    new = replace(old, batcher=Slowly(old.batcher, factor))
    assert await trial_verdict(live, new, replace(LIMITS, max_slowdown=100)) is verdict


async def test_a_failing_canary_is_detected_before_its_trial_ends(live):
    old = live.models.find("colors")
    new = replace(old, batcher=Broken(old.batcher, InferenceError("no")))
    limits = replace(LIMITS, requests=1_000_000, max_error_ratio=1e-6)
    assert await trial_verdict(live, new, limits) is Verdict.ERRORS
    # The device hangs.
    new = replace(old, batcher=Broken(old.batcher, UnavailableError("hangs")))
    assert await trial_verdict(live, new, limits) is Verdict.ERRORS


async def goes_on(live: Live, new, limits: CanaryLimits, requests: int = 1) -> bool:
    """Return whether a trial continues after several times its time-out."""
    trial = CanaryTrial(live.models.find("colors"), new, limits)
    running = asyncio.create_task(trial.run())
    await asyncio.sleep(0)
    await answer(live, requests)
    done, _ = await asyncio.wait({running}, timeout=5 * limits.timeout_s)
    running.cancel()
    return not done


async def test_no_evidence_is_no_good_evidence(live):
    """Without requests, with fewer than asked, or with a full queue a trial continues."""
    old = live.models.find("colors")
    limits = replace(LIMITS, timeout_s=0.1, requests=20)
    fast = replace(old, batcher=Slowly(old.batcher, 1e-6))
    assert await goes_on(live, fast, limits, requests=0)
    assert await goes_on(live, fast, limits, requests=12)
    full = replace(old, batcher=Broken(old.batcher, OverloadedError("full", 1.0)))
    assert await goes_on(live, full, limits, requests=60)


class Hanging:
    """A batcher whose runs never end."""

    def __init__(self, health: Health) -> None:
        self.health = health

    async def infer(self, images) -> Prediction:
        await asyncio.Event().wait()
        raise AssertionError


@pytest.mark.parametrize(
    ("health", "verdict"), [(Health.HEALTHY, Verdict.ERRORS), (Health.HUNG, Verdict.UNHEALTHY)]
)
async def test_a_canary_that_hangs_is_rolled_back(live, health, verdict):
    old = live.models.find("colors")
    new = replace(old, batcher=Hanging(health))
    assert await trial_verdict(live, new, replace(LIMITS, timeout_s=0.3)) is verdict


async def test_a_hang_of_the_version_in_service_leads_to_no_switch(live, monkeypatch):
    old = live.models.find("colors")
    new = replace(old, batcher=Slowly(old.batcher, 1e-6))
    monkeypatch.setattr(type(old.batcher), "health", Health.HUNG)
    assert await goes_on(live, new, replace(LIMITS, timeout_s=0.1, requests=10), requests=40)


async def test_a_canary_300_times_slower_is_rolled_back_after_a_few_runs(live):
    old = live.models.find("colors")
    slow = Slowly(old.batcher, 300.0)
    new = replace(old, batcher=slow)
    limits = replace(LIMITS, share=0.05, requests=200, max_slowdown=1.5, timeout_s=0.5)
    running = asyncio.create_task(CanaryTrial(old, new, limits).run())
    await asyncio.sleep(0)
    # A mirrored run that shares a batch with a request has no reference among smaller batches.
    while not running.done():
        await answer(live, 4)
        await asyncio.sleep(0.02)
    assert running.result() is Verdict.LATENCY
    assert 2 <= slow.runs < limits.requests


async def test_the_share_is_kept(live):
    """Counted on the trial itself: one in four of the answered requests."""
    seen = []

    class Counting:
        health = Health.HEALTHY

        async def infer(self, images) -> Prediction:
            seen.append(images)
            return Prediction(Outputs(*[mean_color_logits(images)] * 2), 0.0, 0.001, len(images))

    old = live.models.find("colors")
    new = replace(old, batcher=Counting())
    trial = CanaryTrial(old, new, replace(LIMITS, share=0.25, requests=1000))
    running = asyncio.create_task(trial.run())
    await asyncio.sleep(0)
    await answer(live, 40)
    # The last one has begun when the loop has gone round.
    await asyncio.sleep(0)
    running.cancel()
    assert len(seen) == 10
    # Nothing is mirrored after the trial.
    await asyncio.sleep(0)
    await answer(live, 8)
    assert len(seen) == 10
