"""A front end: the port for callers without the device, in a process that the server starts."""

import asyncio
import contextlib
import mmap
import signal
import socket
import sys
from collections.abc import Coroutine
from functools import partial
from typing import Any

import structlog
import uvloop
from prometheus_client import CollectorRegistry, ProcessCollector

from convoy.server.assembly import message_limits
from convoy.server.errors import StartupError
from convoy.server.frontends.ipc import (
    Admitted,
    AllProcessed,
    Answered,
    Arena,
    Drain,
    Failed,
    HealthChanged,
    InferFailed,
    Link,
    Listening,
    MadeDefault,
    RecentTraffic,
    Released,
    Reload,
    Removed,
    Setup,
    StateChanged,
    StatisticsRead,
)
from convoy.server.frontends.merged_metrics import samples_of
from convoy.server.frontends.served import RemoteBatcher, RemoteModel, RemoteRequests
from convoy.server.images.decoding import rely_on_own_pixel_limit
from convoy.server.logs import configure_logging
from convoy.server.metrics.requests import ServerMetrics
from convoy.server.models.registry import ModelRegistry
from convoy.server.ports import CallerPort, Served, open_caller_port
from convoy.server.rest.traffic import Traffic

logger = structlog.get_logger()

# The interval of the reports to the owner.
REPORT_EVERY_S = 0.5


class FrontEnd:
    """Answers calls until the owner ends or requests a drain.

    Args:
        memory: For the pixels.
        listening: The shared port.
    """

    def __init__(self, memory: mmap.mmap, listening: socket.socket) -> None:
        self._listening = listening
        self._models = ModelRegistry[RemoteModel]()
        self._by_key: dict[int, RemoteModel] = {}
        self._metrics = ServerMetrics(CollectorRegistry())
        ProcessCollector(registry=self._metrics.registry)
        self._link = Link(self._receive, self._lost)
        self._requests = RemoteRequests(self._link.send, Arena(memory))
        self._cleanup = contextlib.AsyncExitStack()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()
        self._port: CallerPort | None = None
        self._traffic = Traffic()

    async def run(self, owner: socket.socket) -> None:
        """Serve; `owner` is this end of the link."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # A signal to the process group is for the owner, which requests the drain.
            loop.add_signal_handler(number, lambda: None)
        await loop.create_unix_connection(lambda: self._link, sock=owner)
        await self._ended.wait()
        for task in self._tasks:
            task.cancel()
        await self._cleanup.aclose()
        self._link.close()

    def _receive(self, message: Any) -> None:
        match message:
            case Answered() | InferFailed():
                self._requests.answered(message)
            case Setup():
                self._set_up(message)
            case Admitted():
                self._admit(message)
            case MadeDefault(key):
                self._models.make_default(self._by_key[key])
            case Removed(key):
                self._models.remove(self._by_key[key])
                self._spawn(self._release(key))
            case HealthChanged(key, health):
                model = self._by_key[key]
                model.batcher.health = health
                self._models.health_changed(model)
            case StateChanged(state, reachable):
                self._models.reachable = reachable
                self._models.state = state
            case StatisticsRead():
                self._requests.statistics_read(message)
            case AllProcessed():
                self._link.send(message)
            case RecentTraffic(intervals):
                self._traffic.extend(intervals)
            case Reload() if self._port:
                self._port.reload()
            case Drain():
                self._spawn(self._drain())

    def _set_up(self, setup: Setup) -> None:
        settings = setup.settings
        configure_logging(settings.log_level, settings.log_format)
        rely_on_own_pixel_limit()
        served = Served(
            self._models,
            self._metrics,
            self._traffic,
            message_limits(settings, self._models),
            setup.processors,
        )
        try:
            self._port = open_caller_port(settings, served, self._cleanup, self._listening)
        except Exception as error:
            self._fail(error)
            return
        self._spawn(self._start(self._port))

    def _fail(self, error: Exception) -> None:
        """Tell the owner why it cannot start, and end."""
        if not isinstance(error, StartupError):
            logger.error("front end failed", exc_info=error)
        self._link.send(Failed(str(error) or type(error).__name__))
        self._ended.set()

    async def _start(self, port: CallerPort) -> None:
        try:
            await port.start()
        except Exception as error:
            self._fail(error)
            return
        self._link.send(Listening())
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            self._report()

    def _admit(self, message: Admitted) -> None:
        manifest = message.manifest
        model = RemoteModel(
            manifest,
            message.runtime,
            message.runs_on,
            RemoteBatcher(message.key, message.limits, self._requests, message.health),
            self._metrics.requests_of(manifest.name, manifest.version),
            partial(self._requests.statistics, message.key),
            examples=message.examples,
        )
        self._by_key[message.key] = model
        self._models.add(model)

    async def _release(self, key: int) -> None:
        model = self._by_key.pop(key)
        await model.leases.wait_for_none()
        model.requests.close()
        if self._models.get(model.name, model.version) is None:
            self._metrics.forget(model.name, model.version)
        self._link.send(Released(key))

    async def _drain(self) -> None:
        if self._port:
            await self._port.drain()
        self._report()
        self._ended.set()

    def _report(self) -> None:
        self._link.send(samples_of(self._metrics.registry))

    def _lost(self) -> None:
        self._requests.lose()
        self._ended.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _run(owner: int, listening: int, memory: int) -> None:
    pixels = mmap.mmap(memory, 0)
    await FrontEnd(pixels, socket.socket(fileno=listening)).run(socket.socket(fileno=owner))


if __name__ == "__main__":
    uvloop.run(_run(*map(int, sys.argv[1:])))
