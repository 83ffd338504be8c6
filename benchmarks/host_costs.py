"""Processor time of a request on the host: in a front end, and in the process that owns the device.

    python -m benchmarks.host_costs MODELS NAME [--images 1] [--front-ends 0,1] [--seconds 3]

ModelInfer with raw tensors, up to 64 in flight, in milliseconds of processor time per request. With
no front end the owner does everything. What the model itself takes on the CPU is measured in this
process and subtracted: on a GPU the device does that work. `client ms` is the load generator's.
"""

import argparse
import threading
import time
from pathlib import Path

import grpc
import numpy as np

from benchmarks.processes import cpu_seconds, serving, tree_seconds
from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import inference_pb2_grpc
from convoy.server.backends.base import load_backend
from convoy.server.backends.device import Device, Runtime
from convoy.server.models.repository import ModelVersion, read_manifest

MOST_IN_FLIGHT = 64
# Half of the server's queue.
MOST_IMAGES = 512
CONNECTIONS = 4
PORTS = ("--port", "0", "--metrics-port", "0", "--log-format", "json", "--device", "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("name")
    parser.add_argument("--images", type=int, default=1, help="images in a request")
    parser.add_argument("--front-ends", default="0,1", help="numbers of front ends to measure")
    parser.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    folder = arguments.models / arguments.name / "1"
    shape = (arguments.images, *read_manifest(folder).sample_shape)
    request = pb.ModelInferRequest(
        model_name=arguments.name,
        inputs=[pb.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=shape)],
        raw_input_contents=[bytes(int(np.prod(shape)))],
    )
    model_ms = model_cost_ms(folder, shape)
    print(f"milliseconds per request of {shape[0]} images; the model itself: {model_ms:.3f}")
    print("front ends   requests/s   owner ms   front end ms   client ms")
    for count in map(int, arguments.front_ends.split(",")):
        flags = ["--repository", str(arguments.models), "--front-ends", str(count)]
        with serving(["convoy.server", *flags, *PORTS]) as server:
            load(server.address, request, 1.0)
            owner_s, all_s = cpu_seconds(server.pid), tree_seconds(server.pid)
            client_s = time.process_time()
            answered = load(server.address, request, arguments.seconds)
            client_ms = 1e3 * (time.process_time() - client_s) / answered
            owner_ms = 1e3 * (cpu_seconds(server.pid) - owner_s) / answered
            front_ms = 1e3 * (tree_seconds(server.pid) - all_s) / answered - owner_ms
        rate = answered / arguments.seconds
        costs = f"{owner_ms - model_ms:11.3f}{front_ms:15.3f}{client_ms:12.3f}"
        print(f"{count:10}{rate:13.0f}{costs}", flush=True)


def model_cost_ms(folder: Path, shape: tuple[int, ...]) -> float:
    """Processor time of a request's images in a large batch, in this process."""
    manifest = read_manifest(folder)
    file = ModelVersion(folder, manifest).read(manifest.artifact(Runtime.ONNX_RUNTIME.format).file)
    backend = load_backend(Runtime.ONNX_RUNTIME, file, Device("cpu"), threads=1)
    images = np.zeros((32, *shape[1:]), np.uint8)
    backend.run(images)
    began_s, runs = time.process_time(), 50
    for _ in range(runs):
        backend.run(images)
    return 1e3 * (time.process_time() - began_s) / (runs * len(images)) * shape[0]


def load(address: str, request: pb.ModelInferRequest, seconds: float) -> int:
    """Keep requests in flight for some seconds; return how many were answered."""
    images = request.inputs[0].shape[0]
    room = threading.Semaphore(max(1, min(MOST_IN_FLIGHT, MOST_IMAGES // images)))
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.insecure_channel(address, options) for _ in range(CONNECTIONS)]
    calls = [inference_pb2_grpc.GRPCInferenceServiceStub(each).ModelInfer for each in channels]
    futures: list[grpc.Future] = []
    ends_s = time.monotonic() + seconds
    while time.monotonic() < ends_s:
        room.acquire()
        future = calls[len(futures) % CONNECTIONS].future(request)
        future.add_done_callback(lambda _: room.release())
        futures.append(future)
    for future in futures:
        future.result()
    for channel in channels:
        channel.close()
    return len(futures)


if __name__ == "__main__":
    main()
