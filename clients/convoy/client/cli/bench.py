"""`bench` and `bench compare`: measure a server under load, and compare two measurements."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from convoy.client.cli.options import Address, Model
from convoy.client.connection import DEFAULT_ADDRESS, Connection
from convoy.client.cpus import usable_cpus
from convoy.client.errors import UsageError

if TYPE_CHECKING:
    from convoy.client.bench.generator import Measurement

_MOST_PROCESSES = 8


class Protocol(StrEnum):
    """The API to measure."""

    CONVOY = "convoy"
    OIP = "oip"


class Form(StrEnum):
    """The form of an image."""

    ENCODED = "encoded"
    RAW = "raw"


class Gaps(StrEnum):
    """The distribution of an open loop's sending times."""

    POISSON = "poisson"
    CONSTANT = "constant"


def bench(
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILE]...",
            help="Image files or, for tensors, .npy arrays to send in turn. Without any, raw "
            "payloads are random.",
            show_default=False,
        ),
    ] = None,
    *,
    model: Model = "",
    version: Annotated[
        int, typer.Option(help="The model's version; 0 for the one in service.", min=0)
    ] = 0,
    protocol: Annotated[
        Protocol, typer.Option(help="Convoy's own API, or the Open Inference Protocol v2.")
    ] = Protocol.CONVOY,
    payload: Annotated[
        Form, typer.Option(help="encoded: image files, which the server decodes. raw: pixels.")
    ] = Form.ENCODED,
    tensor: Annotated[
        str,
        typer.Option(
            "--input",
            help="Input for the Open Inference Protocol, NAME:DATATYPE:D,D,D; by default as the "
            "server describes it.",
        ),
    ] = "",
    images: Annotated[
        int, typer.Option(help="Images per request, for the Open Inference Protocol.", min=1)
    ] = 1,
    concurrency: Annotated[
        str,
        typer.Option(help="Closed loop: requests in flight; N,N,N: one run for each."),
    ] = "",
    rate: Annotated[
        str,
        typer.Option(
            help="Open loop: requests per second, sent at fixed times; N,N,N: one run for each. "
            "With --sweep: the first rate."
        ),
    ] = "",
    arrivals: Annotated[
        Gaps, typer.Option(help="The distribution of an open loop's sending times.")
    ] = (Gaps.POISSON),
    trace: Annotated[
        Path | None, typer.Option(help="Open loop: a CSV file of arrival times in seconds.")
    ] = None,
    sweep: Annotated[
        bool,
        typer.Option("--sweep", help="Search for the highest rate whose p99 is within --slo-ms."),
    ] = False,
    slo_ms: Annotated[
        float | None,
        typer.Option(help="The latency objective; the report adds the goodput.", min=0.001),
    ] = None,
    duration_s: Annotated[float, typer.Option(help="Seconds of the measurement.", min=0.1)] = 5.0,
    warmup_s: Annotated[
        float, typer.Option(help="Seconds of load before the measurement.", min=0)
    ] = 1.0,
    timeout_s: Annotated[
        float, typer.Option(help="The deadline of each request.", min=0.001)
    ] = 10.0,
    processes: Annotated[
        int | None,
        typer.Option(help="Client processes; half the processors by default.", min=1),
    ] = None,
    connections: Annotated[int, typer.Option(help="Connections of each process.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the Poisson arrivals.", min=0)] = 0,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="The server's metrics; by default http://HOST:PORT+1/metrics, if it can be read. "
            "'none' for none.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as a JSON object.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Plot to draw, .png.")] = None,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Measure throughput and latency of any server of the Open Inference Protocol v2."""
    with _needs_bench():
        from convoy.client.bench import plot as drawing
        from convoy.client.bench import report, session
        from convoy.client.bench.generator import LoadGenerator
        from convoy.client.bench.payload import TensorSpec
        from convoy.client.bench.plan import Plan
        from convoy.client.bench.worker import Target
    if plot is not None:
        drawing.check_plot(plot)
    connection = Connection.to(address, timeout_s, None)
    sent = session.PayloadRequest(
        files=tuple(inputs or ()),
        model=model,
        version=version,
        tensors=protocol is Protocol.OIP,
        encoded=payload is Form.ENCODED,
        spec=TensorSpec.parse(tensor) if tensor else None,
        images=images,
    ).build(connection)
    loads = session.LoadRequest(concurrency, rate, trace, arrivals is Gaps.CONSTANT, seed, sweep)
    slo_s = None if slo_ms is None else slo_ms / 1000
    plan = Plan(loads.loads()[0], warmup_s, duration_s, slo_s, timeout_s)
    target = Target(connection, sent, connections)
    page = session.metrics_page(metrics, connection, model, sent)
    console = Console(stderr=True)
    with console.status("measuring"), LoadGenerator(target, processes or _half(), page) as clients:
        found = session.measure(clients, loads, plan, lambda run: _tell(console, run))
    if plot is not None:
        drawing.save_plot(found.runs, plot)
    if as_json:
        print(json.dumps(report.as_json(target, found)))
    else:
        report.print_table(Console(), target, found)


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="What `bench --json` printed.")],
    second: Annotated[
        Path, typer.Argument(metavar="B", help="Another output, to compare with the first.")
    ],
) -> None:
    """Compare two measurements: ratios with 95 % confidence intervals over repeated runs."""
    with _needs_bench():
        from convoy.client.bench.compare import compare as compare_files
    found = compare_files(first, second)
    table = Table("load", "metric", "A", "B", "B/A", "95 %", "runs", "differs", box=None)
    for each in found:
        scale = 1 if each.metric == "throughput_per_s" else 1000
        table.add_row(
            each.load,
            "answered/s" if scale == 1 else f"{each.metric}, ms",
            f"{scale * each.a:.4g}",
            f"{scale * each.b:.4g}",
            f"{each.ratio:.3f}",
            f"{each.low:.2f} to {each.high:.2f}",
            "/".join(map(str, each.runs)),
            "yes" if each.differs else "not shown",
        )
    Console().print(table)


@contextmanager
def _needs_bench() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(f"bench needs {error.name}: install convoy-serving[bench]") from error


def _tell(console: Console, run: "Measurement") -> None:
    if console.is_terminal:
        console.print(f"{run.plan.load}: {run.throughput_per_s:.0f} answered/s")


def _half() -> int:
    """Leave as many processors to a server on this machine."""
    return min(_MOST_PROCESSES, max(1, usable_cpus() // 2))
