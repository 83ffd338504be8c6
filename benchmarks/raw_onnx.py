"""The limit of the processors: ONNX Runtime alone in a process, without a server.

    python -m benchmarks.raw_onnx MODEL.onnx --batches 1,8,32 --streams 2
    python -m benchmarks.raw_onnx MODEL.onnx --batches 1,8,32 --binding

Prints images/s by batch size as a JSON object. A stream is a thread that runs batches one
after another on one processor.
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable

import numpy as np
import onnxruntime as ort


def open_session(path: str, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def runner(session: ort.InferenceSession, batch: int, binds: bool) -> Callable[[], object]:
    """Return a function that runs a batch once.

    Args:
        session: The model.
        batch: Images in it.
        binds: Whether input and outputs are bound once to buffers that every run uses again.
    """
    image = session.get_inputs()[0]
    images = np.random.default_rng(0).integers(0, 256, (batch, *image.shape[1:]), np.uint8)
    if not binds:
        return lambda: session.run(None, {image.name: images})
    binding = session.io_binding()
    binding.bind_cpu_input(image.name, images)
    for output in session.get_outputs():
        buffer = np.empty((batch, *output.shape[1:]), np.float32)
        binding.bind_output(output.name, "cpu", 0, np.float32, buffer.shape, buffer.ctypes.data)
        buffers.append(buffer)
    return lambda: session.run_with_iobinding(binding)


# Bound buffers live as long as the process.
buffers: list[np.ndarray] = []


def images_per_s(
    session: ort.InferenceSession, batch: int, streams: int, seconds: float, binds: bool = False
) -> float:
    counts = [0] * streams
    runs = [runner(session, batch, binds) for _ in range(streams)]
    runs[0]()
    end_s = time.perf_counter() + seconds

    def work(stream: int) -> None:
        run = runs[stream]
        while time.perf_counter() < end_s:
            run()
            counts[stream] += batch

    threads = [threading.Thread(target=work, args=(stream,)) for stream in range(streams)]
    started_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - started_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5, help="with --binding")
    parser.add_argument(
        "--binding", action="store_true", help="compare plain runs with bound buffers, in turn"
    )
    arguments = parser.parse_args()
    session = open_session(arguments.model, threads=1)
    batches = [int(batch) for batch in arguments.batches.split(",")]
    if arguments.binding:
        for batch in batches:
            ratios = sorted(
                images_per_s(session, batch, arguments.streams, arguments.seconds, binds=True)
                / images_per_s(session, batch, arguments.streams, arguments.seconds)
                for _ in range(arguments.rounds)
            )
            median = statistics.median(ratios)
            print(f"batch {batch}: bound is {median:.3f} [{ratios[0]:.3f}-{ratios[-1]:.3f}]")
        return
    found = {
        batch: images_per_s(session, batch, arguments.streams, arguments.seconds)
        for batch in batches
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
