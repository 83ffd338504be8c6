"""One load on one server: the run of a load generator, with the processor time of all processes."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.processes import Server, busy_seconds, children_seconds, tree_seconds
from benchmarks.rounds import Run

_LOOK_S = 0.1
_IDLE_CORES = 0.1
_PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Load:
    """The parameters that are common to all candidates.

    Attributes:
        images: In a request.
        seconds: Of a measurement, without its warm-up.
        slo_ms: An answer that took no longer, counted from when its request was due, is good.
        timeout_s: How long a request waits for its answer.
    """

    model: str
    images: int = 1
    seconds: float = 4.0
    warmup_s: float = 1.0
    slo_ms: float = 50.0
    timeout_s: float = 2.0


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A POST of a tensor, DATATYPE:D,D,D; bare, or by the Open Inference Protocol for an input."""

    url: str
    tensor: str
    input: str = ""


def run(server: Server, load: Load, *flags: str, request: HttpRequest | None = None) -> Run:
    """Measures once; `other_cores` is the load of processes outside the measurement.

    Args:
        server: Whose processor time is counted.
        load: What is sent.
        flags: `--concurrency N`, or `--rate N --seed N`.
        request: Sent over HTTP; the protocol's gRPC otherwise.
    """
    command = _over_http(load, request) if request else _over_grpc(server, load)
    before_s = time.monotonic(), tree_seconds(server.pid), busy_seconds(), children_seconds()
    done = subprocess.run(
        [sys.executable, "-m", *command, *flags], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{server.address}: {done.stderr.strip()}")
    after_s = time.monotonic(), tree_seconds(server.pid), busy_seconds(), children_seconds()
    length_s, server_s, busy_s, client_s = (
        after - before for after, before in zip(after_s, before_s, strict=True)
    )
    (found,) = json.loads(done.stdout)["runs"]
    memory_mb = server.rss_mb
    _settle(server)
    # The processor time of a server without a process id is not known, so nobody else's is either.
    other_s = busy_s - server_s - client_s if server.pid else 0.0
    return {
        **found,
        "server_cpu_s": server_s,
        "client_cores": sum(found["client"]["cores"]),
        "other_cores": max(0.0, other_s / length_s),
        "ready_s": server.ready_s,
        "rss_mb": memory_mb,
    }


def _over_grpc(server: Server, load: Load) -> list[str]:
    command = [
        "convoy.client",
        "bench",
        "--address",
        server.address,
        "--json",
        "--model",
        load.model,
    ]
    command += ["--protocol", "oip", "--payload", "raw", "--images", str(load.images)]
    command += ["--metrics", "none", "--connections", "2", "--warmup-s", f"{load.warmup_s:g}"]
    return [*command, "--duration-s", f"{load.seconds:g}", *_limits(load)]


def _over_http(load: Load, request: HttpRequest) -> list[str]:
    command = ["benchmarks.http_load", request.url, "--tensor", request.tensor]
    command += ["--input", request.input] if request.input else []
    command += ["--warmup-s", f"{load.warmup_s:g}", "--seconds", f"{load.seconds:g}"]
    return [*command, *_limits(load)]


def _limits(load: Load) -> Sequence[str]:
    return ["--slo-ms", f"{load.slo_ms:g}", "--timeout-s", f"{load.timeout_s:g}"]


def _settle(server: Server) -> None:
    """Wait until a server has dropped the requests whose callers no longer wait."""
    until_s = time.monotonic() + _PATIENCE_S
    cores = 1.0
    while server.pid and cores > _IDLE_CORES and time.monotonic() < until_s:
        before_s = tree_seconds(server.pid)
        time.sleep(_LOOK_S)
        cores = (tree_seconds(server.pid) - before_s) / _LOOK_S
