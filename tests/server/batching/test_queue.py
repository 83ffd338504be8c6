"""The queue's order, and that nobody starves in it."""

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convoy.server.batching import BatchingLimits
from convoy.server.batching.batch import InferenceRequest
from convoy.server.batching.request_queue import (
    LEVEL_S,
    LOWEST_LEVEL,
    PATIENCE_S,
    RequestQueue,
    urgency,
)
from tests.server.batching.fakes import image

LIMITS = BatchingLimits(max_batch_size=4, max_queue_size=10_000)
DEADLINES = st.one_of(st.just(float("inf")), st.floats(0, 100))


@pytest.fixture(scope="module")
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def request(loop, at_s, deadline_s=float("inf"), priority=0, count=1) -> InferenceRequest:
    return InferenceRequest(image(0, count), loop.create_future(), at_s, deadline_s, priority)


@given(st.floats(0, 10), st.floats(0, 1000), DEADLINES, st.integers(0, 20), st.integers(0, 20))
def test_nobody_is_overtaken_by_who_came_later_than_its_patience_and_level_allow(
    loop, at_s, later_s, deadline_s, level, other_level
):
    """The aging rule: whatever comes later than that, and asks for whatever, stands behind."""
    waiting = request(loop, at_s, float("inf"), level)
    bound_s = PATIENCE_S + (min(level or 2, LOWEST_LEVEL) - 1) * LEVEL_S
    arrived_s = at_s + bound_s + later_s + 1e-6
    # A deadline that has passed on arrival is rejected, not queued.
    newcomer = request(loop, arrived_s, max(deadline_s, arrived_s), other_level)
    queue = RequestQueue(LIMITS)
    queue.add(waiting)
    assert queue.images_before(newcomer) == 1
    queue.add(newcomer)
    assert queue.head is waiting


@given(st.lists(st.tuples(st.floats(0, 1), DEADLINES, st.integers(0, 9), st.integers(1, 9))))
def test_counts_and_order_survive_every_sequence_of_adds_and_takes(loop, drawn):
    queue = RequestQueue(LIMITS)
    requests = [request(loop, *fields) for fields in drawn]
    for each in requests:
        queue.add(each)
    total = sum(each.size for each in requests)
    assert queue.images == total
    assert queue.bytes == total * image(0).nbytes
    taken = []
    while queue.images:
        slices = queue.take(4, 4)
        assert 0 < sum(part.size for part in slices) <= 4
        taken += slices
    assert (queue.images, queue.bytes, len(queue)) == (0, 0, 0)
    assert sum(part.size for part in taken) == total
    assert all(urgency(a.request) <= urgency(b.request) for a, b in pairwise(taken))
    for each in requests:
        spans = [(part.start, part.stop) for part in taken if part.request is each]
        assert (spans[0][0], spans[-1][1]) == (0, each.size)
        assert all(a[1] == b[0] for a, b in pairwise(spans))
        assert len(spans) == 1 or each.size > 4


def test_late_requests_are_found_and_others_stay(loop):
    queue = RequestQueue(LIMITS)
    requests = [request(loop, 0, deadline_s) for deadline_s in (5, 1, float("inf"), 3)]
    for each in requests:
        queue.add(each)
    assert queue.pop_late(1) == []
    assert set(queue.pop_late(4)) == {requests[1], requests[3]}
    assert queue.images == 2
    assert queue.earliest_deadline_s == 5
    assert queue.pop_late(6) == [requests[0]]
    assert queue.earliest_deadline_s == float("inf")
