"""The highest rate of `convoy-client bench`: requests/s against a server that does nothing.

    python -m benchmarks.load_generator --rounds 5

Closed loops of 3 KiB requests with 1, 2, … client processes in turn, against an echo by the
server's own transport in a process of its own, on the same processors. What a request costs the
client is its own figure; its rate is also bounded by what the echo takes.
"""

import argparse
import asyncio
import json
import subprocess
import sys

import grpc
import uvloop
from prometheus_client import CollectorRegistry

from benchmarks.processes import cpu_seconds, serving
from benchmarks.tables import spread, table
from convoy.server.edge.limits import ByteBudget, MessageLimits
from convoy.server.edge.listener import Listener, ListenerOptions, open_port
from convoy.server.grpc.context import GrpcBoundary
from convoy.server.grpc.endpoint import GrpcEndpoint
from convoy.server.metrics.requests import ServerMetrics
from convoy.server.security.tokens import Tokens

ECHO = ("benchmarks.load_generator", "--echo")
_MAX_BYTES = 1024 * 1024


class Nothing(grpc.GenericRpcHandler):
    """Answers every call with an empty message."""

    def service(self, details: grpc.HandlerCallDetails) -> object:
        async def answer(request: bytes, context: object) -> bytes:
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


async def echo() -> None:
    metrics = ServerMetrics(CollectorRegistry())
    endpoint = GrpcEndpoint(
        MessageLimits(_MAX_BYTES, _MAX_BYTES),
        Tokens(None),
        ByteBudget(64 * _MAX_BYTES),
        GrpcBoundary(metrics),
        metrics.calls,
    )
    endpoint.add_generic_rpc_handlers([Nothing()])
    listener = Listener(open_port("127.0.0.1", 0), endpoint, ListenerOptions())
    await listener.start()
    serving = {"event": "serving", "address": f"127.0.0.1:{listener.port}"}
    print(json.dumps(serving), file=sys.stderr, flush=True)
    await asyncio.Event().wait()


def measure(processes: int, concurrency: int, seconds: float) -> dict[str, float]:
    command = [sys.executable, "-m", "convoy.client", "bench", "--json", "--metrics", "none"]
    command += ["--protocol", "oip", "--payload", "raw", "--model", "none"]
    command += ["--input", "image:UINT8:-1,32,32,3", "--concurrency", str(concurrency)]
    command += ["--processes", str(processes), "--duration-s", f"{seconds:g}", "--warmup-s", "0.5"]
    with serving(ECHO) as server:
        before_s = cpu_seconds(server.pid)
        command += ["--address", server.address]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr.strip())
        (run,) = json.loads(done.stdout)["runs"]
        rate = run["throughput_per_s"]
        server_s = (cpu_seconds(server.pid) - before_s) / (run["warmup_s"] + run["duration_s"])
    cores = sum(run["client"]["cores"])
    return {
        "rate": rate,
        "cores": cores,
        "client_ms": 1000 * cores / rate,
        "echo_ms": 1000 * server_s / rate,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--echo", action="store_true", help="only serve the echo")
    arguments = parser.parse_args()
    if arguments.echo:
        uvloop.run(echo())
        return
    found: dict[int, list[dict[str, float]]] = {
        n: [] for n in map(int, arguments.processes.split(","))
    }
    for _ in range(arguments.rounds):
        for processes, runs in found.items():
            runs.append(measure(processes, arguments.concurrency, arguments.seconds))
    head = [
        "client processes",
        "requests/s",
        "client cores",
        "client ms/request",
        "echo ms/request",
    ]
    keys = (("rate", 0), ("cores", 2), ("client_ms", 3), ("echo_ms", 3))
    rows = [
        [str(n), *(spread((run[key] for run in runs), digits) for key, digits in keys)]
        for n, runs in found.items()
    ]
    print(table(head, rows))


if __name__ == "__main__":
    main()
