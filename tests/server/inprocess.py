"""The servicers without a network: a loaded model, its batcher, and a context that records."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from prometheus_client import CollectorRegistry

from convoy.server.backends.device import Device, Runtime
from convoy.server.batching import BatchingLimits
from convoy.server.edge.limits import ByteBudget
from convoy.server.grpc.classifier import ClassifierServicer
from convoy.server.grpc.context import GrpcBoundary
from convoy.server.grpc.oip import InferenceServicer
from convoy.server.grpc.streams import Streams
from convoy.server.images.decoding import DecodeThreads, ImageDecoder
from convoy.server.metrics.requests import ServerMetrics
from convoy.server.models.loader import LoadOptions, ModelLoader
from convoy.server.models.readiness import ServerState
from convoy.server.models.registry import ModelRegistry
from convoy.server.protocol.inference import Inference

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
    """Both services over one models."""

    inference: InferenceServicer
    classifier: ClassifierServicer
    models: ModelRegistry
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
    models = ModelRegistry()
    models.add(model)
    models.make_default(model)
    models.state = ServerState.SERVING
    with contextlib.closing(DecodeThreads(2)) as threads:
        decoder = ImageDecoder(threads, 2, MAX_PIXELS, max_waiting=1024)
        boundary = GrpcBoundary(metrics)
        streams = Streams(models, ByteBudget(1 << 30))
        yield Servicers(
            InferenceServicer(models, Inference(models, decoder), boundary, streams),
            ClassifierServicer(models, decoder, boundary, streams),
            models,
            streams,
            registry,
        )
        await model.batcher.drain()
