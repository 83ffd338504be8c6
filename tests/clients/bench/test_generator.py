"""The load generator against real gRPC servers that stall, reject, block and die."""

import os
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import grpc
import pytest

from convoy.client import InvalidRequestError, UnavailableError
from convoy.client.bench import BenchError
from convoy.client.bench.generator import LoadGenerator
from convoy.client.bench.latencies import Latencies
from convoy.client.bench.payload import CLASSIFY, Payload
from convoy.client.bench.plan import ClosedLoop, Constant, OpenLoop, Plan, Poisson, Trace
from convoy.client.bench.worker import Target
from convoy.client.connection import Connection, ConnectionOptions
from convoy.v1 import classifier_pb2 as pb
from tests.clients.conftest import ANSWER, answer, reject_first, scripted_server

# They run by the real clock: a machine that stalls for a moment fails one of them once, a fault
# in the generator each time.
pytestmark = [pytest.mark.slow, pytest.mark.flaky(reruns=2)]

REQUEST = pb.ClassifyRequest(model="m", encoded=b"x").SerializeToString()
STALL_S = 1.0


def target(server, options=None, connections=1):
    connection = Connection(server.address, 10, options or ConnectionOptions())
    return Target(connection, Payload(CLASSIFY, (REQUEST,)), connections)


@contextmanager
def generator_for(handler, processes=1, connections=1):
    with (
        scripted_server(handler) as server,
        LoadGenerator(target(server, connections=connections), processes) as generator,
    ):
        yield server, generator


class StallOnce:
    """Answers at once, except for one call that blocks all others."""

    def __init__(self):
        self.at = -1
        self._turn = threading.Lock()

    def __call__(self, request, context, earlier):
        with self._turn:
            if earlier == self.at:
                time.sleep(STALL_S)
        return ANSWER


@pytest.mark.alone
def test_a_stall_of_the_server_shows_in_an_open_loop_but_not_in_a_closed_one():
    stall = StallOnce()
    with generator_for(stall) as (server, generator):
        stall.at = server.calls + 50
        opened = generator.run(Plan(OpenLoop(Constant(100)), 0, 3.0, slo_s=STALL_S / 4))
        stall.at = server.calls + 50
        closed = generator.run(Plan(ClosedLoop(1), 0, 3.0, slo_s=STALL_S / 4))
    # 100 of 300 requests were due while the server stalled: half of them waited half of that.
    assert opened.offered == 300
    assert opened.latency.percentile_s(90) > 0.6 * STALL_S
    assert opened.latency.max_s >= STALL_S
    assert opened.good <= 300 - 70
    # The closed loop sent nothing meanwhile, so it saw one slow request.
    assert closed.latency.max_s >= STALL_S
    assert closed.latency.percentile_s(99) < STALL_S / 4
    assert closed.offered - closed.good < closed.offered / 100


@pytest.mark.alone
def test_a_stall_of_the_client_shows_and_is_reported():
    with generator_for(answer) as (_, generator):
        (pid,) = generator.worker_pids

        def stall():
            time.sleep(1)
            os.kill(pid, signal.SIGSTOP)
            time.sleep(STALL_S)
            os.kill(pid, signal.SIGCONT)

        staller = threading.Thread(target=stall)
        staller.start()
        run = generator.run(Plan(OpenLoop(Constant(100)), 0, 3.0))
        staller.join()
    assert run.offered == 300
    assert run.latency.percentile_s(90) > 0.5 * STALL_S
    assert run.lag.max_s > 0.8 * STALL_S
    assert any("late" in limit for limit in run.client_limits())


@pytest.mark.alone
def test_an_open_loop_keeps_its_times():
    seen_s = []

    def handle(request, context, earlier):
        seen_s.append(time.monotonic())
        return ANSWER

    with generator_for(handle, processes=2, connections=2) as (_, generator):
        seen_s.clear()
        run = generator.run(Plan(OpenLoop(Constant(100)), 1.0, 2.0))
    # Lateness of one request never moves the next: the last is as little late as the first.
    assert len(seen_s) == 300
    assert max(seen_s) - min(seen_s) == pytest.approx(2.99, abs=0.3)
    assert (run.offered, run.offered_per_s) == (200, 100)
    assert run.latency.count == run.lag.count == 200
    assert run.lag.percentile_s(50) < 0.02
    assert run.throughput_per_s == pytest.approx(100, rel=0.1)
    assert len(run.cores) == 2


