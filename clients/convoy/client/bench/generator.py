"""Several processes that send one load, and their measurement."""

import multiprocessing
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any

import grpc

from convoy.client.bench import BenchError
from convoy.client.bench.latencies import Latencies
from convoy.client.bench.plan import Plan, Share
from convoy.client.bench.stages import Counts, MetricsPage, Stages
from convoy.client.bench.worker import Target, WorkerCounts, main
from convoy.client.errors import from_rpc_error

_UNTIL_START_S = 0.1
_UNTIL_READY_S = 60.0
_UNTIL_ANSWERED_S = 60.0
# Python runs one thread at a time: a process cannot use much more than this of a processor to send.
_BUSY_CORES = 0.85
_NO_COUNTS: Counts = {}
_ENDED = "a worker process ended"
_LATE_S = 0.002
_LATE_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Measurement:
    """The measurement of a run.

    Attributes:
        plan: How it was made.
        offered: Requests that were due in the measured time.
        good: Those answered within the objective, counted from when they were due.
        errors: Those not answered, by gRPC status.
        throughput_per_s: Answers that arrived in the measured time, per second.
        latency: Of those answered, from when they were due to the answer.
        lag: Of those answered, from when they were due to when they were sent.
        cores: Processors that each client process kept busy.
        stages: Where the time went, if the server reports it.
    """

    plan: Plan
    offered: int
    good: int
    errors: dict[str, int]
    throughput_per_s: float
    latency: Latencies
    lag: Latencies
    cores: tuple[float, ...]
    stages: Stages | None

    @classmethod
    def of(
        cls,
        plan: Plan,
        parts: Sequence[WorkerCounts],
        before: Counts = _NO_COUNTS,
        after: Counts = _NO_COUNTS,
    ) -> "Measurement":
        """Combine the parts, with the server's metrics before and after."""
        latency = Latencies.together(part.latency for part in parts)
        lag = Latencies.together(part.lag for part in parts)
        errors: Counter[str] = Counter()
        for part in parts:
            errors.update(part.errors)
        return cls(
            plan=plan,
            offered=sum(part.offered for part in parts),
            good=sum(part.good for part in parts),
            errors=dict(errors),
            throughput_per_s=sum(part.answered_in_time for part in parts) / plan.duration_s,
            latency=latency,
            lag=lag,
            cores=tuple(part.cores for part in parts),
            stages=Stages.of(latency, lag, before, after, _mean_decode_s(parts)),
        )

    @property
    def offered_per_s(self) -> float:
        """Requests that were due, per second."""
        return self.offered / self.plan.duration_s

    @property
    def goodput_per_s(self) -> float | None:
        """Good answers per second; None without an objective."""
        return None if self.plan.slo_s is None else self.good / self.plan.duration_s

    def holds(self, percentile: float) -> bool:
        """Return whether that share of the due requests, in percent, was good; errors are not."""
        return self.offered > 0 and self.good >= self.offered * percentile / 100

    def client_limits(self) -> list[str]:
        """Return warnings where the client, not the server, may have limited the results."""
        limits = []
        busiest = max(self.cores)
        if busiest > _BUSY_CORES:
            limits.append(f"a client process used {busiest:.0%} of a processor: use more processes")
        lag_s = self.lag.percentile_s(99)
        if lag_s > max(_LATE_S, _LATE_SHARE * self.latency.percentile_s(99)):
            limits.append(f"1 % of the requests were sent more than {1000 * lag_s:.1f} ms late")
        return limits


class LoadGenerator:
    """Client processes that carry out plans, one after another.

    Example:
        with LoadGenerator(target, processes=2) as generator:
            print(generator.run(Plan(ClosedLoop(8))).latency.percentile_s(99))

    Args:
        target: The server, and what to send.
        processes: How many share the load; they are spawned, never forked.
        metrics: The server's own metrics, read before and after each run.

    Raises, on entry, a ServerError when the server does not answer the payload.
    """

    def __init__(self, target: Target, processes: int, metrics: MetricsPage | None = None) -> None:
        self._target = target
        self._count = processes
        self._metrics = metrics
        self._workers: list[tuple[SpawnProcess, Pipe]] = []

    def __enter__(self) -> "LoadGenerator":
        _probe(self._target)
        context = multiprocessing.get_context("spawn")
        try:
            for index in range(self._count):
                here, there = context.Pipe()
                share = Share(index, self._count)
                worker = context.Process(
                    target=main,
                    args=(self._target, share, there),
                    name=f"bench-{index}",
                    daemon=True,
                )
                worker.start()
                there.close()
                self._workers.append((worker, here))
            for _, pipe in self._workers:
                _receive(pipe, _UNTIL_READY_S)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    @property
    def worker_pids(self) -> list[int]:
        """The ids of the client processes, e.g. to bind them to processors."""
        return [worker.pid for worker, _ in self._workers if worker.pid]

    def run(self, plan: Plan) -> Measurement:
        """Carry out a plan.

        Raises:
            BenchError: A worker process failed.
        """
        start_s = time.monotonic() + _UNTIL_START_S
        for _, pipe in self._workers:
            _send(pipe, (plan, start_s))
        before: Counts = {}
        if self._metrics:
            time.sleep(max(0.0, start_s + plan.warmup_s - time.monotonic()))
            before = self._metrics.read()
        patience_s = plan.length_s + plan.timeout_s + _UNTIL_ANSWERED_S
        parts = [_receive(pipe, patience_s) for _, pipe in self._workers]
        if self._metrics is None:
            return Measurement.of(plan, parts)
        return Measurement.of(plan, parts, before, self._metrics.read())

    def _stop(self) -> None:
        for worker, pipe in self._workers:
            pipe.close()
            worker.terminate()
        for worker, _ in self._workers:
            worker.join()
        self._workers.clear()


def _mean_decode_s(parts: Sequence[WorkerCounts]) -> float:
    decodes = sum(part.decodes for part in parts)
    return sum(part.decode_s for part in parts) / decodes if decodes else 0.0


def _probe(target: Target) -> None:
    """Send one request, so that a mistake in it gives one error at once."""
    channel, *others = target.open()
    try:
        channel.unary_unary(target.payload.method)(
            target.payload.requests[0],
            timeout=target.connection.timeout_s,
            metadata=target.connection.metadata(),
        )
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error
    finally:
        for opened in (channel, *others):
            opened.close()


def _send(pipe: Pipe, message: object) -> None:
    try:
        pipe.send(message)
    except OSError as error:
        raise BenchError(_ENDED) from error


def _receive(pipe: Pipe, timeout_s: float) -> Any:
    try:
        message = pipe.recv() if pipe.poll(timeout_s) else BenchError("a worker process hangs")
    except (EOFError, OSError):
        message = BenchError(_ENDED)
    if isinstance(message, BaseException):
        raise message
    return message
