"""A process that sends requests, and its records of how they ended.

Requests are serialized beforehand and replies are not parsed: the cost of a request here is gRPC's
own. One thread keeps the time and sends; gRPC's threads receive the replies.
"""

import gc
import itertools
import signal
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection as Pipe
from queue import Empty, SimpleQueue
from threading import Condition

import grpc
import numpy as np

from convoy.client.bench import BenchError
from convoy.client.bench.latencies import Latencies
from convoy.client.bench.payload import CLASSIFY, Payload
from convoy.client.bench.plan import ClosedLoop, Plan, Share
from convoy.client.connection import Connection, Metadata, RetryPolicy
from convoy.v1 import classifier_pb2 as pb

_REPLY_EVERY = 16
_MAX_REPLIES = 1000
_NS_PER_S = 1e9

NOT_SENT = "NOT_SENT"


@dataclass(frozen=True, slots=True)
class WorkerCounts:
    """What one process counted of the requests that were due in the measured time.

    Attributes:
        offered: How many there were.
        good: Answered within the objective.
        answered_in_time: Answers that arrived in the measured time, whenever they were due.
        errors: The rest, by gRPC status, or NOT_SENT where the client gave up.
        latency: Of the answered ones, from the intended time to the answer.
        lag: From the intended time to the sending: the client's own part of the latency.
        cores: Processors that this process kept busy.
        decode_s: The server's decoding of some images, by its replies.
        decodes: The number of these images.
    """

    offered: int
    good: int
    answered_in_time: int
    errors: dict[str, int]
    latency: Latencies
    lag: Latencies
    cores: float
    decode_s: float = 0.0
    decodes: int = 0


class Recorder:
    """Records how requests end; called from several threads.

    Args:
        begin_s: When the measured time begins.
        end_s: When it ends.
        slo_s: What a good answer may take.
    """

    def __init__(self, begin_s: float, end_s: float, slo_s: float | None) -> None:
        self._begin_s, self._end_s = begin_s, end_s
        self._slo_s = float("inf") if slo_s is None else slo_s
        # Counted into histograms after the run, which would cost each request too much.
        self._latencies_s, self._lags_s = array("d"), array("d")
        self._answered_in_time = 0
        self._errors: Counter[str] = Counter()
        self._in_flight = 0
        self._answered = 0
        self._replies: list[bytes] = []
        # Guards the fields above; notified when nothing is in flight.
        self._changed = Condition()

    @property
    def in_flight(self) -> int:
        """Requests that were sent and have not ended."""
        return self._in_flight

    def sent(self) -> None:
        """Record that a request goes out."""
        with self._changed:
            self._in_flight += 1

    def ended(
        self,
        intended_s: float,
        sent_s: float,
        done_s: float,
        code: grpc.StatusCode,
        reply: Callable[[], bytes] | None,
    ) -> None:
        """Record that a request was answered, or ended otherwise."""
        with self._changed:
            self._in_flight -= 1
            if not self._in_flight:
                self._changed.notify_all()
            if code is not grpc.StatusCode.OK:
                self._failed(intended_s, code.name)
                return
            self._answered_in_time += self._begin_s <= done_s < self._end_s
            if self._is_measured(intended_s):
                self._latencies_s.append(done_s - intended_s)
                self._lags_s.append(sent_s - intended_s)
                self._answered += 1
                # Kept as bytes and parsed after the run, which would cost each request too much.
                sampled = self._answered % _REPLY_EVERY == 1
                if reply and sampled and len(self._replies) < _MAX_REPLIES:
                    self._replies.append(reply())

    def not_sent(self, intended_s: float) -> None:
        """Record that the client gave up on a request."""
        with self._changed:
            self._failed(intended_s, NOT_SENT)

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Wait until every request has ended; return whether they did."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._in_flight, timeout_s)

    def counts(self, cores: float) -> WorkerCounts:
        """Return the counts."""
        with self._changed:
            latencies_s = np.array(self._latencies_s)
            decodes_s = [decode_s(reply) for reply in self._replies]
            return WorkerCounts(
                offered=len(latencies_s) + sum(self._errors.values()),
                good=int((latencies_s <= self._slo_s).sum()),
                answered_in_time=self._answered_in_time,
                errors=dict(self._errors),
                latency=Latencies.of(latencies_s),
                lag=Latencies.of(np.array(self._lags_s)),
                cores=cores,
                decode_s=sum(decodes_s),
                decodes=len(decodes_s),
            )

    def _failed(self, intended_s: float, name: str) -> None:
        if self._is_measured(intended_s):
            self._errors[name] += 1

    def _is_measured(self, intended_s: float) -> bool:
        return self._begin_s <= intended_s < self._end_s


# After an error a closed loop pauses before its next request, so that rejections do not multiply.
_REST_S = 0.01
_AFTER_THE_DEADLINE_S = 10.0
# The thread that sends waits no longer than this for Python's lock while answers come in.
_SWITCH_INTERVAL_S = 0.0005

_now_s = time.monotonic  # the same clock in every process of a machine


