"""Times the artifacts of a net and its alternatives, in alternating rounds.

    python -m benchmarks.export_speed [--threads 2] [--rounds 7] [--without-torch] [NET …]

Every candidate maps the same uint8 images to logits and probabilities, on as many threads. Weights
are random; the speed of a runtime does not depend on them. Each round times every candidate once,
after a call that is not timed, so a ratio compares moments that lie close together. A round in
which other processes kept more than 0.15 of a processor busy does not count and is tried again, a
few times.
"""

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import openvino
import torch

from benchmarks.processes import OtherWork
from convoy.export import int8, onnx_format, torch_export, torchscript
from convoy.export.servable import Servable
from convoy.server.backends.base import Backend, load_backend
from convoy.server.backends.device import Device, Runtime
from convoy.server.models.repository import VerifiedFile
from convoy.training import nets

Call = Callable[[], object]

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
IMAGE_SIZES_PX = {"net": 32, "net_res_deep": 32, "airbench": 32, "resnet18": 224}
BATCH_SIZES = (1, 32)
BASE = "onnx"
# How long a candidate is called in each round; at least once.
TIMED_S = 0.15
MOST_OTHERS = 0.15
TRIES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nets", nargs="*", default=list(IMAGE_SIZES_PX))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--without-torch", action="store_true", help="only ONNX Runtime and OpenVINO"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} threads, {arguments.rounds} rounds")
    print("milliseconds of a call; times as fast as onnx in the same round: median (least to most)")
    for name in arguments.nets:
        with tempfile.TemporaryDirectory() as folder:
            for batch_size, calls in candidates(name, Path(folder), arguments):
                show(f"{name} batch {batch_size}", measure(calls, arguments.rounds))


def candidates(
    name: str, folder: Path, arguments: argparse.Namespace
) -> Iterator[tuple[int, dict[str, Call]]]:
    """Yield for each batch size a call of every candidate, compiled and warm."""
    threads = arguments.threads
    servable, images = write_artifacts(name, folder, max(BATCH_SIZES))
    by_torch = None if arguments.without_torch else torch_candidates(servable, images, folder)
    served = serve_openvino(folder / "model.onnx", threads)
    served_int8 = serve_openvino(folder / "model.int8.onnx", threads)
    sessions = {
        "onnx": session(folder / "model.onnx", threads),
        "onnx int8": session(folder / "model.int8.onnx", threads),
    }
    for batch_size in BATCH_SIZES:
        batch = images[:batch_size]
        run_openvino = compile_openvino(folder / "model.onnx", batch, threads)
        calls: dict[str, Call] = {
            label: lambda s=found, b=batch: s.run(None, {"image": b})
            for label, found in sessions.items()
        }
        if by_torch:
            calls |= by_torch(batch)
        calls |= {
            "openvino": lambda r=run_openvino, b=batch: r([b]),
            "openvino served": lambda s=served, b=batch: s.run(b),
            "openvino int8": lambda s=served_int8, b=batch: s.run(b),
        }
        yield batch_size, calls


def torch_candidates(
    servable: Servable, images: np.ndarray, folder: Path
) -> Callable[[np.ndarray], dict[str, Call]]:
    """Return a function that makes the calls of a batch by each of torch's runtimes."""
    example = torch.from_numpy(images[:2])
    torchscript.write(servable, example, folder / "model.torchscript", {}, script=False)
    torch_export.write_package(servable, example, folder / "model.aoti.pt2", {})
    native = torch_export.load_package(folder / "model.aoti.pt2")
    frozen = torchscript.load(folder / "model.torchscript")
    channels_last = copy.deepcopy(servable).to(memory_format=torch.channels_last)
    torch._dynamo.reset()
    compiled = torch.compile(servable, dynamic=False)

    def calls(batch: np.ndarray) -> dict[str, Call]:
        tensor = torch.from_numpy(batch)
        return {
            "eager": lambda: without_gradients(servable, tensor),
            "channels last": lambda: without_gradients(channels_last, tensor),
            "torchscript": lambda: frozen(batch),
            "aot-inductor": lambda: native(batch),
            "torch.compile": lambda: without_gradients(compiled, tensor),
        }

    return calls


def write_artifacts(name: str, folder: Path, count: int) -> tuple[Servable, np.ndarray]:
    """Export a net as model.onnx and model.int8.onnx; return it, and as many images for it."""
    size_px = IMAGE_SIZES_PX[name]
    torch.manual_seed(0)
    servable = Servable(nets.create(name).eval(), MEAN, STD, 1.0).eval()
    images = np.random.default_rng(0).integers(0, 256, (max(64, count), size_px, size_px, 3))
    images = images.astype(np.uint8)
    onnx_format.write(servable, torch.from_numpy(images[:2]), folder / "model.onnx", {})
    first = next(int8.attempts(folder / "model.onnx", images))
    onnx.save(first.graph, folder / "model.int8.onnx")
    return servable, images[:count]


def session(path: Path, threads: int, profile_prefix: str = "") -> ort.InferenceSession:
    """Open a graph with the options of the server's backend."""
    options = ort.SessionOptions()
    options.enable_profiling = bool(profile_prefix)
    options.profile_file_prefix = profile_prefix
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def compile_openvino(
    path: Path, batch: np.ndarray, threads: int, profiled: bool = False
) -> openvino.CompiledModel:
    """Compiles the graph for one shape, which OpenVINO runs fastest."""
    model = openvino.Core().read_model(path)
    model.reshape(list(batch.shape))
    # It would compute in bfloat16 of its own accord where the processor can.
    precision = {"INFERENCE_PRECISION_HINT": "f32"}
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, **precision}
    settings["PERF_COUNT"] = profiled
    return openvino.Core().compile_model(model, "CPU", settings)


def serve_openvino(path: Path, threads: int) -> Backend:
    """Load the graph as `convoy-server --backend openvino` does, for batches of any size."""
    file = VerifiedFile(path.name, path.read_bytes())
    return load_backend(Runtime.OPENVINO, file, Device("cpu"), threads)


def without_gradients(module: Callable[[torch.Tensor], object], images: torch.Tensor) -> object:
    with torch.inference_mode():
        return module(images)


def measure(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Return seconds of one call by candidate and round."""
    for call in calls.values():
        call()
    counted: list[dict[str, float]] = []
    for _ in range(TRIES * rounds):
        others = OtherWork()
        taken_s = {label: time_call(call) for label, call in calls.items()}
        if others.processors() <= MOST_OTHERS:
            counted.append(taken_s)
        if len(counted) == rounds:
            break
    return {label: [taken_s[label] for taken_s in counted] for label in calls}


def time_call(call: Call) -> float:
    call()
    count, started_s = 0, time.perf_counter()
    while True:
        call()
        count += 1
        elapsed_s = time.perf_counter() - started_s
        if elapsed_s >= TIMED_S:
            return elapsed_s / count


def show(title: str, times_s: dict[str, list[float]]) -> None:
    print(f"\n{title}, {len(times_s[BASE])} rounds")
    for label, taken_s in times_s.items():
        if not taken_s:
            continue
        ratios = [base / taken for base, taken in zip(times_s[BASE], taken_s, strict=True)]
        print(f"  {label:16}{spread([1e3 * s for s in taken_s]):36}{spread(ratios)}", flush=True)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):9.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    main()
