"""Count the Python calls inside `server` that one unary ModelInfer costs.

    python -m benchmarks.count_calls REPOSITORY [--deadline-s 10] [--requests 200]

A server with its default settings and a client run in this process. After a warm-up, requests of
one image follow one after another; the calls of every function of `convoy.server`, on the event
loop and on the threads of the model, are counted and divided by the number of requests. Resuming a
coroutine counts as a call. Imports of other libraries are not counted.
"""

import argparse
import asyncio
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import grpc
import numpy as np
import uvloop
from prometheus_client import CollectorRegistry

from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import inference_pb2_grpc
from convoy.server.app import App
from convoy.server.settings import parse_settings

PACKAGE = "convoy.server"
WARM_UP_REQUESTS = 50


@dataclass(frozen=True)
class Calls:
    """The calls of one request.

    Attributes:
        by_function: Mean calls by (module, function).
    """

    by_function: dict[tuple[str, str], float]

    @property
    def total(self) -> float:
        return sum(self.by_function.values())

    @property
    def by_module(self) -> dict[str, float]:
        modules: Counter[str] = Counter()
        for (module, _), calls in self.by_function.items():
            modules[module] += calls
        return dict(modules.most_common())


class CallCounter:
    """Counts the calls of functions of `convoy.server` on all threads it is installed on."""

    def __init__(self) -> None:
        self.counting = False
        self.counts: Counter[tuple[str, str]] = Counter()

    def profile(self, frame: FrameType, event: str, argument: object) -> None:
        if self.counting and event == "call":
            module = frame.f_globals.get("__name__", "")
            if module.startswith(PACKAGE):
                self.counts[module, frame.f_code.co_qualname] += 1

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Installs it on this thread and on those that start in the block."""
        threading.setprofile(self.profile)
        sys.setprofile(self.profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)


def count(repository: Path, requests: int, deadline_s: float | None, flags: Iterable[str]) -> Calls:
    """Count the calls of a request for the first model of a repository."""
    counter = CallCounter()

    async def measure() -> None:
        settings = parse_settings(["--repository", str(repository), *flags])
        async with App(settings, CollectorRegistry()) as app:
            ask = Asker(app.port, deadline_s)
            await asyncio.to_thread(ask, WARM_UP_REQUESTS)
            counter.counting = True
            await asyncio.to_thread(ask, requests)
            counter.counting = False

    with counter.installed():
        uvloop.run(measure())
    # Occasional work, such as a scrape, is not part of a request.
    often = {key: calls / requests for key, calls in counter.counts.items() if calls > requests / 4}
    return Calls(often)


class Asker:
    """A client that sends one request after another, on the thread that calls it."""

    def __init__(self, port: int, deadline_s: float | None) -> None:
        self._address = f"127.0.0.1:{port}"
        self._deadline_s = deadline_s

    def __call__(self, requests: int) -> None:
        with grpc.insecure_channel(self._address) as channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            request = one_image(stub)
            for _ in range(requests):
                stub.ModelInfer(request, timeout=self._deadline_s)


def one_image(stub: inference_pb2_grpc.GRPCInferenceServiceStub) -> pb.ModelInferRequest:
    """Return a request for the only model of a server."""
    model = stub.ModelMetadata(pb.ModelMetadataRequest())
    shape = [1, *model.inputs[0].shape[1:]]
    tensor = pb.ModelInferRequest.InferInputTensor(
        name=model.inputs[0].name, datatype=model.inputs[0].datatype, shape=shape
    )
    return pb.ModelInferRequest(
        model_name=model.name,
        inputs=[tensor],
        raw_input_contents=[np.zeros(shape, np.uint8).tobytes()],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("repository", type=Path, help="model repository with one model")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument(
        "--deadline-s", type=float, help="deadline of the requests; none by default"
    )
    arguments, flags = parser.parse_known_args()
    calls = count(arguments.repository, arguments.requests, arguments.deadline_s, flags)
    for (module, function), each in sorted(calls.by_function.items()):
        print(f"{each:6.1f}  {module.removeprefix(PACKAGE + '.')}  {function}")
    print(f"{calls.total:.0f} calls in {len(calls.by_module)} files")


if __name__ == "__main__":
    main()
