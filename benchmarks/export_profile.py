"""Shows where an image's time goes, by operator: ONNX Runtime's own profile, and OpenVINO's.

    python -m benchmarks.export_profile [--threads 1] [--batches 1,32] [NET …]

Each cell is microseconds an image in all nodes of an operator, as the optimized graph has them. Of
ONNX Runtime it is the median of the runs, and what no node accounts for is the row `between nodes`;
of OpenVINO it is the last run. Profiling itself takes time, most at batch 1.
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks.export_speed import compile_openvino, session, write_artifacts

RUNS = 30
# Operators that take less, at every batch size, are left out.
SHOWN_US = 1.0
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
            _, images = write_artifacts(name, Path(folder), max(batches))
            for file in ("model.onnx", "model.int8.onnx"):
                profiles = {
                    size: profile(Path(folder) / file, images[:size], arguments.threads)
                    for size in batches
                }
                show(f"{name} {file}", profiles)
            path = Path(folder) / "model.onnx"
            profiles = {
                size: profile_openvino(path, images[:size], arguments.threads) for size in batches
            }
            show(f"{name} by OpenVINO", profiles)


def profile(path: Path, images: np.ndarray, threads: int) -> Profile:
    """Return microseconds an image by operator."""
    run = session(path, threads, profile_prefix=str(path.parent / "profile"))
    for _ in range(RUNS + 1):
        run.run(None, {"image": images})
    events = json.loads(Path(run.end_profiling()).read_text())
    by_operator: dict[str, list[float]] = defaultdict(list)
    for single in runs_of(events)[1:]:
        for operator, taken_us in single.items():
            by_operator[operator].append(taken_us / len(images))
    return {operator: statistics.median(taken_us) for operator, taken_us in by_operator.items()}


def profile_openvino(path: Path, images: np.ndarray, threads: int) -> Profile:
    """Return microseconds an image by operator, of the float32 graph."""
    request = compile_openvino(path, images, threads, profiled=True).create_infer_request()
    for _ in range(RUNS):
        request.infer([images])
    by_operator: Profile = defaultdict(float)
    for node in request.profiling_info:
        taken_us = 1e6 * node.real_time.total_seconds() / len(images)
        by_operator[node.node_type] += taken_us
        by_operator[WHOLE] += taken_us
    return by_operator


def runs_of(events: list[dict]) -> list[Profile]:
    """Split a trace into its runs; a run's event follows those of its nodes."""
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
    most_us: Profile = defaultdict(float)
    for found in profiles.values():
        for operator, taken_us in found.items():
            most_us[operator] = max(most_us[operator], taken_us)
    print(f"\n{title}, us an image at batch {', '.join(map(str, profiles))}")
    for operator in sorted(most_us, key=lambda name: -most_us[name]):
        if most_us[operator] >= SHOWN_US:
            cells = "".join(f"{found.get(operator, 0):10.2f}" for found in profiles.values())
            print(f"  {operator:24}{cells}", flush=True)


if __name__ == "__main__":
    main()
