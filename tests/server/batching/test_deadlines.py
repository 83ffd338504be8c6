"""Deadlines, priorities and bounds: who runs, in which order, and who is rejected at once."""

import asyncio

import pytest

from convoy.server.batching import Health, LatencyModel
from convoy.server.errors import DeadlineExceededError, OverloadedError
from convoy.server.requests import Outcome
from tests.server.batching.fakes import image, queue

# 1 s for a batch of one, 2 s for four: what a device does that gains by batching.
GAINING = {1: 1.0, 4: 2.0}


async def test_the_earliest_deadline_runs_first(make, backend):
    batcher = make(max_batch_size=1)
    running = await queue(batcher, batcher.infer(image(0)))
    await backend.wait_for_run()
    rest = await queue(
        batcher,
        batcher.infer(image(1), deadline_s=0.9),
        batcher.infer(image(2), deadline_s=0.3),
        batcher.infer(image(3)),
        batcher.infer(image(4), deadline_s=0.6),
    )
    backend.permits.release(5)
    await asyncio.gather(*running, *rest)
    assert backend.batches == [[0], [2], [4], [1], [3]]


async def test_a_higher_priority_goes_before_an_earlier_deadline(make, backend):
    batcher = make(max_batch_size=1)
    running = await queue(batcher, batcher.infer(image(0)))
    await backend.wait_for_run()
    rest = await queue(
        batcher,
        batcher.infer(image(1), deadline_s=0.2),
        batcher.infer(image(2), deadline_s=0.9, priority=1),
        batcher.infer(image(3), deadline_s=0.1, priority=3),
        batcher.infer(image(4), deadline_s=0.2, priority=2),
    )
    backend.permits.release(5)
    await asyncio.gather(*running, *rest)
    # 0 is the default level, which is 2.
    assert backend.batches == [[0], [2], [1], [4], [3]]


async def test_what_cannot_be_answered_in_time_is_rejected_on_arrival(
    make, backend, observer, clock
):
    batcher = make(latency=LatencyModel(GAINING))
    with pytest.raises(DeadlineExceededError):
        await batcher.infer(image(1), deadline_s=0.9)
    running = await queue(batcher, batcher.infer(image(2), deadline_s=1.6))
    await backend.wait_for_run()
    # The instance is busy until 1.0, a batch of one takes up to 1.4, the way back a tenth of all.
    with pytest.raises(DeadlineExceededError):
        await batcher.infer(image(3), deadline_s=2.6)
    running += await queue(batcher, batcher.infer(image(4), deadline_s=2.7))
    clock.now_s = 1.0
    backend.permits.release(2)
    await asyncio.gather(*running)
    assert backend.batches == [[2], [4]]
    assert observer.rejections == [Outcome.DEADLINE] * 2


async def test_admission_counts_only_what_runs_before(make, backend):
    batcher = make(max_batch_size=1, latency=LatencyModel({1: 1.0}))
    running = await queue(batcher, batcher.infer(image(0)))
    await backend.wait_for_run()
    running += await queue(batcher, *(batcher.infer(image(1), priority=4) for _ in range(3)))
    with pytest.raises(DeadlineExceededError):
        await batcher.infer(image(2), deadline_s=3.0, priority=5)
    running += await queue(batcher, batcher.infer(image(3), deadline_s=3.0))
    backend.permits.release(5)
    await asyncio.gather(*running)
    assert backend.batches[1] == [3]


async def test_admission_expects_that_later_requests_fill_the_batch(make, backend):
    batcher = make(max_batch_size=2, latency=LatencyModel({1: 1.0, 2: 2.0}))
    running = await queue(batcher, batcher.infer(image(0)))
    await backend.wait_for_run()
    running += await queue(batcher, batcher.infer(image(1)), batcher.infer(image(1)))
    # The current run ends at 1.0, two images at 3.0, two more by 5.8, less a tenth for the reply.
    with pytest.raises(DeadlineExceededError):
        await asyncio.wait_for(batcher.infer(image(2), deadline_s=6.0), timeout=10)
    running += await queue(batcher, batcher.infer(image(3), deadline_s=6.5))
    backend.permits.release(3)
    await asyncio.gather(*running)
    assert backend.batches == [[0], [1, 1], [3]]


async def test_a_late_head_is_dropped_so_that_the_rest_fill_a_batch(make, backend, clock):
    """The sliding window: a batch of one would be in time, but four then pay for it."""
    batcher = make(latency=LatencyModel(GAINING))
    running = await queue(batcher, batcher.infer(image(0)))
    await backend.wait_for_run()
    late = await queue(batcher, batcher.infer(image(1), deadline_s=2.7))
    rest = await queue(batcher, *(batcher.infer(image(2), deadline_s=9.0) for _ in range(4)))
    clock.now_s = 1.4
    backend.permits.release(2)
    await asyncio.gather(*running, *rest)
    with pytest.raises(DeadlineExceededError):
        await late[0]
    assert backend.batches == [[0], [2, 2, 2, 2]]


