"""Two measurements side by side: ratios with confidence intervals over repeated runs.

A single run of each does not show the random variation. Repeat a load within one file, for example
`--concurrency 8,8,8,8,8`: the runs of a load are the samples, their logarithms are compared by
Welch's test, and an interval that contains 1 shows no difference. Alternate A and B where the
machine's speed drifts.
"""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from convoy.client.bench import BenchError

_LEAST_RUNS = 3
# Student's t at 97.5 % by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)
_T_OF_MORE = 2.145
_METRICS = ("throughput_per_s", "mean", "p50", "p99")


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric of one load in two files.

    Attributes:
        a: Geometric mean of the runs in the first file, per second or in seconds.
        b: Geometric mean of the runs in the second file.
        ratio: b / a.
        low: The lower end of the ratio's 95 % confidence interval.
        high: The upper end.
        runs: Runs in the two files.
    """

    load: str
    metric: str
    a: float
    b: float
    low: float
    high: float
    runs: tuple[int, int]

    @property
    def ratio(self) -> float:
        """How many times as large the second file's value is."""
        return self.b / self.a

    @property
    def differs(self) -> bool:
        """Whether the interval excludes 1."""
        return not self.low <= 1 <= self.high


def compare(first: Path, second: Path) -> list[Comparison]:
    """Compare two files that `bench --json` wrote.

    Raises:
        BenchError: A file is not such an output, or no load has three runs in both.
    """
    one, other = _runs(first), _runs(second)
    found = [
        _compare(load, metric, one[load][metric], other[load][metric])
        for load in one
        if load in other
        for metric in _METRICS
        if min(len(one[load][metric]), len(other[load][metric])) >= _LEAST_RUNS
    ]
    if not found:
        raise BenchError(
            f"compare: expected a load with {_LEAST_RUNS} runs or more in {first} and in {second}, "
            f"got {_described(one)} and {_described(other)}"
        )
    return found


def _runs(path: Path) -> dict[str, dict[str, list[float]]]:
    """Return the values of each metric by load."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    try:
        for run in json.loads(path.read_text(encoding="utf-8"))["runs"]:
            found = {"throughput_per_s": run["throughput_per_s"], **run["latency_s"]}
            for metric in _METRICS:
                # A percentile is missing where it has too few samples.
                if found[metric]:
                    values[run["load"]][metric].append(float(found[metric]))
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path}: expected the output of bench --json") from error
    return values


def _compare(load: str, metric: str, a: Sequence[float], b: Sequence[float]) -> Comparison:
    logs_a, logs_b = [math.log(value) for value in a], [math.log(value) for value in b]
    difference = statistics.fmean(logs_b) - statistics.fmean(logs_a)
    error_a, error_b = (statistics.variance(logs) / len(logs) for logs in (logs_a, logs_b))
    margin = 0.0
    if squared := error_a + error_b:
        # Welch and Satterthwaite's degrees of freedom.
        freedom = squared**2 / (error_a**2 / (len(a) - 1) + error_b**2 / (len(b) - 1))
        number = int(freedom) - 1
        margin = (_T[number] if number < len(_T) else _T_OF_MORE) * math.sqrt(squared)
    return Comparison(
        load,
        metric,
        math.exp(statistics.fmean(logs_a)),
        math.exp(statistics.fmean(logs_b)),
        math.exp(difference - margin),
        math.exp(difference + margin),
        (len(a), len(b)),
    )


def _described(runs: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    loads = (f"{len(metrics['throughput_per_s'])} of {load!r}" for load, metrics in runs.items())
    return ", ".join(loads) or "none"
