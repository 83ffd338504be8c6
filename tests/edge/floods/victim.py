"""What an attack does to others: an ordinary caller beside it, the server's memory and time."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np

from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import inference_pb2_grpc
from tests.edge.floods.attacks import ATTACKS
from tests.edge.floods.peer import Outcome
from tests.processes import ServerProcess

CALLS_PER_S = 50
CALL_TIMEOUT_S = 20
BURST_CALLS = 200
_MIB = 1024 * 1024
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Caller:
    """What an ordinary caller saw.

    Attributes:
        p99_s: Of its calls' latency, from the time each was due.
        max_s: The longest.
        failures: Calls that were not answered, by status.
    """

    p99_s: float
    max_s: float
    failures: dict[str, int]


@dataclass(frozen=True)
class Damage:
    """What a server looked like under an attack.

    Attributes:
        caller: What its ordinary caller saw.
        elsewhere: What the ordinary caller of a server saw that nobody attacked, at the same time.
        outcome: What the attacker saw.
        grown_mib: The most memory it held beyond what it held before.
        processor_s: Processor time that it used.
    """

    caller: Caller
    elsewhere: Caller
    outcome: Outcome
    grown_mib: float
    processor_s: float


def call_for(channel: grpc.Channel, seconds: float, token: str = "") -> Caller:
    """Makes 50 calls a second for so long, without waiting for replies, and returns how it went."""
    images = np.zeros((1, 4, 6, 3), np.uint8)
    request = pb.ModelInferRequest(
        model_name="colors",
        inputs=[{"name": "image", "datatype": "UINT8", "shape": images.shape}],
        raw_input_contents=[images.tobytes()],
    )
    infer = inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
    ended_s: dict[int, float] = {}
    due_s: list[float] = []
    calls: list[grpc.Future] = []
    start_s = time.monotonic()
    for number in range(int(seconds * CALLS_PER_S)):
        due_s.append(start_s + number / CALLS_PER_S)
        time.sleep(max(0.0, due_s[-1] - time.monotonic()))
        call = infer.future(request, timeout=CALL_TIMEOUT_S, metadata=_metadata(token))
        call.add_done_callback(lambda _, n=number: ended_s.__setitem__(n, time.monotonic()))
        calls.append(call)
    failures: Counter[str] = Counter()
    for call in calls:
        error = call.exception()
        if error:
            failures[f"{error.code().name}: {error.details()}"] += 1
    while len(ended_s) < len(calls):
        time.sleep(0.001)
    latencies_s = [ended_s[number] - due for number, due in enumerate(due_s)]
    return Caller(float(np.percentile(latencies_s, 99)), max(latencies_s), dict(failures))


def _burst_s(channel: grpc.Channel, token: str) -> float:
    start_s = time.monotonic()
    live = inference_pb2_grpc.GRPCInferenceServiceStub(channel).ServerLive
    request = pb.ServerLiveRequest()
    calls = [live.future(request, metadata=_metadata(token)) for _ in range(BURST_CALLS)]
    for call in calls:
        call.result()
    return time.monotonic() - start_s


def _metadata(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),) if token else ()


class Attacker:
    """A process that attacks servers of ours, one attack at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.edge.floods.attacks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Attacker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def start(self, name: str, address: str, seconds: float) -> None:
        """Begins an attack, which ends by itself."""
        assert self._process.stdin
        order = {"name": name, "address": address, "seconds": seconds}
        print(json.dumps(order), file=self._process.stdin, flush=True)

    def outcome(self) -> Outcome:
        """Waits for the end of the attack and returns how the server reacted."""
        assert self._process.stdout
        return Outcome(**json.loads(self._process.stdout.readline()))


@dataclass(frozen=True)
class Bystanders:
    """Two servers, each with the channel of an ordinary caller, and that caller's token."""

    servers: dict[str, ServerProcess]
    channels: dict[str, grpc.Channel]
    attacker: Attacker
    token: str = ""

    def burst_s(self) -> float:
        """Returns how long the servers take, in the median, for a burst of ordinary calls."""
        return statistics.median(
            _burst_s(channel, self.token) for channel in self.channels.values() for _ in range(3)
        )

    def attack(self, transport: str, name: str, seconds: float) -> Damage:
        """Attacks one of the servers, without a token, while both are called."""
        server, pid = self.servers[transport], self.servers[transport].process.pid
        address = server.url.removeprefix("http://") if ATTACKS[name].rest else server.address
        before_mib, before_s = _reset_peak(pid), processor_s(pid)
        seconds += ATTACKS[name].setup_s
        self.attacker.start(name, address, seconds)
        # The last calls come when the attacker has left.
        callers = self.call(seconds + 0.2)
        outcome = self.attacker.outcome()
        grown_mib = memory_mib(pid, "VmHWM") - before_mib
        (elsewhere,) = (seen for other, seen in callers.items() if other != transport)
        spent_s = processor_s(pid) - before_s
        return Damage(callers[transport], elsewhere, outcome, grown_mib, spent_s)

    def call(self, seconds: float) -> dict[str, Caller]:
        """Calls both servers at the same time; returns what each caller saw."""
        with ThreadPoolExecutor() as threads:
            seen = {
                transport: threads.submit(call_for, channel, seconds, self.token)
                for transport, channel in self.channels.items()
            }
            return {transport: caller.result() for transport, caller in seen.items()}


def memory_mib(pid: int, field: str = "VmRSS") -> float:
    """Returns a process' resident memory: VmRSS now, VmHWM its peak."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"no {field} for process {pid}")


def processor_s(pid: int) -> float:
    """Returns the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _reset_peak(pid: int) -> float:
    """Makes the present memory the peak, and returns it."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")
    return memory_mib(pid)
