"""All front ends: started, kept in step with the catalogue, started again when one dies."""

import asyncio
import contextlib
import itertools
import mmap
import os
import socket
import sys
from collections.abc import Coroutine
from functools import partial
from typing import Any

import structlog

from server.backends.devices import usable_cpus
from server.catalogue import ModelCatalogue
from server.errors import StartupError
from server.frontends.messages import Drain, MadeDefault, ModelChanged, Setup, StateChanged
from server.frontends.metrics import MergedRegistry
from server.frontends.served import ServedFrontEnd
from server.served_model import LoadedModel
from server.settings import ServerSettings
from server.sockets import open_port

logger = structlog.get_logger()

_MIB = 1024 * 1024
_RESTART_AFTER_S = 1.0
# What a front end gets to do what it is told, and to end after the drain.
_GRACE_S = 5.0


class FrontEnds:
    """Answers gRPC by other processes, which share the port.

    It follows the catalogue: what is admitted, made the default and removed there, is so in every
    front end, and a version ends only after all of them have let go of it.

    Args:
        settings: Of the server.
        max_message_bytes: Of a request and of a reply.
        catalogue: The models in service.
        registry: Shows what front ends count.

    Attributes:
        port: The port they share.

    Raises:
        StartupError: The port is in use or not permitted, or the platform cannot share memory.
    """

    def __init__(
        self,
        settings: ServerSettings,
        max_message_bytes: int,
        catalogue: ModelCatalogue[LoadedModel],
        registry: MergedRegistry,
    ) -> None:
        count = settings.front_ends
        self._setup = Setup(settings, max_message_bytes, max(1, usable_cpus() // count))
        self._memory_bytes = _memory_bytes(settings, max_message_bytes)
        self._catalogue = catalogue
        self._registry = registry
        self._sockets = _listen(settings.host, settings.port, count)
        self.port = int(self._sockets[0].getsockname()[1])
        self._numbers = itertools.count()
        self._keys: dict[LoadedModel, int] = {}
        self._ready: dict[str, bool] = {}
        self._running: set[ServedFrontEnd] = set()
        self._processes: set[asyncio.subprocess.Process] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        catalogue.follow(self)

    async def start(self) -> None:
        """Starts all of them and waits until each takes calls.

        Raises:
            StartupError: One of them cannot.
        """
        started = [await self._launch(listening) for listening in self._sockets]
        await asyncio.gather(*(front_end.listening for front_end in started))

    async def drain(self, timeout_s: float) -> None:
        """Lets all answer what they accepted, and end."""
        for task in self._tasks:
            task.cancel()
        for listening in self._sockets:
            listening.close()
        self._tell(Drain(timeout_s))
        ends = [process.wait() for process in self._processes]
        try:
            await asyncio.wait_for(asyncio.gather(*ends), timeout_s + _GRACE_S)
        except TimeoutError:
            for process in self._processes:
                process.kill()

    def model_changed(self, name: str, ready: bool | None) -> None:
        """A model begins or ends to take requests; None: it is gone."""
        if ready is None:
            self._ready.pop(name, None)
        else:
            self._ready[name] = ready
        self._tell(ModelChanged(name, ready))

    def state_changed(self) -> None:
        """The catalogue's state is another."""
        self._tell(StateChanged(self._catalogue.state))

    async def settled(self) -> None:
        """Waits until callers see what was told, whichever front end they reach."""
        # One that hangs holds nobody up for long.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE_S):
                await asyncio.gather(*(front_end.all_heard() for front_end in self._running))

    def admitted(self, model: LoadedModel) -> None:
        """The catalogue has a version more."""
        key = self._keys[model] = next(self._numbers)
        for front_end in self._running:
            front_end.admit(key, model)

    def made_default(self, model: LoadedModel) -> None:
        """A version answers requests that name none."""
        self._tell(MadeDefault(self._keys[model]))

    def removed(self, model: LoadedModel) -> None:
        """The catalogue has a version less."""
        key = self._keys.pop(model)
        self._registry.forget(model.name, model.version)
        for front_end in self._running:
            front_end.remove(key)

    def _tell(self, message: object) -> None:
        for front_end in self._running:
            front_end.link.send(message)

    async def _launch(self, listening: socket.socket) -> ServedFrontEnd:
        memory_fd = os.memfd_create("convoy-pixels")
        os.ftruncate(memory_fd, self._memory_bytes)
        ours, theirs = socket.socketpair()
        passed = (theirs.fileno(), listening.fileno(), memory_fd)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "server.frontends", *map(str, passed), pass_fds=passed
        )
        theirs.close()
        front_end = ServedFrontEnd(
            mmap.mmap(memory_fd, self._memory_bytes), partial(self._registry.update, process.pid)
        )
        os.close(memory_fd)
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: front_end.link, sock=ours)
        self._introduce(front_end)
        self._running.add(front_end)
        self._processes.add(process)
        self._spawn(self._attend(front_end, process, listening))
        return front_end

    def _introduce(self, front_end: ServedFrontEnd) -> None:
        """Tells a front end all that the others know."""
        send = front_end.link.send
        send(self._setup)
        for model, key in self._keys.items():
            front_end.admit(key, model)
            if self._catalogue.default(model.name) is model:
                send(MadeDefault(key))
        send(StateChanged(self._catalogue.state))
        for name, ready in self._ready.items():
            send(ModelChanged(name, ready))

    async def _attend(
        self,
        front_end: ServedFrontEnd,
        process: asyncio.subprocess.Process,
        listening: socket.socket,
    ) -> None:
        """Starts a front end again, on the same socket, when it ends unasked."""
        await front_end.ended.wait()
        self._running.discard(front_end)
        status = await process.wait()
        self._processes.discard(process)
        self._registry.ended(process.pid)
        logger.error("front end ended", pid=process.pid, status=status)
        while True:
            await asyncio.sleep(_RESTART_AFTER_S)
            try:
                await self._launch(listening)
            except OSError:
                logger.exception("a front end cannot be started again")
            else:
                return

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _memory_bytes(settings: ServerSettings, max_message_bytes: int) -> int:
    """What waits and what runs, or at least some of the largest requests; untouched it is free."""
    wanted = max(2 * int(settings.max_queue_mb * _MIB), 4 * max_message_bytes)
    return 1 << (wanted - 1).bit_length()


def _listen(host: str, port: int, count: int) -> list[socket.socket]:
    """Opens sockets that share a port, among which the kernel spreads connections."""
    if not hasattr(os, "memfd_create") or not hasattr(socket, "SO_REUSEPORT"):
        raise StartupError("--front-ends: expected Linux, whose processes share ports and memory")
    try:
        # Alone first: two servers must not share a port by accident.
        with open_port(host, port) as alone:
            port = alone.getsockname()[1]
        return [open_port(host, port, shared=True) for _ in range(count)]
    except OSError as error:
        raise StartupError(
            f"--port: cannot listen on {host}:{port}: the port is in use or not permitted"
        ) from error
