"""What the processors could do: ONNX Runtime alone in a process, nothing served.

    python -m benchmarks.raw_onnx MODEL.onnx --batches 1,8,32 --streams 2

Prints images a second by batch size as a JSON object. A stream is a thread that runs batches one
after another on one processor.
"""

import argparse
import json
import threading
import time

import numpy as np
import onnxruntime as ort


def open_session(path: str, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def images_per_s(session: ort.InferenceSession, batch: int, streams: int, seconds: float) -> float:
    image = session.get_inputs()[0]
    images = np.random.default_rng(0).integers(0, 256, (batch, *image.shape[1:]), np.uint8)
    counts = [0] * streams
    session.run(None, {image.name: images})
    end_s = time.perf_counter() + seconds

    def run(stream: int) -> None:
        while time.perf_counter() < end_s:
            session.run(None, {image.name: images})
            counts[stream] += batch

    threads = [threading.Thread(target=run, args=(stream,)) for stream in range(streams)]
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
    arguments = parser.parse_args()
    session = open_session(arguments.model, threads=1)
    found = {
        batch: images_per_s(session, int(batch), arguments.streams, arguments.seconds)
        for batch in arguments.batches.split(",")
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
