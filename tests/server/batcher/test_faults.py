"""A model that raises, a device without memory, a run that never ends."""

import asyncio

import pytest

from server.batcher import BatchingLimits, DynamicBatcher, Runner
from server.errors import InferenceError, UnavailableError
from tests.server.batcher.fakes import SHAPE, image, queue


async def test_a_request_that_makes_the_model_raise_is_isolated(make, backend, observer):
    backend.poison[6] = ZeroDivisionError("inside the model")
    batcher = make(max_batch_size=8, max_queue_size=16)
    running = await queue(batcher, batcher.infer(image(0)))
    await backend.wait_for_run()
    values = (1, 2, 3, 6, 4, 5)
    rest = await queue(batcher, *(batcher.infer(image(value)) for value in values))
    backend.permits.release(20)
    answers = await asyncio.gather(*running, *rest, return_exceptions=True)
    failed = answers[4]
    assert isinstance(failed, InferenceError)
    assert isinstance(failed.__cause__, ZeroDivisionError)
    others = [answer for answer in answers if answer is not failed]
    assert [answer.outputs.logits[0, 0] for answer in others] == [0, 1, 2, 3, 4, 5]
    assert observer.failures == 1


async def test_a_batch_that_does_not_fit_into_memory_is_split_and_the_ceiling_falls(make, backend):
    backend.memory_images = 3
    batcher = make(max_batch_size=8, max_queue_size=16)
    running = await queue(batcher, batcher.infer(image(0)))
    await backend.wait_for_run()
    rest = await queue(batcher, batcher.infer(image(1, count=5)), batcher.infer(image(2, count=3)))
    backend.permits.release(20)
    answers = await asyncio.gather(*running, *rest)
    assert [answer.outputs.logits[:, 0].tolist() for answer in answers] == [[0], [1] * 5, [2] * 3]
    assert batcher.snapshot().max_batch_size == 2
    # What no batch holds from now on is split like any other large request.
    answer = await batcher.infer(image(3, count=5))
    assert answer.outputs.logits[:, 0].tolist() == [3] * 5
    assert max(len(batch) for batch in backend.batches[-3:]) <= 2


async def test_one_image_without_memory_fails_alone(make, backend):
    backend.memory_images = 0
    backend.permits.release(9)
    batcher = make()
    with pytest.raises(InferenceError):
        await batcher.infer(image(1))
    backend.memory_images = 9
    assert (await batcher.infer(image(2))).outputs.logits[0, 0] == 2


@pytest.fixture
async def watched(backend, observer, clock):
    """A batcher whose watchdog looks every few milliseconds, on the test's clock."""
    limits = BatchingLimits(max_batch_size=1, max_queue_size=8, hang_timeout_s=0.02)
    batcher = DynamicBatcher([Runner(backend.run)], SHAPE, limits, observer, clock)
    batcher.start(observer.health_changed)
    return batcher


async def test_a_run_that_hangs_ends_the_waiting_and_the_models_health(
    watched, backend, observer, clock
):
    waiting = await queue(watched, watched.infer(image(1)), watched.infer(image(2)))
    await backend.wait_for_run()
    assert watched.healthy
    clock.now_s = 1.0
    for answer in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(answer, UnavailableError)
    assert not watched.healthy
    with pytest.raises(UnavailableError, match="hangs"):
        await watched.infer(image(3))
    # The run comes back after all.
    backend.permits.release(2)
    await observer.recovered.wait()
    assert (await watched.infer(image(4))).outputs.logits[0, 0] == 4
    assert observer.health == [False, True]
    await watched.drain()


async def test_draining_does_not_wait_for_a_run_that_hangs(watched, backend, clock):
    waiting = await queue(watched, watched.infer(image(1)))
    await backend.wait_for_run()
    draining = asyncio.ensure_future(watched.drain())
    clock.now_s = 1.0
    await draining
    with pytest.raises(UnavailableError):
        await waiting[0]
    backend.permits.release()
