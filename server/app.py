"""Puts the server together: start, ready, drain, stop.

The one module that knows all others.
"""

import asyncio
import contextlib
import signal
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

import structlog
from grpc_channelz.v1 import channelz
from prometheus_client import CollectorRegistry

from convoy.oip.v2 import inference_pb2
from server.access import Access
from server.assembly import access_files, call_boundary, image_decoder, open_tracing
from server.backends.devices import Device, choose_devices, usable_cpus
from server.catalogue import ModelCatalogue, ServerState
from server.decoding import ImageDecoder
from server.device_metrics import watch_devices
from server.errors import StartupError
from server.frontends.fleet import FrontEnds
from server.frontends.metrics import MergedRegistry
from server.grpc_face import GrpcFace
from server.http.calls import HttpBoundary
from server.http.face import HttpFace
from server.http.gate import TokenGate
from server.http.listener import HttpListener
from server.http.rest import RestFace
from server.images import refuse_decompression_bombs
from server.lifecycle import stop_signal
from server.listener import GrpcListener, Transport
from server.loading import ModelLoader
from server.manager import ModelManager
from server.metrics import ServerMetrics
from server.options import (
    MESSAGE_OVERHEAD_BYTES,
    canary_limits,
    load_options,
    max_message_bytes,
)
from server.policy import VersionPolicy
from server.protocols.calls import CallBoundary
from server.protocols.inference import Inference
from server.protocols.oip_repository import RepositoryServicer
from server.protocols.registration import handler_of
from server.refusals import Refusals
from server.repository import ModelRepository
from server.rollout import Rollout
from server.served_model import LoadedModel
from server.settings import ServerSettings
from server.warmup import settle_memory

if TYPE_CHECKING:
    from server.telemetry import Tracing

logger = structlog.get_logger()

