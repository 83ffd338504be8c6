"""The latency model: what it predicts, learns and recommends."""

import pytest

from convoy.server.batching import LatencyModel


def test_it_interpolates_between_sizes_and_extrapolates_beyond():
    model = LatencyModel({1: 1.0, 4: 2.5, 8: 4.5})
    assert model.mean_s(1) == 1.0
    assert model.mean_s(2) == pytest.approx(1.5)
    assert model.mean_s(6) == pytest.approx(3.5)
    assert model.mean_s(16) == pytest.approx(9.0)
    assert model.tail_s(4) == pytest.approx(2.5 * 1.4)


def test_padding_costs_what_the_padded_size_costs():
    model = LatencyModel({1: 1.0, 4: 2.0}, pads=True)
    assert [model.padded(size) for size in (1, 2, 4)] == [1, 4, 4]
    assert model.mean_s(2) == 2.0


def test_it_follows_a_device_that_slows_down():
    model = LatencyModel({1: 1.0, 2: 2.0, 4: 4.0})
    for _ in range(100):
        model.observe(2, 3.0)
    assert model.mean_s(2) == pytest.approx(3.0, rel=0.01)
    assert model.tail_s(2) == pytest.approx(3.0, rel=0.05)


def test_sizes_that_do_not_run_follow_those_that_do():
    """Or the dispatcher would wait for a batch that only looks as if it cost nothing more."""
    model = LatencyModel({1: 1.0, 8: 8.0, 16: 16.0})
    for _ in range(500):
        model.observe(8, 16.0)
    assert model.mean_s(16) == pytest.approx(32.0, rel=0.01)
    assert model.mean_s(9) - model.mean_s(8) == pytest.approx(2.0, rel=0.05)
    assert model.mean_s(1) == pytest.approx(2.0, rel=0.01)


def test_a_size_that_runs_as_often_keeps_a_time_of_its_own():
    model = LatencyModel({1: 1.0, 8: 8.0})
    for _ in range(500):
        model.observe(8, 12.0)
        model.observe(1, 1.0)
    assert model.mean_s(8) == pytest.approx(12.0, rel=0.1)
    assert model.mean_s(1) == pytest.approx(1.0, rel=0.1)


def test_a_device_with_zero_run_time_is_tracked_too():
    model = LatencyModel({1: 0.0, 2: 0.0})
    model.observe(1, 0.5)
    assert model.mean_s(2) == 0.0
    assert model.tail_s(1) > 0


def test_a_stall_widens_the_tail_more_than_it_moves_the_mean():
    model = LatencyModel({1: 1.0})
    model.observe(1, 50.0)
    assert model.mean_s(1) < 1.1
    assert model.tail_s(1) > 10


def test_runs_that_are_300_times_slower_are_learned_within_three():
    """At 0.7 ms a run that is 0.6 s; by running means alone it would be 20."""
    model = LatencyModel({1: 0.0007, 8: 0.004})
    for _ in range(3):
        model.observe(1, 0.21)
    assert model.mean_s(1) == pytest.approx(0.21)
    # It is the device that is slow, not the size.
    assert model.mean_s(8) == pytest.approx(1.2, rel=0.15)
    assert model.tail_s(1) < 0.21 * 1.5


def test_two_stalls_are_no_slow_device():
    model = LatencyModel({1: 0.001})
    for _ in range(10):
        for seconds in (0.3, 0.3, 0.001):
            model.observe(1, seconds)
    assert model.mean_s(1) < 0.006


def test_a_slow_period_ends_as_fast_as_it_began():
    model = LatencyModel({1: 0.001, 8: 0.008})
    for seconds in (0.3, 0.3, 0.3, 0.001, 0.001, 0.001):
        model.observe(1, seconds)
    assert model.mean_s(1) == pytest.approx(0.001)
    for _ in range(3):
        model.observe(8, 0.008)
    assert model.mean_s(8) == pytest.approx(0.008)


def test_a_jump_on_one_device_leaves_the_others():
    model = LatencyModel({1: 0.001}, {1: 0.001})
    for _ in range(3):
        model.observe(1, 0.3, device=1)
    assert model.mean_on_s(0, 1) == pytest.approx(0.001)
    assert model.mean_on_s(1, 1) == pytest.approx(0.3)


def test_the_slowest_device_is_what_is_predicted_size_by_size():
    model = LatencyModel({1: 1.0, 4: 4.0}, {1: 2.0, 4: 3.0})
    assert model.table_s == {1: 2.0, 4: 4.0}
    assert (model.mean_s(1), model.mean_s(4)) == (2.0, 4.0)
    assert (model.mean_on_s(0, 1), model.mean_on_s(1, 4)) == (1.0, 3.0)
    assert model.tail_s(1) == pytest.approx(2.0 * 1.4)


def test_each_device_is_followed_apart():
    """A run of the faster one says nothing of what the slower one keeps."""
    model = LatencyModel({1: 1.0}, {1: 2.0})
    for _ in range(100):
        model.observe(1, 1.0, device=0)
    assert (model.mean_s(1), model.tail_s(1)) == (2.0, pytest.approx(2.8))
    for _ in range(100):
        model.observe(1, 3.0, device=0)
    assert model.mean_s(1) == pytest.approx(3.0, rel=0.01)
    assert model.mean_on_s(1, 1) == 2.0


def test_without_measurements_nothing_is_predicted():
    model = LatencyModel()
    model.observe(1, 2.0)
    assert (model.mean_s(5), model.tail_s(5), model.padded(5)) == (0, 0, 5)
    assert model.mean_on_s(1, 5) == 0
