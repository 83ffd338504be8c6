r"""Binary REST beside gRPC on the same server, and beside others that run already.

    python -m benchmarks.rest MODELS small --rounds 5
    python -m benchmarks.rest MODELS small --granian        # and with Granian for uvicorn
    python -m benchmarks.rest MODELS small --http mosec=http://127.0.0.1:9620/inference \
        --grpc triton=127.0.0.1:9640

Closed loops of one image a request. All candidates are up at once and take turns; a round measures
each of them once. A server of --grpc is asked for the model of the same name by the Open Inference
Protocol, one of --http gets the bare tensor as FP32 [3, H, W]. Tables give the median over the
rounds with the least and the greatest; the ratio of REST to each other one is within a round.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

from benchmarks.processes import Server, cpu_seconds, serving
from benchmarks.tables import spread, table

REST = "convoy, binary REST"
Run = dict[str, float]
Rounds = dict[str, dict[int, list[Run]]]


class Candidate:
    """Something that is measured: a command of a load generator, and the server's process."""

    def __init__(self, name: str, command: list[str], server: Server | None = None) -> None:
        self.name = name
        self._command = command
        self._server = server

    def run(self, concurrency: int, seconds: float) -> Run:
        """Measures once."""
        load = ["--concurrency", str(concurrency), "--warmup-s", "0.5"]
        before_s = cpu_seconds(self._server.pid) if self._server else float("nan")
        done = subprocess.run(
            [sys.executable, "-m", *self._command, *load],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{self.name}: {done.stderr.strip()}")
        (run,) = json.loads(done.stdout)["runs"]
        spent_s = cpu_seconds(self._server.pid) - before_s if self._server else float("nan")
        images = run["throughput_per_s"] * (run["warmup_s"] + run["duration_s"])
        p99_ms = 1000 * run["latency_s"]["p99"]
        return {
            "rate": run["throughput_per_s"],
            "p99_ms": p99_ms,
            "server_cpu_ms": 1000 * spent_s / images,
        }


def http_load(url: str, seconds: float, *flags: str) -> list[str]:
    return ["benchmarks.http_load", url, "--seconds", f"{seconds:g}", *flags]


def grpc_load(address: str, arguments: argparse.Namespace) -> list[str]:
    command = ["clients", "bench", "--json", "--address", address, "--protocol", "oip"]
    command += ["--payload", "raw", "--model", arguments.model, "--metrics", "none"]
    return [*command, "--connections", "2", "--duration-s", f"{arguments.seconds:g}"]


def candidates(arguments: argparse.Namespace, stack: ExitStack) -> list[Candidate]:
    flags = ["--repository", str(arguments.models), "--device", "cpu", "--log-format", "json"]
    flags += ["--port", "0", "--http-port", "0", *arguments.flags.split()]
    height_px, width_px = arguments.size_px
    oip = ["--input", "image", "--tensor", f"UINT8:1,{height_px},{width_px},3"]
    path = f"/v2/models/{arguments.model}/infer"
    convoy = stack.enter_context(serving(["server", *flags], ""))
    rest = http_load(convoy.http + path, arguments.seconds, *oip)
    found = [
        Candidate(REST, rest, convoy),
        Candidate("convoy, gRPC", grpc_load(convoy.address, arguments), convoy),
    ]
    if arguments.granian:
        other = stack.enter_context(serving(["benchmarks.granian_server", *flags], ""))
        rest = http_load(other.http + path, arguments.seconds, *oip)
        found.append(Candidate("convoy, binary REST by Granian", rest, other))
    for external in arguments.http:
        name, _, url = external.partition("=")
        bare = ["--tensor", f"FP32:3,{height_px},{width_px}"]
        found.append(Candidate(name, http_load(url, arguments.seconds, *bare)))
    for external in arguments.grpc:
        name, _, address = external.partition("=")
        found.append(Candidate(name, grpc_load(address, arguments)))
    return found


def measure(arguments: argparse.Namespace) -> Rounds:
    """Returns by candidate and concurrency the run of each round."""
    found: Rounds = defaultdict(lambda: defaultdict(list))
    with ExitStack() as stack:
        all_of_them = candidates(arguments, stack)
        for number in range(arguments.rounds):
            for concurrency in map(int, arguments.concurrency.split(",")):
                for candidate in all_of_them:
                    run = candidate.run(concurrency, arguments.seconds)
                    found[candidate.name][concurrency].append(run)
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    return found


def row(name: str, found: Rounds) -> list[str]:
    cells = [name]
    for concurrency, runs in found[name].items():
        rests = found[REST][concurrency]
        ratios = [rest["rate"] / run["rate"] for rest, run in zip(rests, runs, strict=True)]
        cells.append(spread([run["rate"] for run in runs], 0))
        cells.append(f"{statistics.median(run['p99_ms'] for run in runs):.1f}")
        cells.append("" if name == REST else spread(ratios, 2))
    last = list(found[name].values())[-1]
    return [*cells, f"{statistics.median(run['server_cpu_ms'] for run in last):.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, help="a model repository")
    parser.add_argument("model", help="one of its models, without a second one beside it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--concurrency", default="32,64")
    parser.add_argument("--size-px", type=int, nargs=2, default=(32, 32), help="height and width")
    parser.add_argument("--flags", default="", help="further flags of convoy-server")
    parser.add_argument("--granian", action="store_true", help="needs `uv pip install granian`")
    parser.add_argument("--http", action="append", default=[], help="NAME=URL")
    parser.add_argument("--grpc", action="append", default=[], help="NAME=HOST:PORT")
    arguments = parser.parse_args()
    found = measure(arguments)
    head = ["server"]
    for concurrency in found[REST]:
        head += [f"{concurrency} under way", "p99 ms", "REST is"]
    print(table([*head, "server CPU ms/image"], [row(name, found) for name in found]))


if __name__ == "__main__":
    main()
