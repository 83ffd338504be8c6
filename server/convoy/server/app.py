"""Assemble the server: start, ready, drain, stop.

This is the composition root: the only module that imports all parts.
"""

import asyncio
import contextlib
import os
import signal
from types import TracebackType

import structlog
from prometheus_client import CollectorRegistry

from convoy.server.assembly import (
    canary_limits,
    check_provider,
    largest_request_bytes,
    load_options,
    message_limits,
    open_repository,
    trusted_key,
    verdict_records,
    warn_of_large_images,
)
from convoy.server.backends.base import find_devices, import_runtime
from convoy.server.backends.device import Device, Runtime
from convoy.server.cpus import usable_cpus
from convoy.server.edge.application import operations_application
from convoy.server.edge.connections import ConnectionGauge
from convoy.server.edge.listener import Listener, ListenerOptions, listen_on
from convoy.server.errors import StartupError
from convoy.server.frontends.fleet import FrontEnds
from convoy.server.frontends.merged_metrics import MergedRegistry
from convoy.server.images.decoding import rely_on_own_pixel_limit
from convoy.server.metrics.devices import watch_devices, watch_process
from convoy.server.metrics.readiness import ReadinessCollector
from convoy.server.metrics.requests import ServerMetrics
from convoy.server.models.background import in_thread
from convoy.server.models.loader import ModelLoader
from convoy.server.models.manager import ModelManager
from convoy.server.models.policy import VersionPolicy
from convoy.server.models.readiness import ServerState
from convoy.server.models.registry import LoadedModel, ModelRegistry
from convoy.server.models.repository import ModelRepository
from convoy.server.models.versions import RejectedVersions, VersionSwitch
from convoy.server.models.warmup import settle_memory
from convoy.server.ports import AdminPort, CallerPort, Served, open_caller_port
from convoy.server.rest.traffic import Traffic, TrafficRecorder
from convoy.server.settings import ServerSettings


async def stop_signal() -> signal.Signals:
    """Wait for SIGTERM or SIGINT; a second one ends the process at once, by the default action."""
    loop = asyncio.get_running_loop()
    received: asyncio.Future[signal.Signals] = loop.create_future()
    numbers = (signal.SIGTERM, signal.SIGINT)

    def stop(number: signal.Signals) -> None:
        for each in numbers:
            if os.getpid() == 1:
                # For the first process of a container the kernel ignores the default action.
                loop.add_signal_handler(each, os._exit, 128 + each)
                continue
            loop.remove_signal_handler(each)
            # Python's own handler of Ctrl-C would unwind the stack, and so drain.
            signal.signal(each, signal.SIG_DFL)
        received.set_result(number)

    for number in numbers:
        loop.add_signal_handler(number, stop, number)
    return await received


async def _reload_at_hangups(hangup: asyncio.Event, app: "App") -> None:
    while True:
        await hangup.wait()
        hangup.clear()
        try:
            await app.reload()
        except Exception:  # the server keeps using what it read before
            logger.exception("reloading failed")


logger = structlog.get_logger()

# Wait after the signal: earlier requests may still be in socket buffers, some of them on
# connections that are not accepted yet.
_ARRIVAL_S = 0.2


