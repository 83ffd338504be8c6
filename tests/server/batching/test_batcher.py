"""What every batcher promises, whatever the deadlines."""

import asyncio
import gc
import weakref
from contextlib import suppress

import numpy as np
import pytest

from convoy.server.batching import BatchingLimits, BatchSizes, DynamicBatcher, LatencyModel, Runner
from convoy.server.errors import (
    DeadlineExceededError,
    InferenceError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
from tests.server.batching.fakes import SHAPE, image, queue


async def test_an_idle_instance_takes_all_queued_requests(make, backend, observer):
    batcher = make()
    first = asyncio.ensure_future(batcher.infer(image(1)))
    await backend.wait_for_run()
    others = await queue(batcher, *(batcher.infer(image(value)) for value in (2, 3, 4)))
    backend.permits.release(2)
    predictions = await asyncio.gather(first, *others)
    assert backend.batches == [[1], [2, 3, 4]]
    assert [p.outputs.logits[0, 0] for p in predictions] == [1, 2, 3, 4]
    assert [p.batch_size for p in predictions] == [1, 3, 3, 3]
    assert observer.sizes == [1, 3]


async def test_a_batch_holds_at_most_max_batch_size_images_and_keeps_the_order(make, backend):
    batcher = make(max_batch_size=4)
    first = await queue(batcher, batcher.infer(image(9)))
    await backend.wait_for_run()
    rest = await queue(
        batcher,
        batcher.infer(image(1, count=3)),
        batcher.infer(image(2, count=2)),
        batcher.infer(image(3)),
    )
    backend.permits.release(3)
    answers = await asyncio.gather(*first, *rest)
    assert backend.batches == [[9], [1, 1, 1], [2, 2, 3]]
    assert [len(answer.outputs.logits) for answer in answers] == [1, 3, 2, 1]


async def test_batches_of_the_preferred_size_leave_the_other_instances_their_part(make, backend):
    batcher = make(max_batch_size=4, max_queue_size=16, instances=2, preferred_batch_size=2)
    running = []
    for _ in range(2):
        running += await queue(batcher, batcher.infer(image(99)))
        await backend.wait_for_run()
    # Two batches of the largest size for each of the two instances, and one image less.
    waiting = await queue(batcher, *(batcher.infer(image(value)) for value in range(15)))
    assert batcher.snapshot().queued_images == 15
    backend.permits.release(1)
    await backend.wait_for_run()
    assert backend.batches[-1] == [0, 1]
    waiting += await queue(batcher, *(batcher.infer(image(value)) for value in (15, 16, 17)))
    backend.permits.release(1)
    await backend.wait_for_run()
    assert backend.batches[-1] == [2, 3, 4, 5]
    backend.permits.release(100)
    await asyncio.gather(*running, *waiting)


@pytest.mark.parametrize(
    ("eight_images_s", "size"), [(0.008, 5), (0.0015, 8)], ids=["a CPU", "a GPU"]
)
async def test_instances_share_what_is_in_flight_where_time_is_proportional_to_the_size(
    make, backend, eight_images_s, size
):
    latency = LatencyModel({1: 0.001, 8: eight_images_s})
    batcher = make(max_batch_size=8, instances=2, latency=latency)
    running = []
    for _ in range(2):
        running += await queue(batcher, batcher.infer(image(99)))
        await backend.wait_for_run()
    # With the image that the other instance runs, nine are in flight.
    waiting = await queue(batcher, *(batcher.infer(image(value)) for value in range(8)))
    backend.permits.release(1)
    await backend.wait_for_run()
    assert backend.batches[-1] == list(range(size))
    backend.permits.release(100)
    await asyncio.gather(*running, *waiting)


async def test_a_size_that_is_tried_is_not_shared(make, backend):
    sizes = BatchSizes(2, 2, (2, 4))
    latency = LatencyModel({1: 0.001, 4: 0.004})
    batcher = make(max_batch_size=4, instances=2, latency=latency, sizes=sizes)
    running = []
    for _ in range(2):
        running += await queue(batcher, batcher.infer(image(99)))
        await backend.wait_for_run()
    sizes.preferred.due = 4
    waiting = await queue(batcher, *(batcher.infer(image(value)) for value in range(4)))
    backend.permits.release(1)
    await backend.wait_for_run()
    assert backend.batches[-1] == [0, 1, 2, 3]
    backend.permits.release(100)
    await asyncio.gather(*running, *waiting)


async def test_a_delay_ends_with_a_batch_of_the_preferred_size(make, backend):
    batcher = make(max_queue_delay_s=60.0, max_batch_size=4, preferred_batch_size=2)
    waiting = await queue(batcher, *(batcher.infer(image(value)) for value in (1, 2)))
    await asyncio.wait_for(backend.wait_for_run(), timeout=10)
    backend.permits.release()
    await asyncio.gather(*waiting)
    assert backend.batches == [[1, 2]]


async def test_a_request_that_the_largest_batch_holds_is_not_split_for_the_preferred(make, backend):
    batcher = make(max_batch_size=4, preferred_batch_size=2)
    running = await queue(batcher, batcher.infer(image(9)))
    await backend.wait_for_run()
    waiting = await queue(
        batcher, batcher.infer(image(1)), batcher.infer(image(2, 3)), batcher.infer(image(3))
    )
    backend.permits.release(100)
    await asyncio.gather(*running, *waiting)
    assert backend.batches == [[9], [1], [2, 2, 2], [3]]


async def test_a_request_of_none_or_too_many_images_is_rejected(make):
    batcher = make(max_batch_size=4, max_request_images=6)
    for count in (0, 7):
        with pytest.raises(InvalidRequestError, match=f"expected 1 to 6 images, got {count}"):
            await batcher.infer(image(0, count=count))


async def test_a_rejected_request_leaves_nothing_to_the_garbage_collector(make):
    """Under overload most requests are rejected; their pixels shall not wait for a collection."""
    batcher = make(max_request_images=1)
    images = image(0, count=2)
    pixels = weakref.ref(images)
    gc.disable()
    try:
        with suppress(InvalidRequestError):
            await batcher.infer(images)
        del images
        assert pixels() is None
    finally:
        gc.enable()


async def test_nor_does_one_that_was_given_up_while_it_waited(make, backend, clock):
    batcher = make()
    running = await queue(batcher, batcher.infer(image(0)))
    await backend.wait_for_run()
    images = image(1)
    pixels = weakref.ref(images)
    late = await queue(batcher, batcher.infer(images, deadline_s=5.0))
    clock.now_s = 10.0
    gc.disable()
    try:
        backend.permits.release()
        await asyncio.wait([*running, *late])
        assert isinstance(late[0].exception(), DeadlineExceededError)
        del images, late
        await asyncio.sleep(0)
        assert pixels() is None
    finally:
        gc.enable()


async def test_a_full_queue_rejects_at_once_and_recovers(make, backend):
    batcher = make(max_batch_size=4, max_queue_size=4)
    running = await queue(batcher, batcher.infer(image(0)))
    await backend.wait_for_run()
    waiting = await queue(batcher, *(batcher.infer(image(1)) for _ in range(4)))
    with pytest.raises(OverloadedError, match="4 of 4"):
        await batcher.infer(image(2))
    backend.permits.release(3)
    await asyncio.gather(*running, *waiting)
    assert (await batcher.infer(image(3))).outputs.logits[0, 0] == 3


async def test_a_cancelled_request_never_reaches_the_device_nor_affects_others_in_its_batch(
    make, backend, observer
):
    batcher = make(max_queue_size=3)
    running = await queue(batcher, batcher.infer(image(0)))
    await backend.wait_for_run()
    left, stayed = await queue(batcher, batcher.infer(image(1, 2)), batcher.infer(image(2)))
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    # Its room is free again for another request.
    replacement = await queue(batcher, batcher.infer(image(3, 2)))
    backend.permits.release(2)
    await asyncio.gather(*running, stayed, *replacement)
    assert backend.batches == [[0], [2, 3, 3]]
    assert batcher.snapshot().queued_images == 0


async def test_cancelling_while_the_batch_runs_leaves_the_others_their_answers(make, backend):
    batcher = make()
    blocker = await queue(batcher, batcher.infer(image(0)))
    await backend.wait_for_run()
    left, stayed = await queue(batcher, batcher.infer(image(1)), batcher.infer(image(2)))
    backend.permits.release()
    await backend.wait_for_run()
    left.cancel()
    backend.permits.release()
    await asyncio.gather(*blocker)
    assert (await stayed).outputs.logits[0, 0] == 2
    assert left.cancelled()


async def test_a_request_whose_deadline_passed_in_the_queue_is_not_run(make, backend, clock):
    batcher = make()
    running = await queue(batcher, batcher.infer(image(0)))
    await backend.wait_for_run()
    late, timely = await queue(
        batcher, batcher.infer(image(1), deadline_s=5.0), batcher.infer(image(2), deadline_s=50.0)
    )
    clock.now_s = 10.0
    backend.permits.release(2)
    await asyncio.gather(*running, timely)
    with pytest.raises(DeadlineExceededError):
        await late
    assert backend.batches == [[0], [2]]


async def test_a_failing_batch_fails_its_requests_and_nobody_else(make, backend, observer):
    batcher = make()
    backend.error = ZeroDivisionError("inside the model")
    backend.permits.release()
    with pytest.raises(InferenceError) as caught:
        await batcher.infer(image(1))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    backend.error = None
    backend.permits.release()
    assert (await batcher.infer(image(2))).outputs.logits[0, 0] == 2
    assert (observer.failures, observer.sizes) == (1, [1])


async def test_draining_answers_what_was_accepted_and_rejects_the_rest(make, backend):
    batcher = make()
    running = await queue(batcher, batcher.infer(image(1)))
    await backend.wait_for_run()
    waiting = await queue(batcher, batcher.infer(image(2)))
    draining = asyncio.ensure_future(batcher.drain())
    await asyncio.sleep(0)
    with pytest.raises(UnavailableError):
        await batcher.infer(image(3))
    backend.permits.release(2)
    await draining
    answers = await asyncio.gather(*running, *waiting)
    assert [answer.outputs.logits[0, 0] for answer in answers] == [1, 2]


async def test_instances_run_batches_side_by_side(make, backend):
    batcher = make(instances=2)
    first = await queue(batcher, batcher.infer(image(1)))
    await backend.wait_for_run()
    second = await queue(batcher, batcher.infer(image(2)))
    await backend.wait_for_run()
    backend.permits.release(2)
    answers = await asyncio.gather(*first, *second)
    assert [answer.outputs.logits[0, 0] for answer in answers] == [1, 2]
    assert backend.most_running == 2


async def test_a_queue_delay_waits_for_a_full_batch(make, backend):
    # The clock stands still, so the delay never ends: only the full batch can start the run.
    batcher = make(max_batch_size=3, max_queue_delay_s=60.0)
    waiting = await queue(batcher, batcher.infer(image(1)), batcher.infer(image(2)))
    assert not await asyncio.to_thread(backend.entered.acquire, timeout=0.1)
    waiting += await queue(batcher, batcher.infer(image(3)))
    backend.permits.release()
    await asyncio.gather(*waiting)
    assert backend.batches == [[1, 2, 3]]


async def test_a_queue_delay_ends_by_the_age_of_the_oldest_request(backend, observer):
    limits = BatchingLimits(max_batch_size=4, max_queue_size=8, max_queue_delay_s=0.02)
    batcher = DynamicBatcher([Runner(backend.run)], SHAPE, limits, observer)
    batcher.start()
    backend.permits.release()
    prediction = await batcher.infer(image(1))
    assert prediction.queue_s >= 0.02
    await batcher.drain()


async def test_times_are_those_of_the_clock(make, backend, clock):
    batcher = make()
    running = await queue(batcher, batcher.infer(image(1)))
    await backend.wait_for_run()
    waiting = await queue(batcher, batcher.infer(image(2)))
    clock.now_s = 2.0
    backend.permits.release()
    await backend.wait_for_run()
    clock.now_s = 5.0
    backend.permits.release()
    first, second = await asyncio.gather(*running, *waiting)
    assert (first.queue_s, first.inference_s) == (0.0, 2.0)
    assert (second.queue_s, second.inference_s) == (2.0, 3.0)


async def test_random_cancels_never_lose_duplicate_or_misroute_an_answer(backend, observer):
    """Every request that was not cancelled gets exactly its own rows."""
    random = np.random.default_rng(7)
    limits = BatchingLimits(max_batch_size=5, max_queue_size=10_000, instances=2)
    batcher = DynamicBatcher([Runner(backend.run)], SHAPE, limits, observer)
    batcher.start()
    backend.permits.release(10_000)

    async def ask(value: int, count: int) -> None:
        answer = await batcher.infer(image(value, count))
        assert answer.outputs.logits[:, 0].tolist() == [value] * count

    tasks = []
    for _ in range(600):
        tasks.append(
            asyncio.ensure_future(ask(int(random.integers(256)), int(random.integers(1, 6))))
        )
        if random.random() < 0.3:
            tasks[int(random.integers(len(tasks)))].cancel()
        if random.random() < 0.5:
            await asyncio.sleep(0)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    await batcher.drain()
    cancelled = [isinstance(result, asyncio.CancelledError) for result in results]
    assert 0 < sum(cancelled) < 600
    assert [result for result in results if result is not None] == [
        result for result, gone in zip(results, cancelled, strict=True) if gone
    ]
    assert batcher.snapshot().queued_images == 0


async def test_images_of_another_shape_fail_their_batch_and_not_the_instance(make, backend):
    batcher = make()
    backend.permits.release()
    with pytest.raises(InferenceError):
        await batcher.infer(np.zeros((1, 5, 5, 3), np.uint8))
    assert (await batcher.infer(image(2))).outputs.logits[0, 0] == 2
