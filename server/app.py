"""Puts the server together: start, ready, drain, stop.

The one module that knows all others.
"""

import asyncio
import contextlib
import signal
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from convoy.oip.v2 import inference_pb2, inference_pb2_grpc
from convoy.v1 import classifier_pb2, classifier_pb2_grpc
from server.backends.devices import Device, choose_device, usable_cpus
from server.batcher import BatchingLimits
from server.catalogue import ModelCatalogue
from server.errors import StartupError
from server.http import HttpServer
from server.images import refuse_decompression_bombs
from server.loading import LoadOptions, load_model
from server.manifest import ArtefactFormat
from server.metrics import ServerMetrics
from server.protocols.calls import CallBoundary
from server.protocols.classifier import ClassifierServicer
from server.protocols.oip import InferenceServicer
from server.repository import ModelRepository, ModelVersion
from server.settings import ServerSettings
from server.signing import read_public_key

logger = structlog.get_logger()

_SERVICES = tuple(
    service.full_name
    for file in (classifier_pb2, inference_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
)
_MIB = 1024 * 1024
# What a request carries beside its pixels: names, shapes, parameters.
_MESSAGE_OVERHEAD_BYTES = 64 * 1024


class App:
    """The running server.

    Example:
        async with App(settings, CollectorRegistry()) as app:
            print(app.port)

    Entering starts listening, loads every model and only then reports ready; leaving drains. Raises
    StartupError, on entering, for whatever keeps the server from serving as it was asked to.
    """

    def __init__(self, settings: ServerSettings, registry: CollectorRegistry) -> None:
        self._settings = settings
        self._metrics = ServerMetrics(registry)
        self._catalogue = ModelCatalogue()
        self._health = health.aio.HealthServicer()
        self._cleanup = contextlib.AsyncExitStack()
        self.port = 0
        self.http_port = 0

    async def __aenter__(self) -> "App":
        try:
            await self._start()
        except BaseException:
            await self._cleanup.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._cleanup.aclose()

    async def _start(self) -> None:
        settings = self._settings
        device = choose_device(settings.device)
        versions = ModelRepository(settings.repository).served_versions()
        # First in, last out: accepted requests are answered before the instances end.
        self._cleanup.push_async_callback(self._close_models)
        await self._listen(_max_message_bytes(settings, versions))
        await self._load(versions, device)
        await self._set_ready()
        logger.info(
            "serving",
            grpc=f"{settings.host}:{self.port}",
            http=f"{settings.host}:{self.http_port}",
            models=len(versions),
            device=str(device),
        )

    async def _listen(self, max_message_bytes: int) -> None:
        settings = self._settings
        decoders = self._cleanup.enter_context(
            ThreadPoolExecutor(usable_cpus(), thread_name_prefix="decode")
        )
        boundary = CallBoundary(self._metrics)
        server = grpc.aio.server(
            options=[
                # Two servers must not share a port by accident.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
            ]
        )
        classifier_pb2_grpc.add_ClassifierServiceServicer_to_server(
            ClassifierServicer(self._catalogue, boundary, decoders, settings.max_image_pixels),
            server,
        )
        inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
            InferenceServicer(self._catalogue, boundary), server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        self.port = _bind(server, settings.host, settings.port)
        await self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        http = HttpServer(
            settings.host,
            settings.http_port,
            self._metrics.registry,
            lambda: self._catalogue.ready,
        )
        self._cleanup.callback(http.stop)
        self.http_port = http.port
        http.start()
        await server.start()
        self._cleanup.push_async_callback(self._drain, server)

    async def _load(self, versions: list[ModelVersion], device: Device) -> None:
        options = _load_options(self._settings, device)
        for version in versions:
            model = await asyncio.to_thread(load_model, version, options, self._metrics.batches_of)
            model.batcher.start()
            self._catalogue.add(model)
            self._metrics.model_serves(model.manifest, model.backend)

    async def _set_ready(self) -> None:
        self._catalogue.ready = True
        names = ("", *_SERVICES, *(model.name for model in self._catalogue))
        for name in names:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        # Registered last, so it runs first: load balancers hear of the end before requests do.
        self._cleanup.push_async_callback(self._set_draining)

    async def _set_draining(self) -> None:
        self._catalogue.ready = False
        for model in self._catalogue:
            model.batcher.stop_delaying()
        await self._health.enter_graceful_shutdown()

    async def _drain(self, server: grpc.aio.Server) -> None:
        await server.stop(self._settings.drain_timeout_s)

    async def _close_models(self) -> None:
        for model in self._catalogue:
            await model.batcher.drain()


async def serve(settings: ServerSettings, registry: CollectorRegistry) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends the process at once."""
    refuse_decompression_bombs()
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        # The default action is back for the second one.
        loop.remove_signal_handler(number)
        stopped.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    async with App(settings, registry):
        await stopped.wait()
        logger.info("draining")
    logger.info("stopped")


def _bind(server: grpc.aio.Server, host: str, port: int) -> int:
    try:
        return int(server.add_insecure_port(f"{host}:{port}"))
    except RuntimeError as error:
        raise StartupError(
            f"--port: cannot listen on {host}:{port}: the port is in use or not permitted"
        ) from error


def _max_message_bytes(settings: ServerSettings, versions: list[ModelVersion]) -> int:
    """A full batch of the largest model must fit into one message."""
    largest = max(
        height * width * channels
        for height, width, channels in (version.manifest.sample_shape for version in versions)
    )
    full_batch = settings.max_batch_size * largest + _MESSAGE_OVERHEAD_BYTES
    return max(int(settings.max_message_mb * _MIB), full_batch)


def _load_options(settings: ServerSettings, device: Device) -> LoadOptions:
    cpus = usable_cpus()
    automatic = 1 if device.kind == "cuda" else min(2, cpus)
    instances = settings.instances or automatic
    limits = BatchingLimits(
        max_batch_size=settings.max_batch_size,
        max_queue_size=settings.max_queue_size,
        max_queue_delay_s=settings.max_queue_delay_ms / 1000,
        instances=instances,
    )
    required = settings.require_signature
    return LoadOptions(
        ArtefactFormat(settings.backend),
        device,
        threads=max(1, cpus // instances),
        limits=limits,
        public_key=read_public_key(required) if required else None,
    )
