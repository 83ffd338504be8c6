"""The metrics of requests and models: resolved once, in closed sets, gone with their version."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from convoy.server.metrics.requests import RunsOn, ServerMetrics
from convoy.server.requests import Outcome


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> ServerMetrics:
    return ServerMetrics(registry)


def test_goodput_counts_only_answers_before_their_deadline(metrics, registry):
    requests = metrics.requests_of("digits", 1)
    requests.outcome(Outcome.OK)
    requests.outcome(Outcome.OK, slack_s=0.02)
    requests.outcome(Outcome.OK, slack_s=-0.001)
    requests.outcome(Outcome.FULL, slack_s=1.0)
    labels = {"model": "digits", "version": "1"}
    assert registry.get_sample_value("convoy_in_slo_requests_total", labels) == 2
    assert registry.get_sample_value("convoy_deadline_slack_seconds_count", labels) == 2
    assert registry.get_sample_value("convoy_outcomes_total", {**labels, "reason": "ok"}) == 3
    assert registry.get_sample_value("convoy_outcomes_total", {**labels, "reason": "full"}) == 1


def test_a_forgotten_version_leaves_nothing_and_a_late_reply_does_not_revive_it(metrics, registry):
    for version in (1, 2):
        requests = metrics.requests_of("digits", version)
        requests.finished("ModelInfer", "OK", 0.004)
        requests.outcome(Outcome.OK, slack_s=0.1)
        metrics.models.loaded("digits", version, 0.5, 0.1)
        runs_on = RunsOn("onnx_onnxv1", "cpu", "CPUExecutionProvider", "fp32")
        metrics.models.serves("digits", version, runs_on)
    requests.close()
    metrics.forget("digits", 2)
    requests.finished("ModelInfer", "OK", 0.004)
    requests.finished("ModelInfer", "INTERNAL", 0.004)
    requests.outcome(Outcome.OK, slack_s=0.1)
    requests.outcome(Outcome.BACKEND)
    text = generate_latest(registry).decode()
    assert 'version="1"' in text
    assert 'version="2"' not in text


def test_a_closed_version_that_never_answered_stays_absent(metrics, registry):
    requests = metrics.requests_of("digits", 3)
    requests.outcome(Outcome.INVALID)
    requests.close()
    metrics.forget("digits", 3)
    requests.outcome(Outcome.OK, slack_s=0.1)
    assert 'version="3"' not in generate_latest(registry).decode()
