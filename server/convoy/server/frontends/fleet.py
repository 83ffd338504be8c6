"""All front ends: start them, keep their models up to date, and restart those that die."""

import asyncio
import contextlib
import itertools
import mmap
import os
import socket
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog

from convoy.server.assembly import most_message_bytes
from convoy.server.cpus import usable_cpus
from convoy.server.edge.listener import open_port
from convoy.server.errors import StartupError
from convoy.server.frontends.ipc import (
    Drain,
    HealthChanged,
    MadeDefault,
    RecentTraffic,
    Reload,
    Setup,
    StateChanged,
)
from convoy.server.frontends.merged_metrics import MergedRegistry
from convoy.server.frontends.served import ServedFrontEnd
from convoy.server.logs import FailureLog
from convoy.server.models.registry import LoadedModel, ModelRegistry
from convoy.server.rest.traffic import TrafficRecorder
from convoy.server.settings import ServerSettings

logger = structlog.get_logger()

_MIB = 1024 * 1024
# Time for a front end to follow a message, and to end after the drain.
_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class Supervision:
    """When a front end is replaced.

    Attributes:
        look_every_s: The interval of the owner's checks. Only checks count, so that a front end
            is not blamed for a pause of the whole machine.
        start_timeout_s: How long one may take to start.
        silence_timeout_s: How long one may send no report; it sends some each second.
        first_backoff_s: The wait before one is started again, doubled after each failed start.
        last_backoff_s: The longest wait.
    """

    look_every_s: float = 0.5
    start_timeout_s: float = 60.0
    silence_timeout_s: float = 10.0
    first_backoff_s: float = 1.0
    last_backoff_s: float = 60.0


_SUPERVISION = Supervision()


