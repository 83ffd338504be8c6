"""Warm-up with a device whose clock the test owns."""

import gc
import itertools
import threading

import numpy as np
import pytest

from convoy.server.batching import InstanceThread, LatencyModel
from convoy.server.batching.sizes import largest_size, preferred_size, throughput
from convoy.server.errors import DeviceMemoryError
from convoy.server.models.warmup import settle_memory, warm_up
from convoy.server.requests import Images, Outputs


class TimedBackend:
    """A device with a run time for each batch size, whose first run takes ten times as long.

    Each thread has a time of its own, so that runs beside one another do not add up.
    """

    platform = device = provider = "test"

    def __init__(self, seconds_of, fixed_shapes: bool = False) -> None:
        self.fixed_shapes = fixed_shapes
        self.sizes: list[int] = []
        self.runs_s: dict[int, list[float]] = {}
        self._seconds_of = seconds_of

    def elapsed(self) -> float:
        """Return the time of all runs, as if nothing else took any."""
        return sum(map(sum, self.runs_s.values()))

    def run(self, images: Images) -> Outputs:
        size = len(images)
        run_s = self._seconds_of(size) * (1 if size in self.sizes else 10)
        TIME.pass_by(run_s)
        self.runs_s.setdefault(size, []).append(run_s)
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


def instances(count: int) -> list[InstanceThread]:
    return [InstanceThread(number) for number in range(count)]


def warm_up_one(backend: TimedBackend, most: int, **options: object) -> LatencyModel:
    """Warm up one device with one instance."""
    return warm_up(
        [backend], instances(1), (2, 2, 3), most, clock=TIME, allocate=allocate, **options
    )


def test_sizes_double_while_larger_batches_are_faster():
    backend = TimedBackend(lambda size: 0.010 + 0.001 * size)
    model = warm_up([backend], instances(1), (2, 2, 3), 64, clock=TIME, allocate=allocate)
    assert list(model.table_s) == [1, 2, 4, 8, 16, 32, 64]
    # The first run of each size is not what is measured.
    assert model.mean_s(8) == pytest.approx(0.018)


def test_a_device_that_prepares_itself_runs_each_size_until_it_has():
    backend = TimedBackend(lambda size: 0.1, fixed_shapes=True)
    warm_up([backend], instances(1), (2, 2, 3), 2, clock=TIME, allocate=allocate)
    # Two runs that prepare it, and two that agree.
    assert [backend.sizes.count(size) for size in (1, 2)] == [4, 4]


def test_sizes_stop_growing_where_that_brings_nothing():
    backend = TimedBackend(lambda size: 0.010 * size)
    model = warm_up([backend], instances(1), (2, 2, 3), 256, clock=TIME, allocate=allocate)
    assert list(model.table_s) == [1, 2, 4]
    assert preferred_size(model.table_s) == 1


def test_an_upper_bound_that_is_no_power_of_two_is_measured_itself():
    backend = TimedBackend(lambda size: 0.010, fixed_shapes=True)
    model = warm_up([backend], instances(1), (2, 2, 3), 6, clock=TIME, allocate=allocate)
    assert list(model.table_s) == [1, 2, 4, 6]
    assert model.padded(5) == 6


def test_what_is_predicted_is_what_the_slower_device_takes():
    fast = TimedBackend(lambda size: 0.010 + 0.001 * size)
    slow = TimedBackend(lambda size: 0.030 + 0.001 * size)
    model = warm_up([fast, slow], instances(2), (2, 2, 3), 64, clock=TIME, allocate=allocate)
    assert set(fast.sizes) == set(slow.sizes) == {1, 2, 4, 8, 16, 32, 64}
    assert model.mean_s(8) == pytest.approx(0.038)
    assert model.mean_on_s(0, 8) == pytest.approx(0.018)


class DisturbedBackend(TimedBackend):
    """A net of 3 ms an image on a machine whose other work lengthens most runs."""

    def __init__(self, seed: int, undisturbed_share: float) -> None:
        random = np.random.default_rng(seed)

        def seconds(size: int) -> float:
            alone_s = 0.003 * size * random.uniform(1.0, 1.005)
            if random.random() < undisturbed_share:
                return alone_s
            return alone_s * (1 + random.exponential(0.5)) + random.exponential(0.002)

        super().__init__(seconds)


