"""The time of a batch on a device: the device's own work, the copies, and the host.

    python -m benchmarks.device_time MODELS/NAME/1 --device cuda --precision fp16 [--cuda-graphs]

For each batch size, in milliseconds, the median of the runs: `run` is what the server waits for,
from NumPy to NumPy, by ONNX Runtime; `torchscript` the same by torch; `device` the TorchScript
module alone on a tensor that lies there, by CUDA events; `to` and `from` the copies of the pixels
and the outputs. On a CPU the clock takes the place of the events, and the copies are none.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from convoy.server.backends.base import Backend, load_backend
from convoy.server.backends.device import CudaOptions, Runtime, choose_device
from convoy.server.backends.torch import TorchScriptBackend
from convoy.server.models.manifest import Manifest
from convoy.server.models.repository import ModelVersion, read_manifest

RUNS = 20
WARM_RUNS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", type=Path, help="the folder MODELS/NAME/VERSION")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--cuda-graphs", action="store_true")
    parser.add_argument("--batches", default="1,2,4,8,16,32,64,128,256")
    arguments = parser.parse_args()
    manifest = read_manifest(arguments.version)
    onnx = load(manifest, arguments, Runtime.ONNX_RUNTIME)
    torchscript = load(manifest, arguments, Runtime.TORCHSCRIPT)
    assert isinstance(torchscript, TorchScriptBackend)
    print(f"{manifest.name}, {arguments.precision}, {onnx.provider}, {torchscript.provider}")
    print("batch        run  images/s  torchscript     device         to       from")
    for size in map(int, arguments.batches.split(",")):
        images = np.random.default_rng(0).integers(0, 256, (size, *manifest.sample_shape), np.uint8)
        resident = torch.from_numpy(images).to(arguments.device)
        outputs = torch.zeros((2, size, len(manifest.labels)), device=arguments.device)
        run_ms = median_ms(lambda batch=images: onnx.run(batch))
        others = (
            median_ms(lambda batch=images: torchscript.run(batch)),
            device_ms(lambda batch=resident: torchscript._runner._module(batch), arguments.device),
            median_ms(lambda batch=images: copy_to(batch, arguments.device)),
            median_ms(outputs.cpu),
        )
        cells = "".join(f"{value:11.3f}" for value in others)
        print(f"{size:5}{run_ms:11.3f}{1000 * size / run_ms:10.0f}  {cells}", flush=True)


def load(manifest: Manifest, arguments: argparse.Namespace, runtime: Runtime) -> Backend:
    record = manifest.artifact(runtime.format, arguments.precision).file
    file = ModelVersion(arguments.version, manifest).read(record)
    device = choose_device(arguments.device)
    cuda = CudaOptions(tf32=arguments.precision == "tf32", graphs=arguments.cuda_graphs)
    return load_backend(runtime, file, device, 1, cuda)


def copy_to(images: np.ndarray, device: str) -> None:
    torch.from_numpy(images).to(device)
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def median_ms(call: Callable[[], object]) -> float:
    return statistics.median(timed_ms(call) for _ in warm(call))


def timed_ms(call: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started_s)


def device_ms(call: Callable[[], object], device: str) -> float:
    with torch.inference_mode():
        if not device.startswith("cuda"):
            return median_ms(call)
        return statistics.median(event_ms(call) for _ in warm(call))


def event_ms(call: Callable[[], object]) -> float:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after)


def warm(call: Callable[[], object]) -> range:
    """Call it a few times and return the runs that then count."""
    for _ in range(WARM_RUNS):
        call()
    return range(RUNS)


if __name__ == "__main__":
    main()
