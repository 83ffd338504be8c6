"""Convoy's server beside raw ONNX Runtime, a naive gRPC server and others of the same protocol.

    make bench                                      # makes the model first
    python -m benchmarks.server MODELS small --rounds 5
    python -m benchmarks.server MODELS small --external triton=127.0.0.1:9001
    python -m benchmarks.server MODELS small --also "openvino=--device cpu --backend openvino"

Each candidate runs in a process of its own, the load generator (`convoy-client bench`) in another.
Candidates take turns: a round measures every one of them once, so a machine that slows down slows
all of them. Tables give the median over the rounds with the least and the greatest; ratios are to
be read within a table. A closed loop tells throughput. An open loop offers Poisson arrivals at
multiples of what Convoy reached in the closed loop and counts latency from the scheduled arrival;
goodput is what was answered within the SLO. A measurement in which other processes took part of the
machine is made again, and the calmest counts. Writes results.json, tables.md and goodput.png.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.processes import (
    Candidate,
    Server,
    busy_seconds,
    children_seconds,
    cpu_seconds,
    serving,
)
from benchmarks.tables import closed_table, goodput_table, plot_goodput, raw_table

Run = dict[str, Any]


def candidates(arguments: argparse.Namespace) -> list[Candidate]:
    model = arguments.models / arguments.model / "1" / "model.onnx"
    found = []
    for named_flags in (f"convoy={arguments.flags}", *arguments.also):
        name, _, flags = named_flags.partition("=")
        command = ["server", "--repository", str(arguments.models), *flags.split()]
        command += ["--port", "0", "--http-port", "0", "--log-format", "json"]
        slo = ["--slo-ms", f"{arguments.slo_ms:g}"]
        found.append(Candidate(name, tuple(command), (*command, *slo)))
    if not arguments.only_convoy:
        found.append(Candidate("naive grpc.aio", ("benchmarks.naive_server", str(model))))
    for external in arguments.external:
        name, _, address = external.partition("=")
        found.append(Candidate(name, address=address))
    return found


def load(server: Server, arguments: argparse.Namespace, *flags: str) -> Run:
    """Measures one load; when other processes disturb it, again, and returns the calmest run."""
    runs: list[Run] = []
    while len(runs) < arguments.tries:
        runs.append(load_once(server, arguments, *flags))
        if runs[-1]["other_cores"] <= arguments.calm:
            break
    return min(runs, key=lambda run: run["other_cores"])


def load_once(server: Server, arguments: argparse.Namespace, *flags: str) -> Run:
    """Runs `convoy-client bench` and returns its run, with what everybody used of the machine."""
    command = [sys.executable, "-m", "clients", "bench", "--address", server.address, "--json"]
    command += ["--model", arguments.model, "--protocol", "oip", "--payload", "raw"]
    command += ["--duration-s", f"{arguments.seconds:g}", "--metrics", "none", "--connections", "2"]
    command += ["--images", str(arguments.images), "--slo-ms", f"{arguments.slo_ms:g}"]
    command += ["--timeout-s", "2", *flags]
    before_s = time.monotonic(), cpu_seconds(server.pid), busy_seconds(), children_seconds()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{server.address}: {done.stderr.strip()}")
    after_s = time.monotonic(), cpu_seconds(server.pid), busy_seconds(), children_seconds()
    length_s, server_s, busy_s, client_s = (
        after - before for after, before in zip(after_s, before_s, strict=True)
    )
    (run,) = json.loads(done.stdout)["runs"]
    # An external server's processor time is not known, so nobody else's is either.
    other_s = busy_s - server_s - client_s if server.pid else 0.0
    return {
        **run,
        "server_cpu_s": server_s,
        "client_cores": sum(run["client"]["cores"]),
        "other_cores": other_s / length_s,
        "ready_s": server.ready_s,
        "rss_mb": server.rss_mb,
    }


def raw(arguments: argparse.Namespace, streams: int) -> dict[str, float]:
    model = arguments.models / arguments.model / "1" / "model.onnx"
    command = [
        sys.executable,
        "-m",
        "benchmarks.raw_onnx",
        str(model),
        "--batches",
        "1,2,4,8,16,32",
    ]
    command += ["--streams", str(streams)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_closed(arguments: argparse.Namespace) -> dict[str, dict[str, list[Run]]]:
    """Returns by candidate and load the run of each round."""
    found: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for number in range(arguments.rounds):
        for candidate in candidates(arguments):
            with serving(candidate.command, candidate.address) as server:
                for concurrency in arguments.concurrency.split(","):
                    run = load(server, arguments, "--concurrency", concurrency)
                    found[candidate.name][concurrency].append(run)
        print(f"closed loop: round {number + 1} of {arguments.rounds}", flush=True)
    return found


def measure_open(
    arguments: argparse.Namespace, capacity_per_s: float
) -> dict[str, dict[str, list[Run]]]:
    """Returns by candidate and multiple of the capacity the run of each round."""
    found: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for number in range(arguments.rounds):
        for candidate in candidates(arguments):
            with serving(candidate.slo_command or candidate.command, candidate.address) as server:
                for multiple in arguments.load.split(","):
                    rate = f"{float(multiple) * capacity_per_s:.0f}"
                    run = load(server, arguments, "--rate", rate, "--seed", str(number))
                    found[candidate.name][multiple].append(run)
        print(f"open loop: round {number + 1} of {arguments.rounds}", flush=True)
    return found


def capacity_of(runs: dict[str, list[Run]]) -> float:
    """The best throughput of a closed loop, in requests a second."""
    return max(
        statistics.median(float(run["throughput_per_s"]) for run in rounds)
        for rounds in runs.values()
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, help="a model repository")
    parser.add_argument("model", help="its model; version 1 is served as ONNX")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--concurrency", default="1,8,32,64")
    parser.add_argument("--load", default="0.8,0.95,1.3,3", help="multiples of the capacity")
    parser.add_argument("--images", type=int, default=1, help="in a request")
    parser.add_argument("--only-convoy", action="store_true", help="without the naive server")
    parser.add_argument(
        "--calm", type=float, default=0.2, help="processors that others may take of a measurement"
    )
    parser.add_argument("--tries", type=int, default=3, help="until one is calm")
    parser.add_argument("--slo-ms", type=float, default=50)
    parser.add_argument("--flags", default="--device cpu", help="further flags of convoy-server")
    parser.add_argument(
        "--also", action="append", default=[], help="NAME=FLAGS: convoy-server with other flags"
    )
    parser.add_argument("--external", action="append", default=[], help="NAME=ADDRESS")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    alone = {f"{streams} streams": raw(arguments, streams) for streams in (1, 2)}
    closed = measure_closed(arguments)
    # What two one-thread sessions do together is what the processors could do.
    raw_per_s = max(alone["2 streams"].values())
    tables = [raw_table(alone), closed_table(closed, arguments.images, raw_per_s)]
    results: dict[str, object] = {"raw": alone, "closed": closed}
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.load:
        capacity_per_s = capacity_of(closed["convoy"])
        found = measure_open(arguments, capacity_per_s)
        tables.append(goodput_table(found, capacity_per_s, arguments.slo_ms))
        plot_goodput(found, arguments.out / "goodput.png")
        results["open"] = found
    (arguments.out / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (arguments.out / "tables.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    print("\n\n".join(["", *tables]))


if __name__ == "__main__":
    main()