def test_twenty_starts_beside_other_work_choose_the_same_sizes():
    preferred, throughputs = set(), []
    for seed in range(20):
        backend = DisturbedBackend(seed, undisturbed_share=0.2)
        times_s = warm_up_one(backend, 64, elapsed=backend.elapsed).table_s
        preferred.add(preferred_size(times_s))
        largest = largest_size(times_s)
        throughputs.append(throughput(largest, 0.003 * largest))
    # With hand-overs, one image at a time has 0.94 of the best throughput.
    assert preferred == {1}
    assert min(throughputs) > 0.97 * max(throughputs)


def test_measuring_ends_with_the_budget():
    backend = DisturbedBackend(0, undisturbed_share=0.0)
    warm_up_one(backend, 4, elapsed=backend.elapsed, budget_s=0.5)
    counted_s = sum(run_s for size in (1, 2, 4) for run_s in backend.runs_s[size][1:])
    assert 0.5 <= counted_s < 0.5 + max(backend.runs_s[4][1:])


def test_handing_the_runs_over_spends_the_budget():
    backend = DisturbedBackend(0, undisturbed_share=0.0)
    readings = itertools.count()
    # A second from one reading to the next, so that each round takes one.
    warm_up_one(backend, 4, elapsed=lambda: float(next(readings)), budget_s=20.0)
    counted = sum(len(backend.runs_s[size]) - 1 for size in (1, 2, 4))
    assert counted == 20


def test_clear_times_leave_the_budget():
    backend = TimedBackend(lambda size: 0.030 * size)
    warm_up([backend], instances(1), (2, 2, 3), 4, clock=TIME, allocate=allocate, budget_s=60.0)
    assert [len(backend.runs_s[size]) for size in (1, 2, 4)] == [3, 3, 3]


def test_a_size_that_no_run_was_undisturbed_for_takes_no_longer_than_a_larger_one():
    backend = TimedBackend(lambda size: {1: 0.01, 2: 0.05, 4: 0.02}[size])
    model = warm_up([backend], instances(1), (2, 2, 3), 4, clock=TIME, allocate=allocate)
    assert model.table_s == pytest.approx({1: 0.01, 2: 0.02, 4: 0.02})


def test_a_size_that_is_set_runs_although_it_gains_nothing():
    backend = TimedBackend(lambda size: 0.010 * size)
    model = warm_up(
        [backend], instances(1), (2, 2, 3), 12, clock=TIME, allocate=allocate, whole_range=True
    )
    assert list(model.table_s) == [1, 2, 4, 8, 12]


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
    model = warm_up(backends, instances(4), (2, 2, 3), 4, clock=TIME, allocate=allocate)
    assert model.mean_s(1) == pytest.approx(0.020)


class SmallBackend(TimedBackend):
    """A device with memory for a few images."""

    def __init__(self, memory_images: int) -> None:
        super().__init__(lambda size: 0.010)
        self._memory_images = memory_images

    def run(self, images: Images) -> Outputs:
        if len(images) > self._memory_images:
            raise DeviceMemoryError
        return super().run(images)


def test_the_warm_up_stops_at_the_first_size_that_does_not_fit():
    backends = [SmallBackend(5), SmallBackend(100)]
    model = warm_up(backends, instances(4), (2, 2, 3), 64, clock=TIME, allocate=allocate)
    assert list(model.table_s) == [1, 2, 4]
    with pytest.raises(DeviceMemoryError):
        warm_up([SmallBackend(0)], instances(2), (2, 2, 3), 64, clock=TIME, allocate=allocate)


def test_a_device_that_cannot_run_ends_the_warm_up():
    class BrokenBackend(TimedBackend):
        def run(self, images: Images) -> Outputs:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        warm_up(
            [TimedBackend(float), BrokenBackend(float)],
            instances(4),
            (2, 2, 3),
            4,
            clock=TIME,
            allocate=allocate,
        )


def test_settled_memory_is_excluded_from_garbage_collection():
    try:
        settle_memory()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
