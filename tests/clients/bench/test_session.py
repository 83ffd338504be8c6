"""The search for the highest rate."""

import time
from threading import Lock

import pytest

from convoy.client.bench.generator import LoadGenerator, Measurement
from convoy.client.bench.latencies import Latencies
from convoy.client.bench.plan import Constant, OpenLoop, Plan
from convoy.client.bench.session import find_highest_rate
from convoy.client.bench.worker import WorkerCounts
from tests.clients.bench.test_generator import target
from tests.clients.conftest import ANSWER, scripted_server


class Capacity:
    """Measures as if a server met its objective up to a rate."""

    def __init__(self, rate_per_s):
        self.rate_per_s = rate_per_s
        self.asked = []

    def __call__(self, rate_per_s):
        self.asked.append(rate_per_s)
        good = 1000 if rate_per_s <= self.rate_per_s else 980
        errors = {"UNAVAILABLE": 1000 - good}
        counts = WorkerCounts(
            1000, good, good, errors, Latencies.of([0.01]), Latencies.of([0]), 0.1
        )
        return Measurement.of(Plan(OpenLoop(Constant(rate_per_s)), slo_s=0.1), [counts])


@pytest.mark.parametrize("capacity_per_s", [3, 90, 100, 777, 50_000])
def test_the_highest_rate_is_found_within_five_percent(capacity_per_s):
    measure = Capacity(capacity_per_s)
    found = find_highest_rate(measure, 100)
    assert capacity_per_s / 1.05 <= found.rate_per_s <= capacity_per_s
    assert len(found.runs) == len(measure.asked) <= 24
    # Held once more at the end.
    assert measure.asked[-1] == found.rate_per_s
    assert measure.asked.count(found.rate_per_s) == 2


def test_a_rate_that_fails_when_repeated_is_lowered():
    measure = Capacity(500)

    def tires(rate_per_s):
        run = measure(rate_per_s)
        if measure.asked.count(rate_per_s) == 2:
            measure.rate_per_s = 450
            run = measure(rate_per_s)
        return run

    found = find_highest_rate(tires, 100)
    assert 450 / 1.05 <= found.rate_per_s <= 450


def test_without_a_rate_in_the_objective_none_is_found():
    found = find_highest_rate(Capacity(0), 100)
    assert found.rate_per_s is None
    assert len(found.runs) == 7  # 100 down to 1.56 a second


@pytest.mark.alone
@pytest.mark.flaky(reruns=2)
def test_a_search_against_a_real_server_finds_its_capacity():
    turn = Lock()

    def one_at_a_time(request, context, earlier):
        with turn:
            time.sleep(0.02)
        return ANSWER

    with scripted_server(one_at_a_time) as server, LoadGenerator(target(server), 1) as generator:

        def measure(rate_per_s):
            return generator.run(Plan(OpenLoop(Constant(rate_per_s)), 0, 1.0, slo_s=0.3))

        found = find_highest_rate(measure, 20)
    # 50 a second can be served; a little more still meets the objective for a second.
    assert 15 < found.rate_per_s < 90
    assert all(run.plan.slo_s == 0.3 for run in found.runs)
