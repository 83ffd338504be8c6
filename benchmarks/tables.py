"""Measurements of servers as Markdown tables and a plot."""

import statistics
from pathlib import Path
from typing import Any

Rounds = dict[str, dict[str, list[dict[str, Any]]]]


def rawtable(alone: dict[str, dict[str, float]]) -> str:
    batches = list(next(iter(alone.values())))
    rows = [[name, *(f"{found[batch]:.0f}" for batch in batches)] for name, found in alone.items()]
    return "Raw ONNX Runtime in process, images/s\n\n" + table(
        ["one-thread sessions", *(f"batch {batch}" for batch in batches)], rows
    )


def closedtable(found: Rounds, images: int) -> str:
    loads = list(next(iter(found.values())))
    rows = []
    for name, runs in found.items():
        last = runs[loads[-1]]
        cpu_ms = _median(
            1000 * run["server_cpu_s"] / (run["throughput_per_s"] * images * _length_s(run))
            for run in last
        )
        memory = f"{_median(run['rss_mb'] for run in last):.0f}"
        ready = f"{_median(run['ready_s'] for run in last):.2f}"
        rows.append(
            [name, *(_closed(runs[load]) for load in loads), f"{cpu_ms:.2f}", memory, ready]
        )
    head = [f"{load} under way" for load in loads]
    title = (
        "Closed loop: requests/s, median [least-greatest] (p50 / p99 ms)"
        f"; {images} image(s) a request"
    )
    columns = ["server", *head, "server CPU ms/image", "RSS MiB", "ready s"]
    return f"{title}\n\n" + table(columns, rows)


def goodputtable(found: Rounds, capacity_per_s: float, slo_ms: float) -> str:
    loads = list(next(iter(found.values())))
    rows = [[name, *(_open(runs[load]) for load in loads)] for name, runs in found.items()]
    title = (
        f"Open loop, Poisson: answered within {slo_ms:g} ms a second, median [least-greatest] "
        f"(p99 ms of the answered), at multiples of {capacity_per_s:.0f}/s"
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


def _closed(runs: list[dict[str, Any]]) -> str:
    p50, p99 = (1000 * _median(run["latency_s"][key] for run in runs) for key in ("p50", "p99"))
    return f"{_spread(run['throughput_per_s'] for run in runs)} ({p50:.1f} / {p99:.1f})"


def _open(runs: list[dict[str, Any]]) -> str:
    answered = [run["latency_s"]["p99"] for run in runs if run["completed"]]
    p99 = f"{1000 * _median(answered):.0f}" if answered else "-"
    return f"{_spread(run['goodput_per_s'] for run in runs)} ({p99})"


def _length_s(run: dict[str, Any]) -> float:
    """The warm-up costs processor time too."""
    return float(run["warmup_s"]) + float(run["duration_s"])


def _spread(values: Any) -> str:
    found = sorted(values)
    return f"{statistics.median(found):.0f} [{found[0]:.0f}-{found[-1]:.0f}]"


def _median(values: Any) -> float:
    return float(statistics.median(values))


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
