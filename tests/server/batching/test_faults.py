"""A model that raises, a device without memory, a run that never ends."""

import asyncio
import threading

import pytest

from convoy.server.batching import BatchingLimits, DynamicBatcher, Health, Runner
from convoy.server.batching.recovery import FIRST_STEP_S
from convoy.server.errors import InferenceError, UnavailableError
from tests.server.batching.fakes import SHAPE, GatedBackend, image, queue


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


async def test_failed_requests_are_counted_and_not_their_batches(make, backend, observer):
    backend.poison |= {6: ZeroDivisionError("inside"), 7: ZeroDivisionError("inside")}
    batcher = make(max_batch_size=8, max_queue_size=16)
    running = await queue(batcher, batcher.infer(image(0)))
    await backend.wait_for_run()
    rest = await queue(batcher, *(batcher.infer(image(value)) for value in (1, 6, 7, 2)))
    backend.permits.release(20)
    answers = await asyncio.gather(*running, *rest, return_exceptions=True)
    assert sum(isinstance(answer, InferenceError) for answer in answers) == 2
    assert observer.failed_requests == 2


async def test_a_batch_that_does_not_fit_into_memory_is_split_and_batches_shrink_for_a_while(
    make, backend, observer, clock
):
    backend.memory_images = 3
    batcher = make(max_batch_size=8, max_queue_size=16)
    running = await queue(batcher, batcher.infer(image(0)))
    await backend.wait_for_run()
    rest = await queue(batcher, batcher.infer(image(1, count=5)), batcher.infer(image(2, count=3)))
    backend.permits.release(20)
    answers = await asyncio.gather(*running, *rest)
    assert [answer.outputs.logits[:, 0].tolist() for answer in answers] == [[0], [1] * 5, [2] * 3]
    assert batcher.snapshot().max_batch_size == 2
    assert observer.did_not_fit == 1
    # What no batch holds from now on is split like any other large request.
    answer = await batcher.infer(image(3, count=5))
    assert answer.outputs.logits[:, 0].tolist() == [3] * 5
    assert max(len(batch) for batch in backend.batches[-3:]) <= 2
    # Larger ones are tried again after a while, step by step, and stay where they fit by then.
    backend.memory_images = 8
    clock.now_s += FIRST_STEP_S
    assert batcher.snapshot().max_batch_size == 4
    await batcher.infer(image(4, count=4))
    assert len(backend.batches[-1]) == 4
    clock.now_s += FIRST_STEP_S
    await batcher.infer(image(5, count=8))
    assert len(backend.batches[-1]) == 8
    assert observer.did_not_fit == 1
    assert observer.batch_sizes == [2, 4, 8]


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
    assert watched.health is Health.HEALTHY
    clock.now_s = 1.0
    for answer in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(answer, UnavailableError)
    assert watched.health is Health.HUNG
    with pytest.raises(UnavailableError, match="hangs"):
        await watched.infer(image(3))
    # The run comes back after all.
    backend.permits.release(2)
    await observer.recovered.wait()
    assert (await watched.infer(image(4))).outputs.logits[0, 0] == 4
    assert observer.health == [Health.HUNG, Health.HEALTHY]
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


async def fail(batcher, requests: int) -> None:
    for value in range(1, 1 + requests):
        with pytest.raises(InferenceError):
            await batcher.infer(image(value))


async def test_a_model_that_fails_every_run_is_probed_until_it_recovers(
    make, backend, observer, clock
):
    batcher = make()
    backend.permits.release(100)
    backend.error = RuntimeError("the device is lost")
    await fail(batcher, 3)
    await observer.ill.wait()
    assert batcher.health is Health.FAILING
    assert batcher.fault == "every run fails: RuntimeError: the device is lost"
    with pytest.raises(UnavailableError, match="fails every run"):
        await batcher.infer(image(4))
    backend.error = None
    # The last run was the probe, of a black image.
    assert backend.batches == [[1], [2], [3], [0]]
    clock.now_s += 1.0
    await observer.recovered.wait()
    assert observer.health == [Health.FAILING, Health.HEALTHY]
    assert (batcher.fault, backend.batches[-1]) == ("", [0])
    assert (await batcher.infer(image(5))).outputs.logits[0, 0] == 5
    # No caller asked for the probes, so nobody counts them.
    assert (observer.failures, observer.sizes) == (3, [1])


async def test_requests_that_make_a_sound_model_fail_do_not_make_it_unhealthy(
    make, backend, observer
):
    batcher = make()
    backend.permits.release(100)
    backend.poison = dict.fromkeys(range(1, 10), ZeroDivisionError("inside the model"))
    await fail(batcher, 9)
    assert (await batcher.infer(image(10))).outputs.logits[0, 0] == 10
    assert batcher.health is Health.HEALTHY
    assert observer.health == []
    assert backend.batches.count([0]) == 3


async def test_a_device_that_fails_every_run_gets_no_batches_and_the_others_serve(observer, clock):
    sound, broken = GatedBackend(), GatedBackend()
    broken.error = RuntimeError("the device is lost")
    for backend in (sound, broken):
        backend.permits = threading.Semaphore(1_000_000)
    limits = BatchingLimits(max_batch_size=1, max_queue_size=16, instances=4)
    runners = [Runner(sound.run), Runner(broken.run)]
    batcher = DynamicBatcher(runners, SHAPE, limits, observer, clock)
    batcher.start(observer.health_changed)
    while broken.batches.count([0]) == 0:
        await asyncio.gather(*(batcher.infer(image(1)) for _ in range(4)), return_exceptions=True)
    await asyncio.to_thread(broken.wait_until_idle)
    runs = len(broken.batches)
    for _ in range(10):
        await asyncio.gather(*(batcher.infer(image(1)) for _ in range(4)))
    assert len(broken.batches) == runs
    broken.error = None
    clock.now_s += 1.0
    while len(broken.batches) < runs + 2:
        await asyncio.gather(*(batcher.infer(image(1)) for _ in range(4)))
    assert observer.health == []
    await batcher.drain()


async def test_a_model_that_fails_every_run_is_drained_at_once(make, backend, observer):
    batcher = make()
    backend.permits.release(100)
    backend.error = RuntimeError("the device is lost")
    await fail(batcher, 3)
    await observer.ill.wait()
    await batcher.drain()