def test_poisson_arrivals_and_a_trace_are_offered_whole():
    with generator_for(answer, processes=2) as (_, generator):
        run = generator.run(Plan(OpenLoop(Poisson(200)), 0.5, 1.0))
        assert run.offered == pytest.approx(200, abs=6 * 200**0.5)
        trace = Trace((0.0, 0.1, 0.2, 0.9, 0.95, 3.0))
        run = generator.run(Plan(OpenLoop(trace), 0.15, 1.0))
        assert (run.offered, run.latency.count) == (3, 3)


def test_rejections_are_counted_and_never_retried():
    rejected = reject_first(10_000, grpc.StatusCode.RESOURCE_EXHAUSTED)
    with generator_for(lambda *call: rejected(*call) if call[2] else ANSWER) as (server, generator):
        before = server.calls
        run = generator.run(Plan(OpenLoop(Constant(100)), 0, 1.0, slo_s=1))
        assert run.errors == {"RESOURCE_EXHAUSTED": 100}
        assert server.calls - before == run.offered == 100
        assert (run.good, run.throughput_per_s, run.holds(1)) == (0, 0, False)
        run = generator.run(Plan(ClosedLoop(2), 0, 0.5))
        # A caller pauses after a rejection, so that rejections cause no storm of retries.
        assert 0 < run.errors["RESOURCE_EXHAUSTED"] <= 2 * 0.5 / 0.01 + 2


@pytest.mark.alone
def test_missed_deadlines_and_abandoned_requests_are_errors():
    gate = threading.Event()

    def handle(request, context, earlier):
        if earlier:
            gate.wait(30)
        return ANSWER

    with generator_for(handle) as (_, generator):
        load = OpenLoop(Constant(50))
        run = generator.run(Plan(load, 0, 1.0, slo_s=10, timeout_s=1.5, max_in_flight=20))
        gate.set()
    assert sum(run.errors.values()) == run.offered == 50
    assert run.errors["NOT_SENT"] == 30
    assert run.good == 0


@pytest.mark.alone
def test_a_closed_loop_keeps_its_requests_in_flight():
    most, now, guard = 0, 0, threading.Lock()

    def handle(request, context, earlier):
        nonlocal most, now
        with guard:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with guard:
            now -= 1
        return ANSWER

    with generator_for(handle, processes=2) as (_, generator):
        run = generator.run(Plan(ClosedLoop(5), 0.2, 1.0))
    assert most == 5
    assert run.errors == {}
    assert 50 < run.throughput_per_s <= 250
    assert run.latency.percentile_s(50) >= 0.02


def test_one_slot_for_two_processes_is_one_request_in_flight():
    with generator_for(answer, processes=2) as (_, generator):
        run = generator.run(Plan(ClosedLoop(1), 0, 0.5))
    assert min(run.cores) < max(run.cores)
    assert run.latency.count > 0


def test_a_request_that_always_fails_is_reported_before_the_run():
    with (
        scripted_server(reject_first(99, grpc.StatusCode.INVALID_ARGUMENT)) as server,
        pytest.raises(InvalidRequestError, match="not now"),
        LoadGenerator(target(server), 1),
    ):
        pass
    with pytest.raises(UnavailableError), LoadGenerator(target(server), 1):
        pass


def test_a_worker_that_dies_is_an_error():
    with generator_for(answer) as (_, generator):
        os.kill(generator.worker_pids[0], signal.SIGKILL)
        with pytest.raises(BenchError, match="ended"):
            generator.run(Plan(ClosedLoop(1), 0, 0.5))


def test_a_client_that_may_be_the_bottleneck_is_reported():
    with generator_for(answer) as (_, generator):
        run = generator.run(Plan(ClosedLoop(1), 0, 0.2))
    assert replace(run, cores=(0.4, 0.5)).client_limits() == []
    (limit,) = replace(run, cores=(0.4, 0.95)).client_limits()
    assert "95% of a processor" in limit
    late = replace(run, cores=(0.1,), lag=Latencies.of([0.2]), latency=Latencies.of([0.5]))
    assert "ms late" in late.client_limits()[0]
