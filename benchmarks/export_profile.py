"""Shows where ONNX Runtime spends an image's time, by operator: its own profile of every node.

    python -m benchmarks.export_profile [--threads 1] [--batches 1,32] [NET …]

Each cell is microseconds an image in all nodes of an operator, as the optimised graph has them: the
median of the runs. What no node accounts for is the row `between nodes`.
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks.export_speed import session, write_artefacts

RUNS = 30
BETWEEN, WHOLE = "between nodes", "whole run"
Profile = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nets", nargs="*", default=["net", "net_res_deep", "airbench"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", default="1,32")
    arguments = parser.parse_args()
    batches = [int(size) for size in arguments.batches.split(",")]
    for name in arguments.nets:
        with tempfile.TemporaryDirectory() as folder:
            _, images = write_artefacts(name, Path(folder), max(batches))
            for file in ("model.onnx", "model.int8.onnx"):
                profiles = {
                    size: profile(Path(folder) / file, images[:size], arguments.threads)
                    for size in batches
                }
                show(f"{name} {file}", profiles)


def profile(path: Path, images: np.ndarray, threads: int) -> Profile:
    """Returns microseconds an image by operator."""
    run = session(path, threads, profile_prefix=str(path.parent / "profile"))
    for _ in range(RUNS + 1):
        run.run(None, {"image": images})
    events = json.loads(Path(run.end_profiling()).read_text())
    by_operator: dict[str, list[float]] = defaultdict(list)
    for single in runs_of(events)[1:]:
        for operator, taken_us in single.items():
            by_operator[operator].append(taken_us / len(images))
    return {operator: statistics.median(taken_us) for operator, taken_us in by_operator.items()}


def runs_of(events: list[dict]) -> list[Profile]:
    """Splits a trace into its runs; a run's event follows those of its nodes."""
    runs: list[Profile] = []
    nodes: Profile = defaultdict(float)
    for event in events:
        if event["name"] == "model_run":
            whole_us = float(event["dur"])
            between_us = whole_us - sum(nodes.values())
            runs.append({**nodes, BETWEEN: between_us, WHOLE: whole_us})
            nodes = defaultdict(float)
        elif event["name"].endswith("_kernel_time"):
            nodes[event["args"]["op_name"]] += event["dur"]
    return runs


def show(title: str, profiles: dict[int, Profile]) -> None:
    operators = sorted({operator for found in profiles.values() for operator in found})
    operators.sort(key=lambda operator: max(found.get(operator, 0) for found in profiles.values()))
    print(f"\n{title}, us an image at batch {', '.join(map(str, profiles))}")
    for operator in reversed(operators):
        cells = "".join(f"{found.get(operator, 0):10.2f}" for found in profiles.values())
        print(f"  {operator:24}{cells}", flush=True)


if __name__ == "__main__":
    main()
