"""`bench`: measures a server under load."""

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from clients.aio import AsyncClient
from clients.bench import BenchReport, run_closed_loop
from clients.cli.options import Address, Model, Timeout
from clients.connection import DEFAULT_ADDRESS


def bench(
    image: Annotated[Path, typer.Argument(help="Image file to send again and again.")],
    *,
    model: Model = "",
    concurrency: Annotated[int, typer.Option(help="Requests always under way.", min=1)] = 8,
    duration_s: Annotated[float, typer.Option(help="Seconds to send for.", min=0.1)] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="The report as a JSON object.")] = False,
    address: Address = DEFAULT_ADDRESS,
    timeout_s: Timeout = 10.0,
) -> None:
    """Measures throughput and latency in a closed loop."""

    async def run() -> BenchReport:
        async with AsyncClient(address, timeout_s=timeout_s) as client:
            return await run_closed_loop(
                client, image, model=model, concurrency=concurrency, duration_s=duration_s
            )

    report = asyncio.run(run())
    if as_json:
        print(json.dumps({**asdict(report), "throughput_per_s": report.throughput_per_s}))
    else:
        _show_report(report)


def _show_report(report: BenchReport) -> None:
    print(
        f"{report.throughput_per_s:.0f} requests/s at concurrency {report.concurrency} "
        f"for {report.duration_s:.1f} s, {report.completed} answered, "
        f"mean batch size {report.mean_batch_size:.1f}"
    )
    latencies = "  ".join(f"p{p:g} {s * 1000:.1f} ms" for p, s in report.latency_s.items())
    print(f"latency  {latencies}")
    for kind, count in report.errors.items():
        print(f"{kind}: {count}")