_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]


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
        watch_devices(registry)
        self._catalogue = ModelCatalogue[LoadedModel]()
        self._merged = MergedRegistry(registry) if settings.front_ends else None
        self._front: GrpcFace | FrontEnds
        self._cleanup = contextlib.AsyncExitStack()
        self.port = 0
        self.http_port = 0
        self.admin_port = 0

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
        devices = choose_devices(settings.device)
        repository = ModelRepository(settings.repository)
        manager = self._model_manager(repository, devices)
        # First in, last out: accepted requests are answered before the instances end.
        self._cleanup.push_async_callback(manager.close)
        await self._listen(max_message_bytes(settings, repository.models()))
        await manager.start()
        settle_memory()
        await self._listen_for_admin(manager)
        await self._become(ServerState.SERVING)
        # Registered last, so it runs first: load balancers hear of the end before requests do.
        self._cleanup.push_async_callback(self._drain)
        if settings.poll_s:
            polling = asyncio.create_task(manager.poll(settings.poll_s))
            self._cleanup.callback(polling.cancel)
        logger.info(
            "serving",
            grpc=f"{settings.host}:{self.port}",
            http=f"{settings.host}:{self.http_port}",
            **({"admin": f"{settings.host}:{self.admin_port}"} if self.admin_port else {}),
            models=len({model.name for model in self._catalogue}),
            device=",".join(map(str, devices)),
        )

    def _model_manager(
        self, repository: ModelRepository, devices: tuple[Device, ...]
    ) -> ModelManager:
        settings = self._settings
        return ModelManager(
            repository,
            VersionPolicy.parse(settings.version_policy),
            ModelLoader(load_options(settings, devices), self._metrics),
            catalogue=self._catalogue,
            rollout=Rollout(self._catalogue, self._metrics, self._model_changed),
            refusals=Refusals(self._metrics.models),
            canary=canary_limits(settings),
        )

    async def _listen(self, max_message_bytes: int) -> None:
        settings = self._settings
        decoder = image_decoder(settings, usable_cpus(), self._cleanup)
        boundary = call_boundary(settings, self._metrics)
        access = Access(access_files(settings))
        access.warn_if_open(settings.host)
        inference = Inference(self._catalogue, decoder)
        tracing = open_tracing(settings, self._cleanup)
        rest = RestFace(
            self._catalogue,
            inference,
            HttpBoundary(boundary),
            max_message_bytes,
            tracing.traced_route if tracing else None,
        )
        await self._listen_http(rest, access)
        self._front = self._grpc_front(max_message_bytes, access, decoder, boundary, tracing)
        self._cleanup.push_async_callback(self._front.drain, settings.drain_timeout_s)
        await self._front.start()

    def _grpc_front(
        self,
        max_message_bytes: int,
        access: Access,
        decoder: ImageDecoder,
        boundary: CallBoundary,
        tracing: "Tracing | None",
    ) -> GrpcFace | FrontEnds:
        settings = self._settings
        transport = Transport(settings.transport)
        if self._merged:
            if transport is not Transport.NATIVE:
                raise StartupError("--front-ends: expected --transport native beside it")
            front_ends = FrontEnds(settings, max_message_bytes, self._catalogue, self._merged)
            self.port = front_ends.port
            return front_ends
        listener = GrpcListener.open(
            settings.host, settings.port, max_message_bytes, access=access, transport=transport
        )
        self.port = listener.port
        trace = tracing.traced if tracing else None
        return GrpcFace(listener, self._catalogue, decoder, boundary, trace)

    async def _listen_http(self, rest: RestFace, access: Access) -> None:
        settings = self._settings
        registry = self._merged or self._metrics.registry
        face = HttpFace(rest, self._catalogue, registry, settings.ui)
        listener = HttpListener(
            settings.host,
            settings.http_port,
            TokenGate(face.application, access),
            access.tls_context(["http/1.1"]),
        )
        self.http_port = listener.port
        await self._cleanup.enter_async_context(face.following())
        await listener.start()
        self._cleanup.push_async_callback(listener.stop, settings.drain_timeout_s)

    def _model_changed(self, name: str, ready: bool | None) -> None:
        self._front.model_changed(name, ready)

    async def _listen_for_admin(self, manager: ModelManager) -> None:
        settings = self._settings
        _check_channelz(settings)
        if settings.admin_port is None:
            return
        if settings.admin_token_file is None:
            raise StartupError("--admin-port: expected --admin-token-file beside it")
        files = replace(
            access_files(settings),
            token=settings.admin_token_file,
            token_flag="--admin-token-file",
        )
        listener = GrpcListener.open(
            settings.host,
            settings.admin_port,
            MESSAGE_OVERHEAD_BYTES,
            access=Access(files),
            transport=Transport(settings.transport),
            flag="--admin-port",
        )
        self.admin_port = listener.port
        servicer = RepositoryServicer(manager, CallBoundary(self._metrics))
        listener.server.add_generic_rpc_handlers((handler_of(_INFERENCE, servicer),))
        if settings.channelz:
            channelz.add_channelz_servicer(listener.server)
        await listener.start((_INFERENCE.full_name,))
        self._cleanup.push_async_callback(listener.drain, 0)

    async def lame_duck(self) -> None:
        """Reports NOT_SERVING and answers on for as long as the settings say."""
        await self._become(ServerState.LAME_DUCK)
        await asyncio.sleep(self._settings.lame_duck_seconds)

    async def _drain(self) -> None:
        await self._become(ServerState.DRAINING)
        for model in self._catalogue:
            model.batcher.stop_delaying()

    async def _become(self, state: ServerState) -> None:
        self._catalogue.state = state
        self._front.state_changed()
        await self._front.settled()


async def serve(settings: ServerSettings, registry: CollectorRegistry) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends the process at once."""
    refuse_decompression_bombs()
    stopped = asyncio.create_task(stop_signal())
    ready = asyncio.Event()
    running = asyncio.create_task(_run(App(settings, registry), ready, stopped))
    try:
        await asyncio.wait({stopped, running}, return_when=asyncio.FIRST_COMPLETED)
        if not ready.is_set():
            # Told to stop while starting: there is nothing to finish.
            running.cancel()
        await running
    except asyncio.CancelledError:
        logger.info("stopped while starting")
    finally:
        stopped.cancel()


async def _run(app: App, ready: asyncio.Event, stopped: asyncio.Task[signal.Signals]) -> None:
    async with app:
        ready.set()
        await stopped
        logger.info("draining")
        await app.lame_duck()
    logger.info("stopped")


def _check_channelz(settings: ServerSettings) -> None:
    if settings.channelz and settings.admin_port is None:
        raise StartupError("--channelz: expected --admin-port beside it")
    if settings.channelz and Transport(settings.transport) is not Transport.GRPCIO:
        raise StartupError("--channelz: expected --transport grpcio beside it")
