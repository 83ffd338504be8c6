"""What the page is told of the last minutes."""

import pytest
from prometheus_client import CollectorRegistry

from server.http.history import KEPT_S, History
from server.metrics import ServerMetrics


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def requests(registry):
    metrics = ServerMetrics(registry)
    return metrics.requests_of("digits", 1)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_an_interval_tells_rates_and_percentiles(registry, requests):
    clock = Clock()
    history = History(registry, clock)
    for _ in range(90):
        requests.finished("ModelInfer", "OK", 0.003)
    for _ in range(10):
        requests.finished("RestInfer", "OK", 0.2)
    requests.finished("ModelInfer", "INVALID_ARGUMENT", 0.001)
    requests.finished("ServerLive", "OK", 5.0)
    clock.now_s += 2
    history.record()
    (interval,) = history.recent()
    assert (interval["at_s"], interval["requests_per_s"]) == (1002.0, 50.0)
    assert interval["errors_per_s"] == 0.5
    assert 0.0025 < interval["p50_s"] <= 0.005
    assert 0.1 < interval["p99_s"] <= 0.25


def test_an_idle_interval_has_no_percentiles(registry, requests):
    clock = Clock()
    requests.finished("ModelInfer", "OK", 0.003)
    history = History(registry, clock)
    clock.now_s += 2
    history.record()
    (interval,) = history.recent()
    assert (interval["requests_per_s"], interval["p99_s"]) == (0.0, None)


def test_only_the_last_minutes_are_kept(registry, requests):
    clock = Clock()
    history = History(registry, clock)
    for _ in range(200):
        clock.now_s += 2
        history.record()
    assert history.recent()[-1]["at_s"] - history.recent()[0]["at_s"] <= KEPT_S


def test_a_forgotten_version_takes_nothing_from_the_counts(registry):
    metrics, clock = ServerMetrics(registry), Clock()
    old, new = metrics.requests_of("digits", 1), metrics.requests_of("digits", 2)
    for _ in range(100):
        old.finished("ModelInfer", "OK", 0.003)
    history = History(registry, clock)
    metrics.forget("digits", 1)
    new.finished("ModelInfer", "OK", 0.003)
    clock.now_s += 2
    history.record()
    assert history.recent()[0]["requests_per_s"] >= 0
