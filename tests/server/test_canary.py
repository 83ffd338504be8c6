"""Trials of new versions on live requests, with real models and batchers."""

import asyncio
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from server.canary import CanaryLimits, CanaryTrial, Verdict
from server.errors import InferenceError, OverloadedError
from server.requests import Outputs, Prediction
from server.version_state import VersionState
from tests.server.conftest import change_samples, mean_colour_logits, seal
from tests.server.test_manager import Live, ended, promote, state

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
        model = live.catalogue.find("colours")
        prediction = await model.batcher.infer(images)
        np.testing.assert_allclose(prediction.outputs.logits, mean_colour_logits(images), atol=1e-5)
        versions.add(model.version)
    return versions


async def test_a_good_canary_takes_over_after_its_trial(live, publish):
    publish(2)
    await live.manager.refresh()
    assert live.default() == 1
    assert live.served == [("colours", 1), ("colours", 2)]
    while live.default() == 1:
        await answer(live, 1)
    assert live.value("convoy_version_swaps_total", model="colours") == 1
    assert live.value("convoy_rollbacks_total", model="colours", reason="disagreement") is None
    while await state(live, 1) is VersionState.READY:
        pass
    await ended(live, 1)


async def test_a_canary_that_disagrees_is_rolled_back_and_answered_nobody(live, publish):
    publish(2, spoil=swap_red_and_blue)
    await live.manager.refresh()
    while await state(live, 2) is VersionState.READY:
        assert await answer(live, 1) == {1}
    assert live.value("convoy_rollbacks_total", model="colours", reason="disagreement") == 1
    await live.manager.refresh()
    assert live.served == [("colours", 1)]
    (status,) = [s for s in await live.manager.index() if s.version == 2]
    assert status.reason in ("", "the canary showed disagreement")


async def test_classes_are_compared_by_name(live, publish):
    publish(2, spoil=relabel)
    await live.manager.refresh()
    random = np.random.default_rng(3)
    while live.default() == 1:
        await live.catalogue.find("colours").batcher.infer(
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


async def test_a_canary_that_is_not_wanted_any_more_ends(live, publish):
    publish(2)
    await live.manager.refresh()
    assert await state(live, 2) is VersionState.READY
    promote(live, 1)
    await live.manager.refresh()
    await ended(live, 2)
    assert live.served == [("colours", 1)]
    await answer(live, 40)
    assert live.default() == 1


class Slowly:
    """A batcher whose predictions say that they took long."""

    def __init__(self, batcher, factor: float) -> None:
        self._batcher = batcher
        self._factor = factor

    async def infer(self, images) -> Prediction:
        prediction = await self._batcher.infer(images)
        return replace(prediction, inference_s=prediction.inference_s * self._factor)


class Broken:
    """A batcher whose model fails."""

    def __init__(self, batcher, error: Exception) -> None:
        self._error = error

    async def infer(self, images) -> Prediction:
        raise self._error


async def trial_verdict(live: Live, new, limits: CanaryLimits) -> Verdict:
    old = live.catalogue.find("colours")
    running = asyncio.create_task(CanaryTrial(old, new, limits).run())
    while not running.done():
        await answer(live, 1)
    assert old.batcher.tap is None
    return await running


@pytest.mark.parametrize(("factor", "verdict"), [(1e6, Verdict.LATENCY), (1e-6, Verdict.GOOD)])
async def test_a_slow_canary_is_found_out(live, factor, verdict):
    old = live.catalogue.find("colours")
    new = replace(old, batcher=Slowly(old.batcher, factor))
    assert await trial_verdict(live, new, replace(LIMITS, max_slowdown=100)) is verdict


async def test_a_failing_canary_is_found_out_before_its_trial_is_over(live):
    old = live.catalogue.find("colours")
    new = replace(old, batcher=Broken(old.batcher, InferenceError("no")))
    limits = replace(LIMITS, requests=1_000_000, max_error_ratio=1e-6)
    assert await trial_verdict(live, new, limits) is Verdict.ERRORS
    # A full queue says nothing about a version.
    new = replace(old, batcher=Broken(old.batcher, OverloadedError("full", 1.0)))
    assert await trial_verdict(live, new, replace(LIMITS, timeout_s=0.2)) is Verdict.GOOD


async def test_the_share_is_kept(live):
    """Counted on the trial itself: one in four of the answered requests."""
    seen = []

    class Counting:
        async def infer(self, images) -> Prediction:
            seen.append(images)
            return Prediction(Outputs(*[mean_colour_logits(images)] * 2), 0.0, 0.001, len(images))

    old = live.catalogue.find("colours")
    new = replace(old, batcher=Counting())
    trial = CanaryTrial(old, new, replace(LIMITS, share=0.25, requests=1000))
    running = asyncio.create_task(trial.run())
    await asyncio.sleep(0)
    await answer(live, 40)
    # The last one has begun when the loop has gone round.
    await asyncio.sleep(0)
    running.cancel()
    assert len(seen) == 10
