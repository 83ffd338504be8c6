"""`bench`: measures a server under load."""

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from clients.cli.options import Address, Model
from clients.connection import DEFAULT_ADDRESS, Connection
from clients.errors import UsageError

if TYPE_CHECKING:
    from clients.bench.generator import Measurement

_MOST_PROCESSES = 8


class Protocol(StrEnum):
    """Which API is measured."""

    CONVOY = "convoy"
    OIP = "oip"


class Form(StrEnum):
    """How an image is sent."""

    ENCODED = "encoded"
    RAW = "raw"


class Gaps(StrEnum):
    """How an open loop's requests follow each other."""

    POISSON = "poisson"
    CONSTANT = "constant"


def bench(
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILE]...",
            help="Image files or, for tensors, .npy arrays to send in turn; raw payloads may do "
            "without: they are random then.",
            show_default=False,
        ),
    ] = None,
    *,
    model: Model = "",
    version: Annotated[int, typer.Option(help="0 for the one in service.", min=0)] = 0,
    protocol: Annotated[
        Protocol, typer.Option(help="Convoy's own API, or the Open Inference Protocol v2.")
    ] = Protocol.CONVOY,
    payload: Annotated[
        Form, typer.Option(help="Image files that the server decodes, or pixels.")
    ] = Form.ENCODED,
    tensor: Annotated[
        str,
        typer.Option(
            "--input",
            help="NAME:DATATYPE:D,D,D, for the Open Inference Protocol; by default the server is "
            "asked.",
        ),
    ] = "",
    images: Annotated[
        int, typer.Option(help="Images in a request, for the Open Inference Protocol.", min=1)
    ] = 1,
    concurrency: Annotated[
        str, typer.Option(help="Closed loop: requests always under way; N,N,N for a run each.")
    ] = "",
    rate: Annotated[
        str,
        typer.Option(
            help="Open loop: requests a second, each at its time; N,N,N for a run each. "
            "Where --sweep begins."
        ),
    ] = "",
    arrivals: Annotated[Gaps, typer.Option(help="How an open loop's requests follow.")] = (
        Gaps.POISSON
    ),
    trace: Annotated[
        Path | None, typer.Option(help="Open loop: a CSV file of arrival times in seconds.")
    ] = None,
    sweep: Annotated[
        bool,
        typer.Option("--sweep", help="Search for the highest rate whose p99 is within --slo-ms."),
    ] = False,
    slo_ms: Annotated[
        float | None,
        typer.Option(help="What a good answer may take; gives the goodput.", min=0.001),
    ] = None,
    duration_s: Annotated[float, typer.Option(help="Seconds that are measured.", min=0.1)] = 5.0,
    warmup_s: Annotated[float, typer.Option(help="Seconds of load before them.", min=0)] = 1.0,
    timeout_s: Annotated[
        float, typer.Option(help="The deadline that each request carries.", min=0.001)
    ] = 10.0,
    processes: Annotated[
        int | None,
        typer.Option(help="Client processes; half the processors by default.", min=1),
    ] = None,
    connections: Annotated[int, typer.Option(help="Connections of each process.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of the Poisson arrivals.", min=0)] = 0,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="The server's own metrics; by default http://HOST/metrics on the port after the "
            "gRPC port, where there are any. 'none' for none.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The results as a JSON object.")] = False,
    plot: Annotated[Path | None, typer.Option(help="A picture to draw, .png.")] = None,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Measures throughput and latency of this server or any of the Open Inference Protocol v2."""
    try:
        from clients.bench import plot as drawing
        from clients.bench import report, session
        from clients.bench.generator import LoadGenerator
        from clients.bench.payload import TensorSpec
        from clients.bench.plan import Plan
        from clients.bench.worker import Target
    except ModuleNotFoundError as error:
        raise UsageError(f"bench needs {error.name}: install convoy-serving[bench]") from error
    if plot is not None:
        drawing.check_plot(plot)
    connection = Connection.to(address, timeout_s, None)
    sent = session.PayloadWish(
        files=tuple(inputs or ()),
        model=model,
        version=version,
        tensors=protocol is Protocol.OIP,
        encoded=payload is Form.ENCODED,
        spec=TensorSpec.parse(tensor) if tensor else None,
        images=images,
    ).build(connection)
    loads = session.LoadWish(concurrency, rate, trace, arrivals is Gaps.CONSTANT, seed, sweep)
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


def _tell(console: Console, run: "Measurement") -> None:
    if console.is_terminal:
        console.print(f"{run.plan.load}: {run.throughput_per_s:.0f} answered/s")


def _half() -> int:
    """Leaves as many processors to a server on this machine."""
    return min(_MOST_PROCESSES, max(1, len(os.sched_getaffinity(0)) // 2))
