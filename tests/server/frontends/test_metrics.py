"""The metrics of several processes as one."""

import pytest
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from convoy.server.frontends.merged_metrics import MergedRegistry, samples_of
from convoy.server.metrics.requests import ServerMetrics
from convoy.server.requests import Outcome


def registry_with(ok: int, version: int = 1) -> CollectorRegistry:
    registry = CollectorRegistry()
    requests = ServerMetrics(registry).requests_of("digits", version)
    for _ in range(ok):
        requests.finished("ModelInfer", "OK", 0.003)
        requests.outcome(Outcome.OK)
    return registry


def shown(registry: MergedRegistry, name: str, **labels: str) -> list[float]:
    text = generate_latest(registry).decode()
    return [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]


@pytest.fixture
def merged() -> MergedRegistry:
    merged = MergedRegistry(registry_with(ok=1))
    merged.update(7, samples_of(registry_with(ok=10)))
    merged.update(8, samples_of(registry_with(ok=100)))
    return merged


def test_counters_and_histograms_are_added_up(merged):
    assert shown(merged, "convoy_outcomes_total", reason="ok") == [111]
    duration = "convoy_request_duration_seconds"
    assert shown(merged, f"{duration}_count") == [111]
    assert shown(merged, f"{duration}_sum") == [pytest.approx(0.333)]
    assert shown(merged, f"{duration}_bucket", le="0.0025") == [0]
    assert shown(merged, f"{duration}_bucket", le="0.005") == [111]


def test_what_only_another_process_counted_is_shown(merged):
    merged.update(8, samples_of(registry_with(ok=5, version=2)))
    assert shown(merged, "convoy_outcomes_total", version="1") == [11]
    assert shown(merged, "convoy_outcomes_total", version="2") == [5]


def test_nothing_falls_when_a_process_ends_and_another_starts(merged):
    merged.ended(8)
    assert shown(merged, "convoy_outcomes_total") == [111]
    merged.update(9, samples_of(registry_with(ok=1000)))
    assert shown(merged, "convoy_outcomes_total") == [1111]


def process_registry(open_calls: int) -> CollectorRegistry:
    registry = CollectorRegistry()
    ServerMetrics(registry).calls.open["grpc"] = open_calls
    ProcessCollector(registry=registry)
    return registry


def test_what_an_ended_process_held_is_gone_and_its_processor_time_is_not():
    merged = MergedRegistry(process_registry(open_calls=1))
    (own_s,) = shown(merged, "process_cpu_seconds_total")
    (started_at,) = shown(merged, "process_start_time_seconds")
    merged.update(7, samples_of(process_registry(open_calls=10)))
    assert shown(merged, "convoy_open_calls", protocol="grpc") == [11]
    assert shown(merged, "process_cpu_seconds_total")[0] >= 2 * own_s
    assert shown(merged, "process_start_time_seconds") == [started_at]
    merged.ended(7)
    assert shown(merged, "convoy_open_calls", protocol="grpc") == [1]
    assert shown(merged, "process_cpu_seconds_total")[0] >= 2 * own_s


def test_nothing_is_kept_of_an_unloaded_version_for_ended_processes(merged):
    merged.ended(8)
    merged.forget("digits", 1)
    assert shown(merged, "convoy_outcomes_total") == [11]


def test_the_restricted_registry_has_the_named_samples_alone(merged):
    (family,) = merged.restricted_registry(["convoy_outcomes_total"]).collect()
    assert [sample.value for sample in family.samples if sample.value] == [111]
