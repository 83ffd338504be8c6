"""A front end: the gRPC port without the device."""

import asyncio
import contextlib
import mmap
import signal
import socket
from collections.abc import Coroutine
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry

from server.access import Access
from server.assembly import access_files, call_boundary, image_decoder, open_tracing
from server.catalogue import ModelCatalogue
from server.errors import StartupError
from server.frontends.arena import Arena
from server.frontends.link import Link
from server.frontends.messages import (
    Admitted,
    AllHeard,
    Answered,
    Drain,
    Failed,
    Listening,
    MadeDefault,
    ModelChanged,
    Refused,
    Released,
    Removed,
    Samples,
    Setup,
    StateChanged,
    StatisticsRead,
)
from server.frontends.metrics import samples_of
from server.frontends.remote import RemoteBatcher, RemoteRequests
from server.grpc_face import GrpcFace
from server.images import refuse_decompression_bombs
from server.listener import GrpcListener
from server.logs import configure_logging
from server.metrics import ServerMetrics
from server.served_model import ServedModel

# How old the numbers are that the owner shows.
REPORT_EVERY_S = 0.5


class FrontEnd:
    """Answers calls until the owner says that it shall drain, or is gone.

    Args:
        memory: Where it puts pixels for the owner.
        listening: The port that it shares.
    """

    def __init__(self, memory: mmap.mmap, listening: socket.socket) -> None:
        self._listening = listening
        self._catalogue = ModelCatalogue[ServedModel]()
        self._models: dict[int, ServedModel] = {}
        self._metrics = ServerMetrics(CollectorRegistry())
        self._link = Link(self._receive, self._lost)
        self._requests = RemoteRequests(self._link.send, Arena(memory))
        self._cleanup = contextlib.AsyncExitStack()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()
        self._grpc: GrpcFace | None = None

    async def run(self, owner: socket.socket) -> None:
        """Serves; `owner` is this end of the link."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            # Whoever signals the whole group means the owner, which tells when to end.
            loop.add_signal_handler(number, lambda: None)
        await loop.create_unix_connection(lambda: self._link, sock=owner)
        await self._ended.wait()
        for task in self._tasks:
            task.cancel()
        await self._cleanup.aclose()
        self._link.close()

    def _receive(self, message: Any) -> None:
        match message:
            case Answered() | Refused():
                self._requests.answered(message)
            case Setup():
                self._set_up(message)
            case Admitted():
                self._admit(message)
            case MadeDefault(key):
                self._catalogue.make_default(self._models[key])
            case Removed(key):
                self._spawn(self._release(key))
            case ModelChanged(name, ready) if self._grpc:
                self._grpc.model_changed(name, ready)
            case StateChanged(state) if self._grpc:
                self._catalogue.state = state
                self._grpc.state_changed()
            case StatisticsRead():
                self._requests.statistics_read(message)
            case AllHeard():
                self._link.send(message)
            case Drain(timeout_s):
                self._spawn(self._drain(timeout_s))

    def _set_up(self, setup: Setup) -> None:
        settings = setup.settings
        configure_logging(settings.log_level, settings.log_format)
        refuse_decompression_bombs()
        decoder = image_decoder(settings, setup.processors, self._cleanup)
        boundary = call_boundary(settings, self._metrics)
        try:
            access = Access(access_files(settings))
            listener = GrpcListener.on_socket(self._listening, setup.max_message_bytes, access)
            tracing = open_tracing(settings, self._cleanup)
        except StartupError as error:
            self._link.send(Failed(str(error)))
            self._ended.set()
            return
        trace = tracing.traced if tracing else None
        self._grpc = GrpcFace(listener, self._catalogue, decoder, boundary, trace)
        self._spawn(self._start(self._grpc))

    async def _start(self, grpc: GrpcFace) -> None:
        await grpc.start()
        self._link.send(Listening())
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            self._report()

    def _admit(self, message: Admitted) -> None:
        manifest = message.manifest
        model = ServedModel(
            manifest,
            message.runtime,
            message.runs_on,
            RemoteBatcher(message.key, message.limits, self._requests),
            self._metrics.requests_of(manifest.name, manifest.version),
            partial(self._requests.statistics, message.key),
        )
        self._models[message.key] = model
        self._catalogue.add(model)

    async def _release(self, key: int) -> None:
        model = self._models.pop(key)
        self._catalogue.remove(model)
        await model.users.wait_for_none()
        model.requests.close()
        if self._catalogue.get(model.name, model.version) is None:
            self._metrics.forget(model.name, model.version)
        self._link.send(Released(key))

    async def _drain(self, timeout_s: float) -> None:
        if self._grpc:
            await self._grpc.drain(timeout_s)
        self._report()
        self._ended.set()

    def _report(self) -> None:
        self._link.send(Samples(samples_of(self._metrics.registry)))

    def _lost(self) -> None:
        self._requests.lose()
        self._ended.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
