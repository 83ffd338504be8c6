"""The batch sizes: what is chosen by measured times, and what runs in service correct."""

import asyncio

import numpy as np
import pytest

from convoy.server.batching import BatchSizes
from convoy.server.batching.sizes import (
    TRIES,
    TRY_EVERY,
    largest_size,
    preferred_size,
    smoothed,
)
from tests.server.batching.fakes import image, queue


def test_the_smallest_size_that_is_nearly_best_is_chosen():
    flat = {1: 0.1, 2: 0.2, 4: 0.4}
    assert preferred_size(flat) == 1
    gaining = {1: 0.010, 8: 0.011, 64: 0.020, 256: 0.080}
    assert preferred_size(gaining) == 64


def test_a_size_that_wastes_device_time_is_not_chosen_for_its_short_wait():
    slow = {1: 0.0158, 2: 0.0303, 4: 0.0580, 8: 0.1160}
    assert preferred_size(slow) == 4


def test_short_batches_grow_until_their_hand_over_costs_little():
    fast = {1: 0.00024, 2: 0.00045, 4: 0.00091, 8: 0.00178, 16: 0.00366}
    assert preferred_size(fast) == 8


def test_where_much_waits_batches_grow_until_their_hand_over_costs_next_to_nothing():
    fast = {1: 0.00024, 2: 0.00045, 4: 0.00091, 8: 0.00178, 16: 0.00366}
    assert largest_size(fast) == 16
    flat = {1: 0.1, 2: 0.2, 4: 0.4}
    assert largest_size(flat) == 1
    slow = {1: 0.0028, 2: 0.0056, 4: 0.0115}
    assert (preferred_size(slow), largest_size(slow)) == (1, 2)


def test_an_slo_bounds_the_size_so_that_two_runs_fit():
    gaining = {1: 0.010, 8: 0.011, 64: 0.020}
    assert preferred_size(gaining, slo_s=0.030) == 8
    assert preferred_size(gaining, slo_s=0.001) == 1
    assert largest_size(gaining, slo_s=0.030) == 8


def test_noise_of_single_sizes_changes_the_choice_by_one_step_at_most():
    random = np.random.default_rng(0)
    chosen, plain = set(), set()
    for _ in range(50):
        times_s = {
            size: (0.0001 + 0.0007 * size) * (1 + 0.05 * random.random())
            for size in (1, 2, 4, 8, 16, 32, 64)
        }
        chosen.add(preferred_size(smoothed(times_s)))
        plain.add(preferred_size(times_s))
    assert chosen <= {4, 8}
    assert len(plain) > len(chosen)


def test_a_size_far_above_the_line_keeps_its_time_and_does_not_move_the_others():
    """It was disturbed, or the device is slower from there on."""
    true_s = {size: 0.001 + 0.001 * size for size in (1, 2, 4, 8, 16)}
    for size in (4, 16):
        found_s = smoothed({**true_s, size: 3 * true_s[size]})
        assert found_s.pop(size) == 3 * true_s[size]
        assert found_s == pytest.approx({n: true_s[n] for n in found_s}, rel=0.1)


@pytest.mark.parametrize(
    "times_s",
    [
        {1: 0.002, 2: 0.002, 4: 0.002, 8: 0.012, 16: 0.013, 32: 0.050},
        {1: 0.001, 2: 0.009},
        {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0},
    ],
)
def test_times_that_no_line_describes_are_kept(times_s):
    assert smoothed(times_s) == times_s


class Device:
    """Runs batches of the sizes that are asked for, all of them under load."""

    def __init__(self, sizes: BatchSizes, seconds_of) -> None:
        self.sizes = sizes
        self.seconds_of = seconds_of
        self.runs: list[int] = []
        self.tries = 0

    def run(self, batches: int) -> None:
        for _ in range(batches):
            size = self.sizes.preferred.due or self.sizes.preferred.size
            self.runs.append(size)
            self.tries += bool(self.sizes.preferred.due)
            self.sizes.ran(size, self.seconds_of(size, len(self.runs)))


def test_runs_in_service_correct_a_choice_that_the_warm_up_got_wrong():
    device = Device(BatchSizes(2, 2, (1, 2, 4, 8)), lambda size, _: 0.010 + 0.001 * size)
    device.run(40 * TRY_EVERY)
    assert (device.sizes.preferred.size, device.sizes.largest.size) == (8, 8)
    # Tries are too few to be seen in the p99.
    assert 0 < device.tries < 0.01 * len(device.runs)


def test_a_size_that_gains_nothing_is_left_for_a_smaller_one():
    device = Device(BatchSizes(8, 8, (4, 8)), lambda size, _: 0.001 * size * (1 + 0.05 * size))
    device.run(10 * TRY_EVERY)
    assert (device.sizes.preferred.size, device.sizes.largest.size) == (4, 4)


def test_neither_noise_nor_a_machine_that_slows_down_changes_the_choice():
    def seconds(size: int, run: int) -> float:
        stall = 20 if run % 97 == 0 else 1
        return 0.001 * size * (1 + run / 5000) * (1 + 0.04 * (run % 7 % 3)) * stall

    device = Device(BatchSizes(4, 4, (1, 2, 4, 8)), seconds)
    device.run(40 * TRY_EVERY)
    assert (device.sizes.preferred.size, device.sizes.largest.size) == (4, 4)


def test_a_size_that_is_set_stays():
    device = Device(BatchSizes(2, 2), lambda size, _: 0.010)
    device.run(2 * TRIES * TRY_EVERY)
    assert set(device.runs) == {2}


async def test_a_long_queue_is_run_with_the_size_that_is_due(make, backend, observer, clock):
    """And the size that it gains by is reported, and serves from then on."""
    sizes = BatchSizes(1, 1, (1, 2))
    batcher = make(max_batch_size=2, max_queue_size=10_000, sizes=sizes)
    backend.permits.release(10 * TRIES * TRY_EVERY)
    backend.on_run = lambda: setattr(clock, "now_s", clock.now_s + 0.01)
    await asyncio.gather(*await queue(batcher, *(batcher.infer(image(1)) for _ in range(5000))))
    assert observer.corrections == [(2, 2)]
    snapshot = batcher.snapshot()
    assert (snapshot.preferred_batch_size, snapshot.max_batch_size) == (2, 2)
    lengths = [len(batch) for batch in backend.batches]
    assert lengths[: TRY_EVERY - 1] == [1] * (TRY_EVERY - 1)
    assert lengths[-1] == 2
