"""Warm-up with a device whose clock the test owns."""

import gc

import numpy as np
import pytest

from server.requests import Images, Outputs
from server.warmup import settle_memory, warm_up


class TimedBackend:
    """A device with a run time for each batch size, whose first run takes ten times as long."""

    platform = device = provider = "test"

    def __init__(self, seconds_of, fixed_shapes: bool = False) -> None:
        self.fixed_shapes = fixed_shapes
        self.sizes: list[int] = []
        self.now_s = 0.0
        self._seconds_of = seconds_of

    def run(self, images: Images) -> Outputs:
        size = len(images)
        self.now_s += self._seconds_of(size) * (1 if size in self.sizes else 10)
        self.sizes.append(size)
        scores = np.zeros((size, 2), np.float32)
        return Outputs(scores, scores)


def test_sizes_double_while_larger_batches_are_faster():
    backend = TimedBackend(lambda size: 0.010 + 0.001 * size)
    model = warm_up(backend, (2, 2, 3), 64, clock=lambda: backend.now_s)
    assert list(model.table_s) == [1, 2, 4, 8, 16, 32, 64]
    # The first run of each size is not what is measured.
    assert model.mean_s(8) == pytest.approx(0.018)


def test_sizes_stop_growing_where_that_brings_nothing():
    backend = TimedBackend(lambda size: 0.010 * size)
    model = warm_up(backend, (2, 2, 3), 256, clock=lambda: backend.now_s)
    assert list(model.table_s) == [1, 2, 4]
    assert model.best_size() == 1


def test_an_upper_bound_that_is_no_power_of_two_is_measured_itself():
    backend = TimedBackend(lambda size: 0.010, fixed_shapes=True)
    model = warm_up(backend, (2, 2, 3), 6, clock=lambda: backend.now_s)
    assert list(model.table_s) == [1, 2, 4, 6]
    assert model.padded(5) == 6


def test_settled_memory_is_out_of_the_collectors_sight():
    try:
        settle_memory()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