class FrontEnds:
    """Answer callers by other processes, which share the port.

    It observes the registry: every front end has the same versions and defaults, and a version
    ends only after all of them have released it.

    Each front end is supervised: one that ends, or that sends no report for a while, is replaced.
    While one of them cannot start, the server is not ready, since the kernel gives it connections.

    Args:
        settings: Of the server.
        models: The models in service.
        registry: Shows what front ends count.
        recorder: Records the traffic of all of them, for the page of each.
        supervision: When one is replaced.

    Attributes:
        port: The port they share.
        rest_port: 0, since REST is on the same port.

    Raises:
        StartupError: The port is in use or not permitted, or the platform cannot share memory.
    """

    def __init__(
        self,
        settings: ServerSettings,
        models: ModelRegistry[LoadedModel],
        registry: MergedRegistry,
        recorder: TrafficRecorder,
        supervision: Supervision = _SUPERVISION,
    ) -> None:
        count = settings.front_ends
        self._setup = Setup(settings, max(1, usable_cpus() // count))
        self._memory_bytes = _memory_bytes(settings)
        self._models = models
        self._registry = registry
        self._supervision = supervision
        self._drain_timeout_s = settings.drain_timeout_s
        self.rest_port = 0
        self._sockets = _listen(settings.host, settings.port, count)
        self.port = int(self._sockets[0].getsockname()[1])
        self._numbers = itertools.count()
        self._keys: dict[LoadedModel, int] = {}
        self._running: set[ServedFrontEnd] = set()
        self._failing: set[socket.socket] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures = FailureLog()
        models.subscribe(self)
        self._traffic = recorder.traffic
        recorder.follow_with(lambda interval: self._tell(RecentTraffic((interval,))))

    @property
    def pids(self) -> frozenset[int]:
        """The ids of the processes that accept calls."""
        return frozenset(each.process.pid for each in self._running if each.takes_calls)

    async def start(self) -> None:
        """Start all of them and wait until each accepts calls.

        Raises:
            StartupError: One of them cannot.
        """
        started = [await self._launch(listening) for listening in self._sockets]
        timeout_s = self._supervision.start_timeout_s
        done, late = await asyncio.wait(
            [front_end.listening for front_end in started],
            timeout=timeout_s,
            return_when=asyncio.FIRST_EXCEPTION,
        )
        for each in done:
            each.result()
        if late:
            raise StartupError(f"--front-ends: a front end took more than {timeout_s:g} s to start")
        for front_end, listening in zip(started, self._sockets, strict=True):
            self._spawn(self._supervise(front_end, listening))

    async def drain(self) -> None:
        """Let all front ends answer accepted requests, then end."""
        for task in self._tasks:
            task.cancel()
        for listening in self._sockets:
            listening.close()
        self._tell(Drain())
        for front_end in self._running:
            if not front_end.takes_calls:
                _kill(front_end.process)
        ends = [asyncio.create_task(each.process.wait()) for each in self._running]
        if ends:
            await asyncio.wait(ends, timeout=self._drain_timeout_s + _GRACE_S)
        for front_end in self._running:
            if front_end.process.returncode is None:
                logger.error("front end killed after the drain", pid=front_end.process.pid)
                _kill(front_end.process)
        await asyncio.gather(*ends)
        self._failures.close()

    def reload(self) -> None:
        """Let every front end read the files of tokens and TLS again."""
        self._tell(Reload())

    def state_changed(self) -> None:
        """Report the server's new state to every front end."""
        self._tell(self._state())

    async def settled(self) -> None:
        """Wait until callers of every front end see the reported states."""
        # A front end that hangs does not block the others for long.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE_S):
                await asyncio.gather(*(front_end.all_processed() for front_end in self._running))

    def version_added(self, model: LoadedModel) -> None:
        """Report a new version to every front end."""
        key = self._keys[model] = next(self._numbers)
        for front_end in self._running:
            front_end.admit(key, model)

    def default_changed(self, model: LoadedModel) -> None:
        """Report a new default version to every front end."""
        self._tell(MadeDefault(self._keys[model]))

    def version_removed(self, model: LoadedModel) -> None:
        """Let every front end release a version."""
        key = self._keys.pop(model)
        self._registry.forget(model.name, model.version)
        for front_end in self._running:
            front_end.remove(key)

    def health_changed(self, model: LoadedModel) -> None:
        """Report the health of a version to every front end."""
        self._tell(HealthChanged(self._keys[model], model.batcher.health))

    def _state(self) -> StateChanged:
        return StateChanged(self._models.state, self._models.reachable)

    def _tell(self, message: object) -> None:
        for front_end in self._running:
            front_end.link.send(message)

    async def _launch(self, listening: socket.socket) -> ServedFrontEnd:
        memory_fd = os.memfd_create("convoy-pixels")
        os.ftruncate(memory_fd, self._memory_bytes)
        ours, theirs = socket.socketpair()
        passed = (theirs.fileno(), listening.fileno(), memory_fd)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "convoy.server.frontends.process",
            *map(str, passed),
            pass_fds=passed,
        )
        theirs.close()
        front_end = ServedFrontEnd(
            process,
            mmap.mmap(memory_fd, self._memory_bytes),
            partial(self._registry.update, process.pid),
            self._failures,
        )
        os.close(memory_fd)
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: front_end.link, sock=ours)
        self._introduce(front_end)
        self._running.add(front_end)
        return front_end

    def _introduce(self, front_end: ServedFrontEnd) -> None:
        """Send a front end the state of the models."""
        send = front_end.link.send
        send(self._setup)
        for model, key in self._keys.items():
            front_end.admit(key, model)
            if self._models.default(model.name) is model:
                send(MadeDefault(key))
        send(RecentTraffic(self._traffic.intervals))
        send(self._state())

    async def _supervise(self, front_end: ServedFrontEnd, listening: socket.socket) -> None:
        """Replace a front end, and each that follows it, on the same socket."""
        limits = self._supervision
        backoff_s = limits.first_backoff_s
        current: ServedFrontEnd | None = front_end
        while True:
            if current:
                await self._watch(current, listening)
                status = await self._end(current)
                if current.takes_calls:
                    backoff_s = limits.first_backoff_s
                    logger.error("front end ended", pid=current.process.pid, status=status)
                else:
                    self._failed(listening, current.reason or f"it ended with status {status}")
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, limits.last_backoff_s)
            try:
                current = await self._launch(listening)
            except OSError as error:
                current = None
                self._failed(listening, str(error))

    async def _watch(self, front_end: ServedFrontEnd, listening: socket.socket) -> None:
        """Return when a front end has ended; kill it when it does not answer."""
        limits = self._supervision
        silent_s = 0.0
        while not front_end.ended.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limits.look_every_s):
                    await front_end.ended.wait()
            silent_s = 0.0 if front_end.has_reported() else silent_s + limits.look_every_s
            most_s = limits.start_timeout_s
            if front_end.takes_calls:
                self._recovered(listening)
                most_s = limits.silence_timeout_s
            if silent_s > most_s:
                pid = front_end.process.pid
                logger.error("front end does not answer", pid=pid, silent_s=silent_s)
                _kill(front_end.process)
                return

    async def _end(self, front_end: ServedFrontEnd) -> int:
        """Wait for the end of a front end, and return its exit status."""
        status = await front_end.process.wait()
        await front_end.ended.wait()
        self._running.discard(front_end)
        self._registry.ended(front_end.process.pid)
        return status

    def _failed(self, listening: socket.socket, reason: str) -> None:
        logger.error("front end cannot start", reason=reason)
        self._failing.add(listening)
        self._models.reachable = False

    def _recovered(self, listening: socket.socket) -> None:
        if listening in self._failing:
            self._failing.discard(listening)
            self._models.reachable = not self._failing

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()


def _memory_bytes(settings: ServerSettings) -> int:
    """Return the bytes of waiting and running requests, or of a few of the largest if more."""
    wanted = max(2 * int(settings.max_queue_mib * _MIB), 4 * most_message_bytes(settings))
    return 1 << (wanted - 1).bit_length()


def _listen(host: str, port: int, count: int) -> list[socket.socket]:
    """Open sockets that share a port, among which the kernel spreads connections."""
    if not hasattr(os, "memfd_create") or not hasattr(socket, "SO_REUSEPORT"):
        raise StartupError("--front-ends: expected Linux, whose processes share ports and memory")
    try:
        # First without sharing: two servers must not share a port by accident.
        with open_port(host, port) as alone:
            port = alone.getsockname()[1]
        return [open_port(host, port, shared=True) for _ in range(count)]
    except OSError as error:
        raise StartupError(
            f"--port: cannot listen on {host}:{port}: the port is in use or not permitted"
        ) from error
