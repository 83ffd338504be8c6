"""Measurements as a plot: latency by percentile, and throughput against latency."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from convoy.client.bench import BenchError
from convoy.client.bench.generator import Measurement
from convoy.client.bench.latencies import SAMPLES_ABOVE

_NINES = 4
_TICKS = (0.0, 50.0, 90.0, 99.0, 99.9, 99.99)


def check_plot(file: Path) -> None:
    """Check that a plot can be written to a file.

    Raises:
        BenchError: Its folder is missing, or its suffix names no picture.
    """
    suffixes = Figure().canvas.get_supported_filetypes()
    if file.suffix[1:] not in suffixes:
        raise BenchError(f"--plot: expected one of {', '.join(suffixes)}, got {file.name!r}")
    if not file.parent.is_dir():
        raise BenchError(f"--plot: {file.parent}: no such folder")


def save_plot(runs: Sequence[Measurement], file: Path) -> None:
    """Draw runs into a file whose suffix names the format.

    Raises:
        BenchError: It cannot be written.
    """
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_percentiles(left, runs)
    _draw_throughput(right, runs)
    try:
        figure.savefig(file, dpi=120)
    except OSError as error:
        raise BenchError(f"--plot: {file}: {error}") from error


def _draw_percentiles(axes: Axes, runs: Sequence[Measurement]) -> None:
    # Evenly spaced in the number of nines, as HdrHistogram's plots are.
    for run in runs:
        # No further than the samples go.
        least = max(10.0**-_NINES, SAMPLES_ABOVE / max(run.latency.count, SAMPLES_ABOVE))
        beyond = np.geomspace(1, least, 200)
        latencies_ms = [1000 * run.latency.percentile_s(100 * (1 - b)) for b in beyond]
        axes.plot(1 / beyond, latencies_ms, label=str(run.plan.load))
    axes.set_xscale("log")
    axes.set_xticks([1 / (1 - p / 100) for p in _TICKS], [f"{p:g}" for p in _TICKS])
    axes.minorticks_off()
    _draw_objective(axes, runs)
    axes.set(title="Latency by percentile", xlabel="percentile", ylabel="ms", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_throughput(axes: Axes, runs: Sequence[Measurement]) -> None:
    ordered = sorted(runs, key=lambda run: run.throughput_per_s)
    answered_per_s = [run.throughput_per_s for run in ordered]
    for percentile in (50.0, 99.0):
        if not all(run.latency.supports(percentile) for run in ordered):
            continue
        latencies_ms = [1000 * run.latency.percentile_s(percentile) for run in ordered]
        axes.plot(answered_per_s, latencies_ms, "o-", label=f"p{percentile:g}")
    _draw_objective(axes, runs)
    axes.set(title="Throughput against latency", xlabel="answers/s", ylabel="ms")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_objective(axes: Axes, runs: Sequence[Measurement]) -> None:
    for slo_s in {run.plan.slo_s for run in runs} - {None}:
        axes.axhline(1000 * float(slo_s or 0), color="gray", linestyle="--", label="SLO")
