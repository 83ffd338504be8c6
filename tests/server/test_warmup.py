"""Warm-up with a device whose clock the test owns."""

import gc
import threading

import numpy as np
import pytest

from server.requests import Images, Outputs
from server.warmup import settle_memory, warm_up


class TimedBackend:
    """A device with a run time for each batch size, whose first run takes ten times as long.

    Each thread has a time of its own, so that runs beside one another do not add up.
    """

    platform = device = provider = "test"

    def __init__(self, seconds_of, fixed_shapes: bool = False) -> None:
        self.fixed_shapes = fixed_shapes
        self.sizes: list[int] = []
        self._seconds_of = seconds_of

    def run(self, images: Images) -> Outputs:
        size = len(images)
        TIME.pass_by(self._seconds_of(size) * (1 if size in self.sizes else 10))
        self.sizes.append(size)
        scores = np.zeros((size, 2), np.float32)
        return Outputs(scores, scores)


class Time(threading.local):
    now_s = 0.0

    def pass_by(self, seconds: float) -> None:
        self.now_s += seconds

    def __call__(self) -> float:
        return self.now_s


TIME = Time()


def allocate(shape: tuple[int, ...]) -> Images:
    """As memory may be that was used before."""
    return np.full(shape, 255, np.uint8)


def test_sizes_double_while_larger_batches_are_faster():
    backend = TimedBackend(lambda size: 0.010 + 0.001 * size)
    model = warm_up([backend], 1, (2, 2, 3), 64, clock=TIME, allocate=allocate)
    assert list(model.table_s) == [1, 2, 4, 8, 16, 32, 64]
    # The first run of each size is not what is measured.
    assert model.mean_s(8) == pytest.approx(0.018)


def test_a_device_that_prepares_itself_runs_each_size_until_it_has():
    backend = TimedBackend(lambda size: 0.1, fixed_shapes=True)
    warm_up([backend], 1, (2, 2, 3), 2, clock=TIME, allocate=allocate)
    assert [backend.sizes.count(size) for size in (1, 2)] == [4, 4]


def test_sizes_stop_growing_where_that_brings_nothing():
    backend = TimedBackend(lambda size: 0.010 * size)
    model = warm_up([backend], 1, (2, 2, 3), 256, clock=TIME, allocate=allocate)
    assert list(model.table_s) == [1, 2, 4]
    assert model.preferred_size() == 1


def test_an_upper_bound_that_is_no_power_of_two_is_measured_itself():
    backend = TimedBackend(lambda size: 0.010, fixed_shapes=True)
    model = warm_up([backend], 1, (2, 2, 3), 6, clock=TIME, allocate=allocate)
    assert list(model.table_s) == [1, 2, 4, 6]
    assert model.padded(5) == 6


def test_what_is_predicted_is_what_the_slower_device_takes():
    fast = TimedBackend(lambda size: 0.010 + 0.001 * size)
    slow = TimedBackend(lambda size: 0.030 + 0.001 * size)
    model = warm_up([fast, slow], 2, (2, 2, 3), 64, clock=TIME, allocate=allocate)
    assert set(fast.sizes) == set(slow.sizes) == {1, 2, 4, 8, 16, 32, 64}
    assert model.mean_s(8) == pytest.approx(0.038)
    assert model.mean_on_s(0, 8) == pytest.approx(0.018)


class SharedBackend(TimedBackend):
    """A device that takes longer the more run on it, which it waits for."""

    def __init__(self, instances: int) -> None:
        super().__init__(lambda size: 0.010 * instances)
        self._all_there = threading.Barrier(instances)

    def run(self, images: Images) -> Outputs:
        self._all_there.wait(timeout=60)
        return super().run(images)


def test_every_instance_runs_while_a_batch_is_measured():
    backends = [SharedBackend(instances=2), SharedBackend(instances=2)]
    model = warm_up(backends, 4, (2, 2, 3), 4, clock=TIME, allocate=allocate)
    assert model.mean_s(1) == pytest.approx(0.020)


def test_a_device_that_cannot_run_ends_the_warm_up():
    class BrokenBackend(TimedBackend):
        def run(self, images: Images) -> Outputs:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        warm_up(
            [TimedBackend(float), BrokenBackend(float)],
            4,
            (2, 2, 3),
            4,
            clock=TIME,
            allocate=allocate,
        )


def test_settled_memory_is_out_of_the_collectors_sight():
    try:
        settle_memory()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
