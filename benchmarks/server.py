r"""Convoy's server compared with raw ONNX Runtime, a minimal gRPC server and others.

    make bench                                      # makes the model first
    python -m benchmarks.server MODELS small --rounds 5
    python -m benchmarks.server MODELS small --external triton=127.0.0.1:9001,4711 \
        --http mosec=http://127.0.0.1:9002/inference,4712
    python -m benchmarks.server MODELS small --also "openvino=--device cpu --backend openvino"

Each candidate runs in a process of its own, the load generator (`convoy-client bench`, or
benchmarks/http_load.py) in another. Candidates take turns: a round measures every one of them once
at a load, so a machine that slows down slows all of them. Rounds in which other processes took part
of the machine do not count and are made again. Tables give the median over the rounds with the
least and the greatest; ratios are within a round. A closed loop tells throughput. An open loop
offers Poisson arrivals at multiples of what Convoy reached in the closed loop and counts latency
from the scheduled arrival; goodput is what was answered within the SLO. Writes results.json,
tables.md and goodput.png.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.candidates import (
    CONVOY,
    REST,
    Candidate,
    add_options,
    convoy_command,
    externals,
    load_of,
    over_rest,
    started,
    turns,
)
from benchmarks.rounds import Measure, Round, Run, by_candidate
from benchmarks.tables import closed_table, goodput_table, plot_goodput, raw_table


def onnx_file(arguments: argparse.Namespace) -> str:
    return str(Path(arguments.models) / arguments.model / "1" / "model.onnx")


@contextmanager
def candidates(
    arguments: argparse.Namespace, *convoy_flags: str
) -> Iterator[Mapping[str, Candidate]]:
    load = load_of(arguments, arguments.images)
    commands: dict[str, Sequence[str]] = {}
    for named_flags in (f"{CONVOY}={arguments.flags}", *arguments.also):
        name, _, flags = named_flags.partition("=")
        commands[name] = [*convoy_command(arguments.models, flags), *convoy_flags]
    if not arguments.only_convoy:
        commands["naive grpc.aio"] = ["benchmarks.naive_server", onnx_file(arguments)]
    with started(commands, load, externals(arguments, load)) as found:
        rest = {REST: over_rest(found[CONVOY], arguments)} if arguments.rest else {}
        yield {**found, **rest}


def raw(arguments: argparse.Namespace, streams: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.raw_onnx", onnx_file(arguments)]
    command += ["--batches", "1,2,4,8,16,32", "--streams", str(streams)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_closed(arguments: argparse.Namespace) -> dict[str, list[Round]]:
    """Return the results of each round by requests in flight."""

    @contextmanager
    def up() -> Iterator[Mapping[str, Measure]]:
        with candidates(arguments) as found:
            yield {name: candidate.closed for name, candidate in found.items()}

    return turns(arguments).take(arguments.concurrency.split(","), up)


def measure_open(arguments: argparse.Namespace, capacity_per_s: float) -> dict[str, list[Round]]:
    """Return by multiple of the capacity what each round found."""

    @contextmanager
    def up() -> Iterator[Mapping[str, Measure]]:
        with candidates(arguments, "--slo-ms", f"{arguments.slo_ms:g}") as found:
            yield {name: _open(candidate, capacity_per_s) for name, candidate in found.items()}

    return turns(arguments).take(arguments.load.split(","), up)


def _open(candidate: Candidate, capacity_per_s: float) -> Measure:
    def measure(multiple: str, number: int) -> Run:
        rate = f"{float(multiple) * capacity_per_s:.0f}"
        return candidate.measure("--rate", rate, "--seed", str(number))

    return measure


def capacity_of(found: Mapping[str, Sequence[Round]]) -> float:
    """Convoy's best throughput in a closed loop, in requests a second."""
    return max(
        statistics.median(float(each[CONVOY]["throughput_per_s"]) for each in rounds)
        for rounds in found.values()
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--concurrency", default="1,8,32,64")
    parser.add_argument("--load", default="0.8,0.95,1.3,3", help="multiples of the capacity")
    parser.add_argument("--images", type=int, default=1, help="in a request")
    parser.add_argument("--only-convoy", action="store_true", help="without the naive server")
    parser.add_argument(
        "--also", action="append", default=[], help="NAME=FLAGS: convoy-server with other flags"
    )
    parser.add_argument("--rest", action="store_true", help="ask Convoy by binary REST as well")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    alone = {f"{streams} streams": raw(arguments, streams) for streams in (1, 2)}
    # What two one-thread sessions do together is what the processors could do.
    raw_per_s = max(alone["2 streams"].values())
    closed = measure_closed(arguments)
    tables = [raw_table(alone), closed_table(by_candidate(closed), arguments.images, raw_per_s)]
    results: dict[str, object] = {"raw": alone, "closed": closed}
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.load:
        capacity_per_s = capacity_of(closed)
        found = measure_open(arguments, capacity_per_s)
        tables.append(goodput_table(by_candidate(found), capacity_per_s, arguments.slo_ms))
        plot_goodput(by_candidate(found), arguments.out / "goodput.png")
        results["open"] = found
    (arguments.out / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (arguments.out / "tables.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    print("\n\n".join(["", *tables]))


if __name__ == "__main__":
    main()
