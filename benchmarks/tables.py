"""Measurements of servers as Markdown tables and a plot."""

import os
import statistics
from collections.abc import Sequence
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
    loads = list(next(iter(found.values())))
    first, *others = found
    rows = []
    for name, runs in found.items():
        cells = []
        for load in loads:
            cells.append(_closed(runs[load]))
            if others:
                cells.append("" if name == first else _ratio(found[first][load], runs[load]))
        last = runs[loads[-1]]
        memory = f"{_median(run['rss_mb'] for run in last):.0f}"
        ready = f"{spread((run['ready_s'] for run in last), 2)}"
        share = f"{spread((_of_raw(run, images, raw_per_s) for run in last), 2)}"
        rows.append([name, *cells, share, f"{server_cpu_ms(last, images):.2f}", memory, ready])
    head = []
    for load in loads:
        head.append(f"{load} under way, {len(found[first][load])} rounds")
        head += [f"{first} is"] if others else []
    title = (
        "Closed loop: requests/s, median [least-greatest] (p50 / p99 ms)"
        f"; {images} image(s) a request; the other columns at {loads[-1]} under way; "
        f"{_others(found)}"
    )
    columns = ["server", *head, "of raw", "server CPU ms/image", "RSS MiB", "ready s"]
    return f"{title}\n\n" + table(columns, rows)


def _others(found: Rounds) -> str:
    runs = (run for loads in found.values() for rounds in loads.values() for run in rounds)
    return f"other processes took at most {max(run['other_cores'] for run in runs):.2f} processors"


def server_cpu_ms(runs: Sequence[dict[str, Any]], images: int = 1) -> float:
    """Processor time of a server for an image, in milliseconds: the median over runs."""
    return _median(
        1000 * run["server_cpu_s"] / (run["throughput_per_s"] * images * _length_s(run))
        for run in runs
    )


def _ratio(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> str:
    """Requests/s of the one to the other's, within a round."""
    pairs = zip(ours, theirs, strict=True)
    return spread((one["throughput_per_s"] / other["throughput_per_s"] for one, other in pairs), 2)


def _of_raw(run: dict[str, Any], images: int, raw_per_s: float) -> float:
    """Images/s as a part of what ONNX Runtime does on the processors that the client leaves."""
    left = 1 - run["client_cores"] / len(os.sched_getaffinity(0))
    return run["throughput_per_s"] * images / (raw_per_s * left)


def goodput_table(found: Rounds, capacity_per_s: float, slo_ms: float) -> str:
    first = next(iter(found.values()))
    rows = [[name, *(_open(each) for each in runs.values())] for name, runs in found.items()]
    title = (
        f"Open loop, Poisson: answered within {slo_ms:g} ms a second, median [least-greatest] "
        "(p99 ms of the answered, median [least-greatest] / of how late the client sent; "
        f"RSS MiB), at multiples of {capacity_per_s:.0f}/s; {_others(found)}"
    )
    head = [f"{load}x, {len(runs)} rounds" for load, runs in first.items()]
    return f"{title}\n\n" + table(["server", *head], rows)


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
    return f"{spread(run['throughput_per_s'] for run in runs)} ({p50:.1f} / {p99:.1f})"


def _open(runs: list[dict[str, Any]]) -> str:
    answered = [1000 * run["latency_s"]["p99"] for run in runs if run["completed"]]
    p99 = spread(answered, 1) if answered else "-"
    late = 1000 * _median(run["client"]["lag_p99_s"] for run in runs)
    memory = spread(run["rss_mb"] for run in runs)
    return f"{spread(run['goodput_per_s'] for run in runs)} ({p99} / {late:.1f}; {memory})"


def _length_s(run: dict[str, Any]) -> float:
    """Check that the warm-up costs processor time too."""
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
