"""The servicers without a network: a loaded model, its batcher, and a context that records."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from prometheus_client import CollectorRegistry

from server.backends.devices import Device
from server.backends.runtimes import Runtime
from server.batcher import BatchingLimits
from server.catalogue import ModelCatalogue, ServerState
from server.decoding import ImageDecoder
from server.loading import LoadOptions, ModelLoader
from server.metrics import ServerMetrics
from server.protocols.calls import CallBoundary
from server.protocols.classifier import ClassifierServicer
from server.protocols.inference import Inference
from server.protocols.oip import InferenceServicer
from server.protocols.streams import Streams

MAX_PIXELS = 1_000_000


class AbortedError(Exception):
    """The status that a call ended with."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing: object) -> None:
        super().__init__(details)
        self.code = code
        self.details = details
        self.trailing = trailing


@dataclass
class Context:
    """A call's context.

    Attributes:
        timeout_s: What is left until the deadline.
        written: The messages of a reply that streams.
    """

    timeout_s: float | None = None
    written: list[object] = field(default_factory=list)

    def time_remaining(self) -> float | None:
        return self.timeout_s

    def peer(self) -> str:
        return "ipv4:127.0.0.1:5000"

    async def write(self, message: object) -> None:
        self.written.append(message)

    async def abort(self, code, details="", trailing_metadata=()):
        raise AbortedError(code, details, trailing_metadata)


@dataclass(frozen=True)
class Servicers:
    """Both services over one catalogue."""

    inference: InferenceServicer
    classifier: ClassifierServicer
    catalogue: ModelCatalogue
    streams: Streams
    registry: CollectorRegistry


@asynccontextmanager
async def servicers(folder: Path, **limits: object) -> AsyncIterator[Servicers]:
    """Serves the version in a folder NAME/VERSION on the CPU."""
    registry = CollectorRegistry()
    metrics = ServerMetrics(registry)
    options = LoadOptions(
        Runtime.ONNX_RUNTIME,
        (Device("cpu"),),
        threads=1,
        limits=BatchingLimits(**{"max_batch_size": 4, "max_queue_size": 4096, **limits}),
    )
    loader = ModelLoader(options, metrics)
    model = await asyncio.to_thread(loader.load, folder)
    model.batcher.start()
    catalogue = ModelCatalogue()
    catalogue.add(model)
    catalogue.make_default(model)
    catalogue.state = ServerState.SERVING
    with ThreadPoolExecutor(2) as threads:
        decoder = ImageDecoder(threads, 2, MAX_PIXELS, max_waiting=1024)
        boundary = CallBoundary(metrics)
        streams = Streams(catalogue)
        yield Servicers(
            InferenceServicer(catalogue, Inference(catalogue, decoder), boundary, streams),
            ClassifierServicer(catalogue, decoder, boundary, streams),
            catalogue,
            streams,
            registry,
        )
        await model.batcher.drain()
