"""Several devices behind one queue."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from convoy.server.batching import BatchingLimits, DynamicBatcher, Health, LatencyModel, Runner
from convoy.server.errors import DeadlineExceededError, UnavailableError
from tests.server.batching.fakes import SHAPE, Clock, GatedBackend, Observer, image, queue

Start = Callable[..., DynamicBatcher]


@pytest.fixture
def devices() -> list[GatedBackend]:
    return [GatedBackend(), GatedBackend()]


@pytest.fixture
async def start(
    devices: list[GatedBackend], observer: Observer, clock: Clock
) -> AsyncIterator[Start]:
    made: list[DynamicBatcher] = []

    def start(
        instances: int = 2, latency: LatencyModel | None = None, **limits_: object
    ) -> DynamicBatcher:
        limits = BatchingLimits(
            **{"max_batch_size": 1, "max_queue_size": 16, "instances": instances, **limits_}
        )
        runners = [Runner(device.run) for device in devices]
        batcher = DynamicBatcher(runners, SHAPE, limits, observer, clock, latency=latency)
        batcher.start(observer.health_changed)
        made.append(batcher)
        return batcher

    yield start
    for device in devices:
        device.permits.release(100)
    for batcher in made:
        await batcher.drain()


async def wait_for_any(devices: list[GatedBackend]) -> int:
    """Waits until a run begins and returns the number of its device."""
    while True:
        for number, device in enumerate(devices):
            if device.entered.acquire(blocking=False):
                return number
        await asyncio.sleep(0.001)


async def test_devices_share_one_queue(start, devices):
    batcher = start()
    answers = await queue(batcher, *(batcher.infer(image(value)) for value in (1, 2, 3)))
    for device in devices:
        await device.wait_for_run()
    assert batcher.snapshot().queued_images == 1
    # Whoever is free first takes what waits.
    devices[1].permits.release(2)
    await devices[1].wait_for_run()
    devices[0].permits.release()
    predictions = await asyncio.gather(*answers)
    assert [each.outputs.logits[0, 0] for each in predictions] == [1, 2, 3]
    assert [len(device.batches) for device in devices] == [1, 2]


async def test_a_batch_goes_to_the_device_with_less_to_do(start, devices):
    batcher = start(instances=4)
    held = await queue(batcher, batcher.infer(image(0)))
    busy = await wait_for_any(devices)
    for value in range(1, 9):
        answer = await queue(batcher, batcher.infer(image(value)))
        assert await wait_for_any(devices) != busy
        devices[1 - busy].permits.release()
        await asyncio.gather(*answer)
    devices[busy].permits.release()
    await asyncio.gather(*held)


async def test_when_every_device_is_busy_their_other_instances_run_too(start, devices):
    batcher = start(instances=4)
    answers = await queue(batcher, *(batcher.infer(image(value)) for value in range(4)))
    for device in devices:
        await device.wait_for_run()
        await device.wait_for_run()
        device.permits.release(2)
    await asyncio.gather(*answers)
    assert [device.most_running for device in devices] == [2, 2]


async def test_draining_ends_an_instance_that_left_a_batch_to_another_device(start, devices):
    batcher = start(instances=6, max_batch_size=2, max_queue_delay_s=60.0)
    held = await queue(batcher, batcher.infer(image(0, count=2)))
    busy = await wait_for_any(devices)
    answer = await queue(batcher, batcher.infer(image(1, count=2)))
    await devices[1 - busy].wait_for_run()
    devices[1 - busy].permits.release()
    await asyncio.gather(*answer)
    # The instance that waits longest is one of the busy device.
    waiting = await queue(batcher, batcher.infer(image(2)))
    draining = asyncio.ensure_future(batcher.drain())
    for device in devices:
        device.permits.release(2)
    await asyncio.gather(*held, *waiting)
    await draining


async def test_nothing_is_promised_that_the_slower_device_cannot_keep(start, devices, observer):
    batcher = start(latency=LatencyModel({1: 1.0}, {1: 3.0}))
    # Both are idle, and the faster one could.
    with pytest.raises(DeadlineExceededError):
        await batcher.infer(image(0), deadline_s=2.0)
    answers = await queue(batcher, batcher.infer(image(1), deadline_s=3.1))
    await wait_for_any(devices)
    answers += await queue(batcher, batcher.infer(image(2)))
    await wait_for_any(devices)
    for device in devices:
        device.permits.release()
    await asyncio.gather(*answers)
    # Each run was expected to take what it takes on its own device.
    assert sorted(report.predicted_s for report in observer.reports) == [1.0, 3.0]


async def test_runs_of_the_faster_device_do_not_hide_the_slower_one(start, devices, clock):
    batcher = start(latency=LatencyModel({1: 1.0}, {1: 3.0}))
    held = await queue(batcher, batcher.infer(image(0)), batcher.infer(image(0)))
    for device in devices:
        await device.wait_for_run()
    for _ in range(50):
        answer = await queue(batcher, batcher.infer(image(1)))
        clock.now_s += 1.0
        devices[0].permits.release()
        await devices[0].wait_for_run()
        held += answer
    assert batcher.snapshot().batch_latency_s[1] == 3.0
    for device in devices:
        device.permits.release()
    await asyncio.gather(*held)


async def test_devices_without_memory_make_batches_smaller(start, devices):
    for device in devices:
        device.memory_images = 1
        device.permits.release(100)
    batcher = start(max_batch_size=4)
    answer = await batcher.infer(image(5, count=4))
    assert answer.outputs.logits[:, 0].tolist() == [5] * 4
    assert batcher.snapshot().max_batch_size == 1


async def test_a_device_that_hangs_ends_the_models_health(start, devices, observer, clock):
    batcher = start(hang_timeout_s=0.02)
    answers = await queue(batcher, *(batcher.infer(image(value)) for value in (1, 2, 3)))
    for device in devices:
        await device.wait_for_run()
    devices[0].permits.release(2)
    await devices[0].wait_for_run()
    await asyncio.sleep(0)
    clock.now_s = 1.0
    outcomes = await asyncio.gather(*answers, return_exceptions=True)
    assert any(isinstance(outcome, UnavailableError) for outcome in outcomes)
    assert batcher.health is Health.HUNG
    devices[1].permits.release()
    await observer.recovered.wait()
    assert observer.health == [Health.HUNG, Health.HEALTHY]
