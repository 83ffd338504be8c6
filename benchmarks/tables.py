"""Measurements of servers as Markdown tables and a plot."""

import os
import statistics
from pathlib import Path
from typing import Any

Rounds = dict[str, dict[str, list[dict[str, Any]]]]


def raw_table(alone: dict[str, dict[str, float]]) -> str:
    batches = list(next(iter(alone.values())))
    rows = [[name, *(f"{found[batch]:.0f}" for batch in batches)] for name, found in alone.items()]
    return "Raw ONNX Runtime in process, images/s\n\n" + table(
        ["one-thread sessions", *(f"batch {batch}" for batch in batches)], rows
    )


def closed_table(found: Rounds, images: int, raw_per_s: float) -> str:
    first = next(iter(found))
    loads = list(found[first])
    rows = []
    for name, runs in found.items():
        last = runs[loads[-1]]
        cpu_ms = _median(
            1000 * run["server_cpu_s"] / (run["throughput_per_s"] * images * _length_s(run))
            for run in last
        )
        memory = f"{_median(run['rss_mb'] for run in last):.0f}"
        ready = f"{_median(run['ready_s'] for run in last):.2f}"
        shares = sorted(_of_raw(run, images, raw_per_s) for run in last)
        share = f"{statistics.median(shares):.2f} [{shares[0]:.2f}-{shares[-1]:.2f}]"
        cells = (_closed(runs[load], found[first][load]) for load in loads)
        rows.append([name, *cells, share, f"{cpu_ms:.2f}", memory, ready])
    head = [f"{load} under way" for load in loads]
    title = (
        "Closed loop: requests/s, median [least-greatest], times the first server's in the same "
        "round (p50 / p99 ms)"
        f"; {images} image(s) a request; the other columns at {loads[-1]} under way"
    )
    columns = ["server", *head, "of raw", "server CPU ms/image", "RSS MiB", "ready s"]
    return f"{title}\n\n" + table(columns, rows)


def _of_raw(run: dict[str, Any], images: int, raw_per_s: float) -> float:
    """Images/s as a part of what ONNX Runtime does on the processors that the client leaves."""
    left = 1 - run["client_cores"] / len(os.sched_getaffinity(0))
    return run["throughput_per_s"] * images / (raw_per_s * left)


def goodput_table(found: Rounds, capacity_per_s: float, slo_ms: float) -> str:
    loads = list(next(iter(found.values())))
    rows = [[name, *(_open(runs[load]) for load in loads)] for name, runs in found.items()]
    title = (
        f"Open loop, Poisson: answered within {slo_ms:g} ms a second, median [least-greatest] "
        "(p99 ms of the answered / of how late the client sent), "
        f"at multiples of {capacity_per_s:.0f}/s"
    )
    return f"{title}\n\n" + table(["server", *(f"{load}x" for load in loads)], rows)


def plot_goodput(found: Rounds, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    greatest = 0.0
    for name, runs in found.items():
        offered = [_median(run["offered_per_s"] for run in rounds) for rounds in runs.values()]
        good = [_median(run["goodput_per_s"] for run in rounds) for rounds in runs.values()]
        axes.plot(offered, good, marker="o", label=name)
        greatest = max(greatest, *good)
    axes.axline((0, 0), slope=1, color="0.8", linestyle="--")
    axes.set(xlabel="offered, requests/s", ylabel="answered in time, requests/s")
    axes.set_ylim(0, 1.2 * greatest)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _closed(runs: list[dict[str, Any]], first: list[dict[str, Any]]) -> str:
    p50, p99 = (1000 * _median(run["latency_s"][key] for run in runs) for key in ("p50", "p99"))
    ratios = sorted(
        run["throughput_per_s"] / base["throughput_per_s"]
        for run, base in zip(runs, first, strict=True)
    )
    times = f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}-{ratios[-1]:.2f}]"
    return f"{spread(run['throughput_per_s'] for run in runs)}, {times} ({p50:.1f} / {p99:.1f})"


def _open(runs: list[dict[str, Any]]) -> str:
    answered = [run["latency_s"]["p99"] for run in runs if run["completed"]]
    p99 = f"{1000 * _median(answered):.0f}" if answered else "-"
    late = 1000 * _median(run["client"]["lag_p99_s"] for run in runs)
    return f"{spread(run['goodput_per_s'] for run in runs)} ({p99} / {late:.0f})"


def _length_s(run: dict[str, Any]) -> float:
    """The warm-up costs processor time too."""
    return float(run["warmup_s"]) + float(run["duration_s"])


def spread(values: Any, digits: int = 0) -> str:
    found = sorted(values)
    least, median, most = (
        f"{value:.{digits}f}" for value in (found[0], statistics.median(found), found[-1])
    )
    return f"{median} [{least}-{most}]"


def _median(values: Any) -> float:
    return float(statistics.median(values))


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
