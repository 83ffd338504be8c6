"""A process that sends requests.

Requests are bytes already, and answers are not parsed: what a request costs here is gRPC's own
price. One thread keeps the time and sends; gRPC's threads take the answers.
"""

import gc
import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection as Pipe
from queue import Empty, SimpleQueue

import grpc

from clients.bench import BenchError
from clients.bench.arrivals import Share
from clients.bench.notes import Notes, Tally
from clients.bench.payload import Payload
from clients.bench.plan import ClosedLoop, Plan
from clients.connection import Connection, Metadata, RetryPolicy

# After an error a place in a closed loop rests: refusals must not set off a storm of refusals.
_REST_S = 0.01
_AFTER_THE_DEADLINE_S = 10.0
# The thread that sends waits no longer than this for Python's lock while answers come in.
_SWITCH_INTERVAL_S = 0.0005

_now_s = time.monotonic  # the same clock in every process of a machine


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to ask, and what.

    Attributes:
        connection: Where the server is.
        payload: What is sent.
        connections: TCP connections of each process.
    """

    connection: Connection
    payload: Payload
    connections: int = 1

    def open(self) -> list[grpc.Channel]:
        """Opens channels that do not retry: a refusal is a result here."""
        options = replace(
            self.connection.options, retry=RetryPolicy(attempts=1), private_connection=True
        )
        connection = replace(self.connection, options=options)
        return [connection.open() for _ in range(self.connections)]


class Sender:
    """Sends the payload's requests in turn, over the channels in turn."""

    def __init__(self, target: Target, channels: list[grpc.Channel]) -> None:
        method = target.payload.method
        stubs = [channel.unary_unary(method) for channel in channels]
        self._metadata: Metadata = target.connection.metadata()
        self._stubs: Iterator[grpc.UnaryUnaryMultiCallable] = itertools.cycle(stubs)
        self._requests: Iterator[bytes] = itertools.cycle(target.payload.requests)

    def send(
        self, notes: Notes, timeout_s: float, intended_s: float, then: Callable[[bool], None]
    ) -> None:
        """Sends one; `then` is told whether it was answered, on a thread of gRPC's."""
        sent_s = _now_s()
        notes.sent()
        call = next(self._stubs).future(
            next(self._requests), timeout=timeout_s, metadata=self._metadata
        )

        def ended(call: grpc.Future) -> None:
            done_s = _now_s()
            code = call.code()
            notes.ended(intended_s, sent_s, done_s, code)
            then(code is grpc.StatusCode.OK)

        call.add_done_callback(ended)


def run(sender: Sender, plan: Plan, share: Share, start_s: float) -> Tally:
    """Carries out one part of a plan.

    Args:
        sender: What sends.
        plan: The whole.
        share: The part that falls to this process.
        start_s: When sending begins, on the machine's monotonic clock.

    Raises:
        BenchError: Requests outlived their deadlines; the figures would be wrong.
    """
    begin_s, end_s = start_s + plan.warmup_s, start_s + plan.length_s
    notes = Notes(begin_s, end_s, plan.slo_s)
    _sleep_until(start_s)
    cpu_s = time.process_time()
    if isinstance(plan.load, ClosedLoop):
        _run_closed(sender, notes, plan, plan.load.part_of(share), end_s)
    else:
        _run_open(sender, notes, plan, plan.load.arrivals.times_s(share), start_s)
    cores = (time.process_time() - cpu_s) / plan.length_s
    if not notes.wait_until_idle(plan.timeout_s + _AFTER_THE_DEADLINE_S):
        raise BenchError(f"{notes.in_flight} requests did not end by their deadlines")
    return notes.tally(cores)


def _run_closed(sender: Sender, notes: Notes, plan: Plan, places: int, end_s: float) -> None:
    resting: SimpleQueue[float] = SimpleQueue()

    def send() -> None:
        now_s = _now_s()
        if now_s < end_s:
            sender.send(notes, plan.timeout_s, now_s, ended)

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
    sender: Sender, notes: Notes, plan: Plan, times_s: Iterator[float], start_s: float
) -> None:
    for time_s in times_s:
        if time_s >= plan.length_s:
            break
        intended_s = start_s + time_s
        _sleep_until(intended_s)
        if notes.in_flight < plan.max_in_flight:
            sender.send(notes, plan.timeout_s, intended_s, lambda answered: None)
        else:
            notes.not_sent(intended_s)
    _sleep_until(start_s + plan.length_s)


def _sleep_until(time_s: float) -> None:
    if (left_s := time_s - _now_s()) > 0:
        time.sleep(left_s)


def main(target: Target, share: Share, pipe: Pipe) -> None:
    """Carries out the plans that come through a pipe until it closes.

    For each pair of a plan and its start the pipe gets a Tally, or an exception.
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
    except Exception as error:  # the parent tells what went wrong in here
        pipe.send(BenchError(f"a worker process failed: {error}"))
    finally:
        for channel in channels:
            channel.close()
