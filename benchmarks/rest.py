r"""Binary REST compared with gRPC on the same server, and with other servers that already run.

    python -m benchmarks.rest MODELS small --rounds 5
    python -m benchmarks.rest MODELS small --http mosec=http://127.0.0.1:9620/inference,4712 \
        --external triton=127.0.0.1:9640,4711

Closed loops of one image a request. All candidates are up at once and take turns; a round measures
each of them once, and does not count where other processes took part of the machine. A server of
--external is asked for the model of the same name by the Open Inference Protocol, one of --http
gets the bare tensor. Tables give the median over the rounds with the least and the greatest; the
ratio of REST to each other one is within a round.
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from benchmarks.candidates import (
    CONVOY,
    REST,
    add_options,
    convoy_command,
    externals,
    load_of,
    over_rest,
    started,
    turns,
)
from benchmarks.rounds import Measure, Round, Run, by_candidate
from benchmarks.tables import server_cpu_ms, spread, table


@contextmanager
def candidates(arguments: argparse.Namespace) -> Iterator[Mapping[str, Measure]]:
    load = load_of(arguments)
    commands: dict[str, Sequence[str]] = {CONVOY: convoy_command(arguments.models, arguments.flags)}
    with started(commands, load, externals(arguments, load)) as found:
        rest = {REST: over_rest(found[CONVOY], arguments)}
        yield {name: candidate.closed for name, candidate in {**rest, **found, **rest}.items()}


def row(name: str, found: Mapping[str, Mapping[str, Sequence[Run]]]) -> list[str]:
    cells = [name]
    for concurrency, runs in found[name].items():
        pairs = zip(found[REST][concurrency], runs, strict=True)
        ratios = [rest["throughput_per_s"] / run["throughput_per_s"] for rest, run in pairs]
        cells.append(spread([run["throughput_per_s"] for run in runs], 0))
        cells.append(f"{1000 * statistics.median(run['latency_s']['p99'] for run in runs):.1f}")
        cells.append("" if name == REST else spread(ratios, 2))
    last = list(found[name].values())[-1]
    return [*cells, f"{server_cpu_ms(last):.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--concurrency", default="32,64")
    arguments = parser.parse_args()
    rounds: dict[str, list[Round]] = turns(arguments).take(
        arguments.concurrency.split(","), lambda: candidates(arguments)
    )
    found = by_candidate(rounds)
    head = ["server"]
    for concurrency, made in rounds.items():
        head += [f"{concurrency} under way, {len(made)} rounds", "p99 ms", "REST is"]
    print(table([*head, "server CPU ms/image"], [row(name, found) for name in found]))


if __name__ == "__main__":
    main()