async def test_an_urgent_head_shrinks_the_batch_if_that_costs_no_throughput(make, backend, clock):
    """On a CPU, whose time is in proportion to the batch, nobody has to be given up."""
    batcher = make(max_batch_size=4, latency=LatencyModel({1: 1.0, 2: 2.0, 4: 4.0}))
    running = await queue(batcher, batcher.infer(image(0)))
    await backend.wait_for_run()
    rest = await queue(
        batcher,
        batcher.infer(image(1), deadline_s=4.0),
        *(batcher.infer(image(2), deadline_s=30.0) for _ in range(3)),
    )
    clock.now_s = 1.0
    backend.permits.release(3)
    await asyncio.gather(*running, *rest)
    assert backend.batches == [[0], [1, 2], [2, 2]]


async def test_an_idle_instance_never_waits_for_more(make, backend):
    batcher = make(instances=2, latency=LatencyModel({1: 1.0, 4: 1.0}))
    waiting = await queue(batcher, batcher.infer(image(1), deadline_s=60.0))
    await backend.wait_for_run()
    backend.permits.release()
    await asyncio.gather(*waiting)


async def test_a_second_instance_lets_a_batch_fill_while_the_first_runs(make, backend, clock):
    """Where batches are worth it, what waits goes to whoever is free next, if that is in time."""
    batcher = make(max_batch_size=3, instances=2, latency=LatencyModel({1: 9.0, 4: 9.0}))
    waiting = await queue(batcher, batcher.infer(image(0)))
    await backend.wait_for_run()
    waiting += await queue(batcher, batcher.infer(image(1), deadline_s=60.0))
    assert not await asyncio.to_thread(backend.entered.acquire, timeout=0.1)
    waiting += await queue(batcher, *(batcher.infer(image(2), deadline_s=60.0) for _ in range(2)))
    backend.permits.release(2)
    await asyncio.gather(*waiting)
    assert backend.batches == [[0], [1, 2, 2]]


async def test_a_second_instance_does_not_wait_where_batches_bring_nothing(make, backend):
    batcher = make(instances=2, latency=LatencyModel({1: 1.0, 4: 4.0}))
    waiting = await queue(batcher, batcher.infer(image(0)))
    await backend.wait_for_run()
    waiting += await queue(batcher, batcher.infer(image(1), deadline_s=60.0))
    await backend.wait_for_run()
    backend.permits.release(2)
    await asyncio.gather(*waiting)
    assert backend.batches == [[0], [1]]


async def test_a_large_request_is_split_over_batches_and_joined(make, backend, observer):
    batcher = make(max_batch_size=4, max_queue_size=16)
    running = await queue(batcher, batcher.infer(image(0)))
    await backend.wait_for_run()
    large = image(0, count=10)
    large[:, 0, 0, 0] = range(10, 20)
    rest = await queue(batcher, batcher.infer(large), batcher.infer(image(1)))
    backend.permits.release(4)
    _, answer, last = await asyncio.gather(*running, *rest)
    assert backend.batches == [[0], [10, 11, 12, 13], [14, 15, 16, 17], [18, 19, 1]]
    assert answer.outputs.logits[:, 0].tolist() == list(range(10, 20))
    assert (answer.batch_size, last.batch_size) == (4, 3)
    assert [report.answered for report in observer.reports] == [1, 0, 0, 2]


async def test_several_instances_share_the_parts_of_a_large_request(make, backend):
    batcher = make(max_batch_size=2, instances=2)
    waiting = await queue(batcher, batcher.infer(image(5, count=4)))
    await backend.wait_for_run()
    await backend.wait_for_run()
    backend.permits.release(2)
    (answer,) = await asyncio.gather(*waiting)
    assert backend.most_running == 2
    assert answer.outputs.logits[:, 0].tolist() == [5] * 4


async def test_cancelling_a_split_request_saves_the_rest_of_it(make, backend, observer):
    batcher = make(max_batch_size=2, max_queue_size=10)
    waiting = await queue(batcher, batcher.infer(image(1, count=8)))
    await backend.wait_for_run()
    waiting[0].cancel()
    stays = await queue(batcher, batcher.infer(image(2)))
    backend.permits.release(2)
    await asyncio.gather(*stays)
    assert backend.batches == [[1, 1], [2]]
    assert observer.reports[0].wasted_images == 2
    assert observer.rejections == [Outcome.CANCELLED]


async def test_the_queue_is_bounded_in_bytes(make, backend):
    batcher = make(max_queue_size=100, max_queue_bytes=3 * image(0).nbytes)
    running = await queue(batcher, batcher.infer(image(0)))
    await backend.wait_for_run()
    running += await queue(batcher, batcher.infer(image(0, count=3)))
    with pytest.raises(OverloadedError, match="36 of 36 bytes wait"):
        await batcher.infer(image(1))
    backend.permits.release(2)
    await asyncio.gather(*running)


