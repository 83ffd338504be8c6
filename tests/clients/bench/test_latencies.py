"""Latency histograms."""

import pickle

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram

from convoy.client.bench.latencies import PERCENTILES, Latencies


def test_percentiles_are_those_of_the_values_to_three_digits():
    seconds = np.random.default_rng(0).lognormal(-5, 1, 50_000)
    latencies = Latencies.of(seconds)
    assert latencies.count == 50_000
    for percentile in PERCENTILES:
        rank = int(50_000 * percentile / 100)
        below, above = np.sort(seconds)[[rank - 2, rank]]
        assert below * 0.998 - 1e-6 <= latencies.percentile_s(percentile) <= above * 1.002 + 1e-6
    assert latencies.mean_s == pytest.approx(seconds.mean(), rel=0.002)
    assert latencies.max_s == pytest.approx(seconds.max(), rel=0.002)


def test_parts_of_several_processes_merge_to_the_whole():
    seconds = np.random.default_rng(0).exponential(0.01, 3000)
    parts = [pickle.loads(pickle.dumps(Latencies.of(part))) for part in np.split(seconds, 3)]
    together, whole = Latencies.together(parts), Latencies.of(seconds)
    assert together.count == 3000
    assert together.percentiles_s() == whole.percentiles_s()
    assert (together.max_s, together.mean_s) == (whole.max_s, whole.mean_s)


def test_the_encoding_is_hdrhistograms_own():
    histogram = HdrHistogram.decode(Latencies.of([0.002, 0.004]).encode())
    assert histogram.get_total_count() == 2
    assert histogram.get_value_at_percentile(50) == 2000


def test_a_value_out_of_range_counts_as_the_end_of_the_range():
    latencies = Latencies.of([-1.0, 1e9])
    assert latencies.count == 2
    assert latencies.percentile_s(50) == 1e-6
    assert latencies.max_s == pytest.approx(3600, rel=0.002)


def test_an_empty_histogram_is_all_zero():
    nothing = Latencies.of([])
    assert (nothing.count, nothing.mean_s, nothing.max_s) == (0, 0, 0)
    assert set(nothing.percentiles_s().values()) == {None}


@pytest.mark.parametrize(
    ("count", "shown"),
    [(9, 0), (10, 1), (100, 4), (500, 5), (2000, 5), (5000, 6), (49_000, 6), (50_000, 7)],
)
def test_percentiles_of_few_samples_are_left_out(count, shown):
    latencies = Latencies.of([0.001] * count)
    found = [percentile for percentile in PERCENTILES if latencies.supports(percentile)]
    assert found == list(PERCENTILES[:shown])
    assert [s is None for s in latencies.percentiles_s().values()] == [False] * shown + [True] * (
        len(PERCENTILES) - shown
    )