class App:
    """The running server.

    Example:
        async with App(settings, CollectorRegistry()) as app:
            print(app.port)

    Entering listens, loads every model and then reports ready; leaving drains. Entering raises
    StartupError if the server cannot serve with its settings.
    """

    def __init__(self, settings: ServerSettings, registry: CollectorRegistry) -> None:
        self._settings = settings
        self._metrics = ServerMetrics(registry)
        watch_process(registry, settings.backend)
        self._models = ModelRegistry[LoadedModel]()
        registry.register(ReadinessCollector(self._models))
        self._merged = MergedRegistry(registry) if settings.front_ends else None
        self._recorder = TrafficRecorder(self._merged or registry, Traffic())
        self._front: CallerPort | FrontEnds
        self._admin: AdminPort | None = None
        self._manager: ModelManager
        self._key = trusted_key(settings)
        self._cleanup = contextlib.AsyncExitStack()
        self.port = 0
        self.rest_port = 0
        self.metrics_port = 0
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
        # On threads: drivers and storage may block, and SIGTERM must end the process even then.
        runtime = Runtime(settings.backend)
        devices = await in_thread(find_devices, settings.device, runtime)
        check_provider(settings, devices)
        await in_thread(watch_devices, self._metrics.registry)
        repository = await in_thread(open_repository, settings, self._metrics)
        self._cleanup.callback(repository.close)
        manager = self._manager = self._model_manager(repository, devices)
        # First in, last out: accepted requests are answered before the instances end.
        self._cleanup.push_async_callback(manager.close)
        await self._listen_for_operators()
        await self._listen_for_callers(repository)
        await in_thread(import_runtime, runtime)
        # Before any model is loaded, so that the garbage collector can still free the models.
        settle_memory()
        await manager.start()
        await self._listen_for_admin(manager)
        await self._become(ServerState.SERVING)
        # Registered last, so it runs first: load balancers see the state before requests fail.
        self._cleanup.push_async_callback(self._drain)
        if settings.poll_s:
            polling = asyncio.create_task(manager.poll(settings.poll_s))
            self._cleanup.callback(polling.cancel)
        logger.info(
            "serving",
            address=f"{settings.host}:{self.port}",
            **({"rest": f"{settings.host}:{self.rest_port}"} if self.rest_port else {}),
            metrics=f"{settings.metrics_host}:{self.metrics_port}",
            **({"admin": f"{settings.host}:{self.admin_port}"} if self.admin_port else {}),
            models=len({model.name for model in self._models}),
            device=",".join(map(str, devices)),
        )

    def _model_manager(
        self, repository: ModelRepository, devices: tuple[Device, ...]
    ) -> ModelManager:
        settings = self._settings
        return ModelManager(
            repository,
            VersionPolicy.parse(settings.version_policy),
            ModelLoader(load_options(settings, devices, self._key), self._metrics),
            models=self._models,
            switch=VersionSwitch(self._models, self._metrics),
            rejections=RejectedVersions(self._metrics.models, fingerprint=repository.fingerprint),
            canary=canary_limits(settings),
            verdicts=verdict_records(settings),
            load_timeout_s=settings.load_timeout_s,
            exit_on_error=settings.exit_on_error,
        )

    async def _listen_for_operators(self) -> None:
        settings, models = self._settings, self._models
        application = operations_application(
            self._merged or self._metrics.registry,
            is_live=lambda: models.readiness.live,
            is_ready=lambda: models.readiness.ready,
        )
        listener = Listener(
            listen_on(settings.metrics_host, settings.metrics_port, "--metrics-port"),
            application,
            ListenerOptions(log_format=settings.log_format),
        )
        self.metrics_port = listener.port
        await listener.start()
        self._cleanup.push_async_callback(listener.stop)

    async def _listen_for_callers(self, repository: ModelRepository) -> None:
        settings = self._settings
        if settings.ui:
            following = asyncio.create_task(self._recorder.follow())
            self._cleanup.callback(following.cancel)
        warn_of_large_images(settings, self._models)
        least_bytes = 0
        if settings.transport == "grpcio":
            # The limit of the C core cannot change while it runs.
            least_bytes = await in_thread(largest_request_bytes, settings, repository)
        self._front = self._open_front(least_bytes)
        self.port, self.rest_port = self._front.port, self._front.rest_port
        self._cleanup.push_async_callback(self._front.drain)
        ConnectionGauge(self._metrics.registry, self.port)
        await self._front.start()

    def _open_front(self, least_bytes: int) -> CallerPort | FrontEnds:
        settings = self._settings
        if settings.rest_port is not None and settings.transport != "grpcio":
            raise StartupError("--rest-port: expected also --transport grpcio")
        if self._merged:
            if settings.transport == "grpcio":
                raise StartupError("--front-ends: expected also --transport h2corn")
            return FrontEnds(settings, self._models, self._merged, self._recorder)
        limits = message_limits(settings, self._models, least_bytes)
        traffic = self._recorder.traffic
        served = Served(self._models, self._metrics, traffic, limits, usable_cpus())
        return open_caller_port(settings, served, self._cleanup)

    async def _listen_for_admin(self, manager: ModelManager) -> None:
        if self._settings.admin_port is None:
            return
        port = self._admin = AdminPort(self._settings, manager, self._metrics)
        self.admin_port = port.port
        await port.start()
        self._cleanup.push_async_callback(port.stop)

    async def reload(self) -> None:
        """Read the credential files again and scan the repository."""
        if self._key:
            self._key.reload()
        self._front.reload()
        if self._admin:
            self._admin.reload()
        await self._manager.reload()
        logger.info("reloaded")

    async def lame_duck(self) -> None:
        """Report NOT_SERVING and keep answering for as long as the settings say."""
        await self._become(ServerState.LAME_DUCK)
        await asyncio.sleep(max(self._settings.lame_duck_s, _ARRIVAL_S))

    async def _drain(self) -> None:
        await self._become(ServerState.DRAINING)
        for model in self._models:
            model.batcher.stop_delaying()

    async def _become(self, state: ServerState) -> None:
        self._models.state = state
        await self._front.settled()


async def serve(settings: ServerSettings, registry: CollectorRegistry) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends the process at once.

    SIGHUP reloads the credentials and scans the repository.
    """
    rely_on_own_pixel_limit()
    stopped = asyncio.create_task(stop_signal())
    hangup = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hangup.set)
    ready = asyncio.Event()
    running = asyncio.create_task(_run(App(settings, registry), ready, stopped, hangup))
    try:
        await asyncio.wait({stopped, running}, return_when=asyncio.FIRST_COMPLETED)
        if not ready.is_set():
            # Stopped while starting: there is nothing to finish.
            running.cancel()
        await running
    except asyncio.CancelledError:
        logger.info("stopped while starting")
    finally:
        stopped.cancel()


async def _run(
    app: App, ready: asyncio.Event, stopped: asyncio.Task[signal.Signals], hangup: asyncio.Event
) -> None:
    async with app:
        ready.set()
        reloading = asyncio.create_task(_reload_at_hangups(hangup, app))
        await stopped
        reloading.cancel()
        logger.info("draining")
        await app.lame_duck()
    logger.info("stopped")