async def test_one_client_holds_no_more_than_its_share(make, backend, observer):
    batcher = make(max_queue_size=8, max_client_share=0.5)
    running = await queue(batcher, batcher.infer(image(0), client="a"))
    await backend.wait_for_run()
    running += await queue(batcher, *(batcher.infer(image(1), client="a") for _ in range(4)))
    with pytest.raises(OverloadedError, match="the client's share of the queue is full: 4 images"):
        await batcher.infer(image(1), client="a")
    running += await queue(
        batcher, batcher.infer(image(2), client="b"), batcher.infer(image(3), client="")
    )
    backend.permits.release(3)
    await asyncio.gather(*running)
    backend.permits.release()
    assert (await batcher.infer(image(4), client="a")).batch_size == 1
    assert observer.rejections == [Outcome.FULL]


async def test_a_full_queue_rejection_says_when_to_retry(make, backend):
    batcher = make(max_batch_size=4, max_queue_size=4, latency=LatencyModel({1: 1.0, 4: 2.0}))
    running = await queue(batcher, batcher.infer(image(0)))
    await backend.wait_for_run()
    running += await queue(batcher, batcher.infer(image(1, count=4)))
    with pytest.raises(OverloadedError) as caught:
        await batcher.infer(image(2))
    assert caught.value.retry_after_s == pytest.approx(2.0)
    backend.permits.release(2)
    await asyncio.gather(*running)


async def test_batches_are_padded_to_a_size_that_was_warmed(make, backend, observer):
    batcher = make(max_batch_size=4, latency=LatencyModel({1: 1.0, 4: 1.0}, pads=True))
    running = await queue(batcher, batcher.infer(image(7)))
    await backend.wait_for_run()
    rest = await queue(batcher, batcher.infer(image(8)), batcher.infer(image(9)))
    backend.permits.release(2)
    answers = await asyncio.gather(*running, *rest)
    assert [len(batch) for batch in backend.batches] == [1, 4]
    assert [answer.outputs.logits[0, 0] for answer in answers] == [7, 8, 9]
    assert [report.padded_images for report in observer.reports] == [0, 2]
    assert observer.sizes == [1, 2]


async def test_the_snapshot_tells_what_is_held(make, backend):
    batcher = make(latency=LatencyModel(GAINING))
    running = await queue(batcher, batcher.infer(image(0)))
    await backend.wait_for_run()
    running += await queue(batcher, batcher.infer(image(1, count=2)))
    snapshot = batcher.snapshot()
    assert (snapshot.queued_images, snapshot.queued_bytes) == (2, image(0, 2).nbytes)
    assert (snapshot.busy_instances, snapshot.max_batch_size) == (1, 4)
    assert snapshot.health is Health.HEALTHY
    assert snapshot.batch_latency_s == GAINING
    backend.permits.release(2)
    await asyncio.gather(*running)


async def test_an_idle_device_is_tried_however_long_the_tail_is(make, backend, clock):
    """A stall makes the tail longer than any deadline; without a run it would stay so."""
    batcher = make(latency=LatencyModel({1: 0.01}))
    running = await queue(batcher, batcher.infer(image(0)))
    await backend.wait_for_run()
    clock.now_s = 50.0
    backend.permits.release()
    await asyncio.gather(*running)
    running = await queue(batcher, batcher.infer(image(1), deadline_s=clock.now_s + 0.1))
    await backend.wait_for_run()
    # The device is busy: nobody else is promised what the tail forbids.
    with pytest.raises(DeadlineExceededError):
        await batcher.infer(image(2), deadline_s=clock.now_s + 0.1)
    backend.permits.release()
    (answer,) = await asyncio.gather(*running)
    assert answer.outputs.logits[0, 0] == 1


async def test_predictions_that_forbid_every_run_are_tried_again_after_a_while(
    make, backend, clock
):
    batcher = make(latency=LatencyModel({1: 10.0}))
    with pytest.raises(DeadlineExceededError):
        await batcher.infer(image(1), deadline_s=clock.now_s + 0.1)
    clock.now_s += 1.0
    backend.permits.release()
    answer = await batcher.infer(image(2), deadline_s=clock.now_s + 0.1)
    assert answer.outputs.logits[0, 0] == 2


async def test_what_waits_is_run_while_it_is_likely_in_time(make, backend, clock):
    """Between what is sure and what is hopeless: accepted before a stall, worth a try after it."""
    batcher = make(latency=LatencyModel({1: 1.0, 4: 1.0}))
    running = await queue(batcher, batcher.infer(image(0)))
    await backend.wait_for_run()
    running += await queue(batcher, batcher.infer(image(1), deadline_s=2.75))
    late = await queue(batcher, batcher.infer(image(2), deadline_s=2.68))
    clock.now_s = 1.65
    backend.permits.release(2)
    await asyncio.gather(*running)
    with pytest.raises(DeadlineExceededError):
        await late[0]
    assert backend.batches == [[0], [1]]