@dataclass(frozen=True, slots=True)
class Target:
    """The server to measure, and what to send to it.

    Attributes:
        connection: Where the server is.
        payload: What is sent.
        connections: TCP connections of each process.
    """

    connection: Connection
    payload: Payload
    connections: int = 1

    def open(self) -> list[grpc.Channel]:
        """Open channels that do not retry: a rejection is a result here."""
        options = replace(
            self.connection.options, retry=RetryPolicy(attempts=1), private_connection=True
        )
        connection = replace(self.connection, options=options)
        return [connection.open() for _ in range(self.connections)]


class Sender:
    """Send the payload's requests in turn, over the channels in turn."""

    def __init__(self, target: Target, channels: list[grpc.Channel]) -> None:
        method = target.payload.method
        self._has_times = method == CLASSIFY
        stubs = [channel.unary_unary(method) for channel in channels]
        self._metadata: Metadata = target.connection.metadata()
        self._stubs: Iterator[grpc.UnaryUnaryMultiCallable] = itertools.cycle(stubs)
        self._requests: Iterator[bytes] = itertools.cycle(target.payload.requests)

    def send(
        self, recorder: Recorder, timeout_s: float, intended_s: float, then: Callable[[bool], None]
    ) -> None:
        """Send one; `then` is called with whether it was answered, on a thread of gRPC's."""
        sent_s = _now_s()
        recorder.sent()
        call = next(self._stubs).future(
            next(self._requests), timeout=timeout_s, metadata=self._metadata
        )

        def ended(call: grpc.Future) -> None:
            done_s = _now_s()
            code = call.code()
            recorder.ended(
                intended_s, sent_s, done_s, code, call.result if self._has_times else None
            )
            then(code is grpc.StatusCode.OK)

        call.add_done_callback(ended)


def decode_s(reply: bytes) -> float:
    """Return how long the server decoded the image, by its reply to Classify."""
    return float(pb.ClassifyResponse.FromString(reply).times.decode_ns) / _NS_PER_S


def run(sender: Sender, plan: Plan, share: Share, start_s: float) -> WorkerCounts:
    """Carry out one part of a plan.

    Args:
        sender: What sends.
        plan: The whole.
        share: The part that falls to this process.
        start_s: When sending begins, on the machine's monotonic clock.

    Raises:
        BenchError: Requests outlived their deadlines; the figures would be wrong.
    """
    begin_s, end_s = start_s + plan.warmup_s, start_s + plan.length_s
    recorder = Recorder(begin_s, end_s, plan.slo_s)
    _sleep_until(start_s)
    cpu_s = time.process_time()
    if isinstance(plan.load, ClosedLoop):
        _run_closed(sender, recorder, plan, plan.load.part_of(share), end_s)
    else:
        _run_open(sender, recorder, plan, plan.load.arrivals.times_s(share), start_s)
    cores = (time.process_time() - cpu_s) / plan.length_s
    if not recorder.wait_until_idle(plan.timeout_s + _AFTER_THE_DEADLINE_S):
        raise BenchError(f"{recorder.in_flight} requests did not end by their deadlines")
    return recorder.counts(cores)


def _run_closed(sender: Sender, recorder: Recorder, plan: Plan, places: int, end_s: float) -> None:
    resting: SimpleQueue[float] = SimpleQueue()

    def send() -> None:
        now_s = _now_s()
        if now_s < end_s:
            sender.send(recorder, plan.timeout_s, now_s, ended)

    def ended(answered: bool) -> None:
        if answered:
            send()
        else:
            resting.put(_now_s() + _REST_S)

    for _ in range(places):
        send()
    while (left_s := end_s - _now_s()) > 0:
        try:
            rested_s = resting.get(timeout=left_s)
        except Empty:
            return
        _sleep_until(min(rested_s, end_s))
        send()


def _run_open(
    sender: Sender, recorder: Recorder, plan: Plan, times_s: Iterator[float], start_s: float
) -> None:
    for time_s in times_s:
        if time_s >= plan.length_s:
            break
        intended_s = start_s + time_s
        _sleep_until(intended_s)
        if recorder.in_flight < plan.max_in_flight:
            sender.send(recorder, plan.timeout_s, intended_s, lambda answered: None)
        else:
            recorder.not_sent(intended_s)
    _sleep_until(start_s + plan.length_s)


def _sleep_until(time_s: float) -> None:
    if (left_s := time_s - _now_s()) > 0:
        time.sleep(left_s)


def main(target: Target, share: Share, pipe: Pipe) -> None:
    """Carry out the plans that come through a pipe until it closes.

    For each pair of a plan and its start the pipe gets a WorkerCounts, or an exception.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    channels = target.open()
    try:
        for channel in channels:
            grpc.channel_ready_future(channel).result(target.connection.timeout_s)
        pipe.send(None)
        sender = Sender(target, channels)
        gc.collect()
        gc.freeze()
        while True:
            plan, start_s = pipe.recv()
            pipe.send(run(sender, plan, share, start_s))
    except EOFError:
        pass
    except grpc.FutureTimeoutError:
        pipe.send(BenchError(f"{target.connection.address}: cannot be reached"))
    except Exception as error:  # the parent reports the error
        pipe.send(BenchError(f"a worker process failed: {error}"))
    finally:
        for channel in channels:
            channel.close()
