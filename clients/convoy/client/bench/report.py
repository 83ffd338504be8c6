"""Measurements as JSON and as tables."""

from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from convoy.client.bench.generator import Measurement
from convoy.client.bench.plan import ClosedLoop
from convoy.client.bench.session import PERCENTILE, Sweep
from convoy.client.bench.worker import Target

_LATENCIES = "requests per second; milliseconds from when a request was due"
_STAGES = "mean milliseconds of answered requests"
_SHOWN = (50.0, 90.0, 99.0, 99.9)


def as_json(target: Target, found: Sweep) -> dict[str, object]:
    """Return all results, in seconds and per second."""
    payload = target.payload
    return {
        "address": target.connection.address,
        "method": payload.method,
        "request_bytes": payload.request_bytes,
        "images_per_request": payload.images,
        "connections": target.connections,
        "runs": [run_as_json(run) for run in found.runs],
        "highest_rate_per_s": found.rate_per_s,
    }


def print_table(console: Console, target: Target, found: Sweep) -> None:
    """Print a row for each run, in milliseconds and requests per second, with warnings."""
    payload = target.payload
    images = f", {payload.images} images each" if payload.images > 1 else ""
    console.print(
        f"{target.connection.address}{payload.method}, {payload.request_bytes:.0f} bytes{images}",
        highlight=False,
    )
    console.print(_latencies(found.runs))
    if any(run.stages for run in found.runs):
        console.print(_stages(found.runs))
    for run in found.runs:
        for code, count in sorted(run.errors.items()):
            console.print(f"{run.plan.load}: {count} {code}", highlight=False)
        for limit in run.client_limits():
            console.print(f"warning: {run.plan.load}: {limit}", highlight=False)
    if found.rate_per_s is not None:
        console.print(
            f"highest rate with {PERCENTILE:g} % within the objective: {found.rate_per_s:.0f}/s",
            highlight=False,
        )


def run_as_json(run: Measurement) -> dict[str, object]:
    """Return one run, in seconds and per second."""
    plan = run.plan
    load: dict[str, object] = (
        {"loop": "closed", "concurrency": plan.load.concurrency}
        if isinstance(plan.load, ClosedLoop)
        else {"loop": "open", "rate_per_s": plan.load.arrivals.rate_per_s}
    )
    return {
        **load,
        "load": str(plan.load),
        "warmup_s": plan.warmup_s,
        "duration_s": plan.duration_s,
        "slo_s": plan.slo_s,
        "timeout_s": plan.timeout_s,
        "offered": run.offered,
        "offered_per_s": run.offered_per_s,
        "completed": run.latency.count,
        "throughput_per_s": run.throughput_per_s,
        "goodput_per_s": run.goodput_per_s,
        "errors": run.errors,
        "latency_s": {
            "mean": run.latency.mean_s,
            **{f"p{p:g}": s for p, s in run.latency.percentiles_s().items()},
            "max": run.latency.max_s,
        },
        "histogram": run.latency.encode().decode(),
        "client": {
            "lag_p99_s": run.lag.percentile_s(99),
            "lag_max_s": run.lag.max_s,
            "cores": list(run.cores),
            "limits": run.client_limits(),
        },
        "stages_s": None if run.stages is None else asdict(run.stages),
    }


def _latencies(runs: Sequence[Measurement]) -> Table:
    goodput = ["in SLO"] if any(run.plan.slo_s is not None for run in runs) else []
    percentiles = (f"p{p:g}" for p in _SHOWN)
    table = _table("load", "offered", "answered", *goodput, *percentiles, "max", "errors")
    table.title, table.title_justify = _LATENCIES, "left"
    for run in runs:
        table.add_row(*_row(run))
    return table


def _row(run: Measurement) -> list[str]:
    goodput = [] if run.goodput_per_s is None else [f"{run.goodput_per_s:.0f}"]
    return [
        str(run.plan.load),
        f"{run.offered_per_s:.0f}",
        f"{run.throughput_per_s:.0f}",
        *goodput,
        *(_ms(run.latency.percentile_s(p) if run.latency.supports(p) else None) for p in _SHOWN),
        _ms(run.latency.max_s),
        str(sum(run.errors.values())),
    ]


def _stages(runs: Sequence[Measurement]) -> Table:
    names = ("load", "mean", "client", "network", "decode", "queue", "inference", "other", "batch")
    table = _table(*names)
    table.title, table.title_justify = _STAGES, "left"
    for run in runs:
        if stages := run.stages:
            times = (
                run.latency.mean_s,
                stages.client_s,
                stages.network_s,
                stages.decode_s,
                stages.queue_s,
                stages.inference_s,
                stages.server_s,
            )
            table.add_row(str(run.plan.load), *map(_ms, times), f"{stages.batch_size:.1f}")
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    ms = 1000 * seconds
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"
