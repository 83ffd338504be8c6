"""What the page shows of the last minutes."""

import subprocess

import numpy as np
import pytest
import yaml
from prometheus_client import CollectorRegistry

from convoy.server.metrics.requests import ServerMetrics
from convoy.server.rest.traffic import KEPT_S, Traffic, TrafficRecorder, quantiles
from tests.needs import needs_program


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Recorded:
    """A recorder whose intervals end when a test says so."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.metrics = ServerMetrics(CollectorRegistry())
        self.traffic = Traffic(self.clock)
        self.requests = self.metrics.requests_of("digits", 1)
        self.recorder: TrafficRecorder | None = None

    def begin(self) -> None:
        self.recorder = TrafficRecorder(self.metrics.registry, self.traffic, self.clock)

    def end(self) -> None:
        self.clock.now_s += 2
        self.recorder.record()


@pytest.fixture
def recorded():
    return Recorded()


def test_an_interval_tells_rates_and_percentiles(recorded):
    recorded.begin()
    for _ in range(90):
        recorded.requests.finished("ModelInfer", "OK", 0.003)
    for _ in range(10):
        recorded.requests.finished("RestInfer", "OK", 0.2)
    recorded.requests.finished("ModelInfer", "INVALID_ARGUMENT", 0.001)
    recorded.requests.finished("ServerLive", "OK", 5.0)
    recorded.end()
    shown = recorded.traffic.of()
    assert (shown["times_s"], shown["now_s"]) == ([1002.0], 1002.0)
    series = shown["series"]
    assert (series["answered_per_s"], series["failed_per_s"]) == ([50.0], [0.5])
    assert 0.0025 < series["p50_s"][0] <= 0.005
    assert 0.1 < series["p99_s"][0] <= 0.25


def test_the_window_covers_all_intervals(recorded):
    recorded.begin()
    for duration_s in (0.003, 0.2):
        recorded.requests.finished("ModelInfer", "OK", duration_s)
        recorded.end()
    recorded.end()
    window = recorded.traffic.of()["window"]
    assert (window["answered"], window["failed"]) == (2, 0)
    assert window["answered_per_s"] == pytest.approx(2 / 6)
    assert window["p50_s"] == 0.005
    assert recorded.traffic.of()["series"]["p50_s"] == [0.00375, 0.175, None]


def test_an_interval_tells_where_the_time_went(recorded):
    recorded.requests.decoded(9.0, 1.0)
    recorded.begin()
    for duration_s in (0.2, 0.4):
        recorded.requests.decoded(duration_s, 0.1)
    recorded.metrics.decode_queue.set(7)
    recorded.end()
    series = recorded.traffic.of()["series"]
    assert series["decode_s"] == [pytest.approx(0.3)]
    assert series["decode_queued_images"] == [7]
    assert [series[name] for name in ("queue_s", "inference_s", "batch_size")] == [[None]] * 3


def test_models_are_kept_apart(recorded):
    recorded.begin()
    recorded.requests.finished("ModelInfer", "OK", 0.003)
    recorded.metrics.requests_of("digits", 2).finished("ModelInfer", "OK", 0.003)
    recorded.metrics.requests_of("colors", 1).finished("ModelInfer", "OK", 0.2)
    recorded.metrics.unknown_model.finished("ModelInfer", "NOT_FOUND", 0.001)
    recorded.end()
    windows = {
        name: recorded.traffic.of(name)["window"] for name in (None, "digits", "colors", "x")
    }
    answered = {name: window["answered"] for name, window in windows.items()}
    assert answered == {None: 3, "digits": 2, "colors": 1, "x": 0}
    assert {name: window["failed"] for name, window in windows.items()} == {
        **dict.fromkeys(answered, 0),
        None: 1,
    }
    assert windows["colors"]["p50_s"] > 0.1 > windows["digits"]["p50_s"]


def test_an_idle_interval_has_no_percentiles(recorded):
    recorded.requests.finished("ModelInfer", "OK", 0.003)
    recorded.begin()
    recorded.end()
    series = recorded.traffic.of()["series"]
    assert (series["answered_per_s"], series["p99_s"]) == ([0.0], [None])


def test_only_the_last_minutes_are_kept(recorded):
    recorded.begin()
    for _ in range(200):
        recorded.end()
    times_s = recorded.traffic.of()["times_s"]
    assert len(times_s) == KEPT_S / 2
    assert times_s[-1] - times_s[0] <= KEPT_S


def test_a_forgotten_version_takes_nothing_from_the_counts(recorded):
    for _ in range(100):
        recorded.requests.finished("ModelInfer", "OK", 0.003)
    new = recorded.metrics.requests_of("digits", 2)
    recorded.begin()
    recorded.metrics.forget("digits", 1)
    new.finished("ModelInfer", "OK", 0.003)
    recorded.end()
    assert recorded.traffic.of()["series"]["answered_per_s"] == [0.5]


BOUNDS_S = [0.001, 0.01, 0.1, 1.0, float("inf")]
# Cumulative counts, with empty buckets at each end, ranks on a bound, and requests past the last.
COUNTS = [
    [0, 1, 1, 2, 2],
    [2, 2, 2, 2, 2],
    [0, 0, 0, 0, 3],
    [0, 0, 5, 5, 9],
    [10, 20, 40, 80, 100],
    [1, 1, 1, 1, 2],
    [7, 7, 900, 999, 1000],
]


@needs_program("promtool", "prometheus")
def test_percentiles_are_those_of_histogram_quantile(tmp_path):
    """Prometheus evaluates the same buckets; an equality holds to its last digit but one."""
    series = [
        {"series": f'h_bucket{{case="{case}", le="{bound_s}"}}', "values": str(count)}
        for case, counts in enumerate(COUNTS)
        for bound_s, count in zip([*BOUNDS_S[:-1], "+Inf"], counts, strict=True)
    ]
    expected = [
        {
            "expr": f'abs(histogram_quantile({share}, h_bucket{{case="{case}"}}) - {own}) < 1e-12',
            "eval_time": "0m",
            "exp_samples": [
                {
                    "labels": f'{{case="{case}"}}',
                    "value": 0,
                }
            ],
        }
        for share in (0.01, 0.5, 0.9, 0.99, 1)
        for case, own in enumerate(quantiles(np.array(COUNTS), np.array(BOUNDS_S), share).tolist())
    ]
    for each in expected:
        # A comparison keeps its left side, which is not zero to the last digit.
        each["expr"] = f"0 * ({each['expr']})"
    tests = [{"interval": "1m", "input_series": series, "promql_expr_test": expected}]
    (tmp_path / "quantiles.yml").write_text(yaml.safe_dump({"tests": tests}))
    done = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "quantiles.yml"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
