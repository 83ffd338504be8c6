"""Run h2corn on a listening socket."""

import asyncio
import contextlib
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import structlog
from h2corn import Config, RequestPolicy, Server
from h2corn._lib import prepare_tls
from h2corn._server import TlsMaterial as H2cornTls

from convoy.server.edge import limits
from convoy.server.edge.application import Application
from convoy.server.edge.limits import ConnectionLimits
from convoy.server.errors import StartupError
from convoy.server.security.tls import Tls, TlsMaterial

# Connections that may wait to be accepted; the kernel may allow fewer.
_BACKLOG = 2048


def open_port(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Return a socket that listens.

    Args:
        host: An IPv4 or IPv6 address, or a name.
        port: 0 for a free one.
        shared: Whether other sockets may take the same port; the kernel spreads connections then.

    Raises:
        OSError: The port is in use or not permitted.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_BACKLOG, reuse_port=shared)


def listen_on(host: str, port: int, flag: str) -> socket.socket:
    """Return a socket that listens.

    Args:
        host: As of `open_port`.
        port: As of `open_port`.
        flag: The setting that chose the port, for the message.

    Raises:
        StartupError: The port is in use or not permitted.
    """
    try:
        return open_port(host, port)
    except OSError as error:
        raise StartupError(
            f"{flag}: cannot listen on {host}:{port}: the port is in use or not permitted"
        ) from error


logger = structlog.get_logger()

# How often a listener looks at its TLS files and at its age.
_LOOK_S = 0.5
_FDS = "/proc/self/fd"
_THREADS = Path("/proc/self/task")
_NETWORK_THREAD = "tokio-rt-worker\n"
# Each generation has a thread of its own.
_MAX_REPLACED = 4


@dataclass(frozen=True, slots=True)
class ListenerOptions:
    """How a port is served.

    Attributes:
        streaming_paths: Paths of RPCs whose requests stream; these may pause for any time.
        drain_timeout_s: Time for requests in flight to finish after `stop`.
    """

    limits: ConnectionLimits = field(default_factory=ConnectionLimits)
    streaming_paths: tuple[str, ...] = ()
    drain_timeout_s: float = 0.0
    log_format: Literal["console", "json"] = "console"


class Listener:
    """Serve an ASGI application on a socket.

    A listener runs one h2corn server after another, its generations. When the certificate changes,
    a new generation takes new connections and the old one keeps its own, so that no request is
    lost. When the authority of the callers' certificates changes, or when a generation is as old as
    connections may be, it drains: its connections get GOAWAY, and their requests are answered.

    Args:
        listening: The socket; the listener closes it.
        application: The ASGI application.
        options: How it is served.
        tls: Encrypts the port; None for plain text.

    Example:
        listener = Listener(open_port("127.0.0.1", 8001), application, ListenerOptions())
        await listener.start()
        await listener.stop()
    """

    def __init__(
        self,
        listening: socket.socket,
        application: Application,
        options: ListenerOptions,
        tls: Tls | None = None,
    ) -> None:
        self._socket = listening
        self._application = application
        self._options = options
        self._tls = tls
        self._current: _Generation
        # Those that were replaced and still have connections, the oldest first.
        self._replaced: list[_Generation] = []
        self._replacing: asyncio.Task[None] | None = None
        # Held while a generation opens: `stop` must not miss one that already accepts.
        self._opening = asyncio.Lock()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._socket.getsockname()[1])

    async def start(self) -> None:
        """Begin to answer on the running loop.

        Raises:
            StartupError: The certificates cannot be used.
        """
        try:
            self._current = await self._open()
        except ValueError as error:
            raise StartupError(f"--tls-certificate: {error}") from error
        if self._tls or self._options.limits.age_s:
            self._replacing = asyncio.create_task(self._replace_generations())

    def reload(self) -> None:
        """Read the TLS files again, whether or not they changed."""
        if self._tls:
            self._tls.reload()

    async def stop(self) -> None:
        """Stop accepting, let requests in flight finish, and close the port."""
        async with self._opening:
            if self._replacing:
                self._replacing.cancel()
        for generation in (*self._replaced, self._current):
            generation.shut_down()
        # h2corn keeps the socket open while it drains: without this the kernel would keep accepting
        # connections that nobody will answer, instead of rejecting them.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)
        await asyncio.gather(*(each.ended() for each in (*self._replaced, self._current)))
        self._socket.close()

    async def _open(self) -> "_Generation":
        material = self._tls.current() if self._tls else None
        generation = _Generation(self._socket, self._application, self._config(), material)
        await generation.started()
        return generation

    async def _replace_generations(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            async with self._opening:
                self._replaced = [each for each in self._replaced if not each.has_ended]
                for generation in self._replaced:
                    if self._has_aged(generation):
                        generation.shut_down()
                if self._has_aged(self._current) or self._has_new_material(self._current):
                    await self._replace_current()

    async def _replace_current(self) -> None:
        present = self._current
        try:
            following = await self._open()
        except ValueError as error:
            # h2corn accepts fewer kinds of keys than the check of the files.
            present.failed_material = self._tls.current() if self._tls else None
            logger.error("certificates cannot be used; the previous ones remain", error=str(error))
            return
        self._current = following
        self._replaced.append(present)
        if self._has_aged(present) or not present.trusts_as(following):
            # Connections of callers that are no longer trusted must end too.
            for generation in self._replaced:
                generation.shut_down()
        elif not present.stop_accepting():
            present.shut_down()
        for generation in self._replaced[:-_MAX_REPLACED]:
            generation.shut_down()

    def _has_aged(self, generation: "_Generation") -> bool:
        age_s = self._options.limits.age_s
        return age_s > 0 and time.monotonic() - generation.started_at_s >= age_s

    def _has_new_material(self, generation: "_Generation") -> bool:
        material = self._tls.current() if self._tls else None
        return material not in (generation.material, generation.failed_material)

    def _config(self) -> Config:
        options = self._options
        files = self._tls.files if self._tls else None
        return Config(
            bind=(f"fd://{self._socket.fileno()}",),
            grpc=True,
            lifespan="off",
            access_log=False,
            date_header=False,
            log_format="json" if options.log_format == "json" else "text",
            # With a single one, a flood that keeps it busy would delay all other connections.
            runtime_threads=2,
            certfile=files.certificate if files else None,
            keyfile=files.key if files else None,
            ca_certs=files.client_ca if files else None,
            cert_reqs="required" if files and files.client_ca else "none",
            limit_connections=options.limits.max_connections,
            max_concurrent_streams=options.limits.max_streams,
            limit_request_head_size=limits.MAX_HEADER_BYTES,
            limit_request_line=limits.MAX_HEADER_BYTES,
            limit_request_field_size=limits.MAX_HEADER_BYTES,
            limit_request_fields=limits.MAX_HEADER_FIELDS,
            h2_max_header_list_size=limits.MAX_HEADER_BYTES,
            h2_max_header_block_size=limits.MAX_HEADER_BLOCK_BYTES,
            h2_initial_stream_window_size=options.limits.window_bytes,
            h2_initial_connection_window_size=options.limits.window_bytes,
            # The application limits bodies itself, with an error in the caller's protocol.
            max_request_body_size=0,
            request_policies=_policies(options.streaming_paths),
            timeout_handshake=limits.HANDSHAKE_S,
            timeout_request_header=limits.HEADERS_S,
            timeout_request_body_idle=limits.BODY_IDLE_S,
            timeout_keep_alive=options.limits.idle_s,
            timeout_graceful_shutdown=options.drain_timeout_s,
            h2_timeout_response_stall=limits.RESPONSE_STALL_S,
            h2_timeout_write=limits.RESPONSE_STALL_S,
        )


class _Generation:
    """One run of h2corn, with its initial certificates.

    Attributes:
        started_at_s: On the monotonic clock.
        material: Its certificates.
        failed_material: The last newer certificates, if they cannot be used.
    """

    def __init__(
        self,
        listening: socket.socket,
        application: Application,
        config: Config,
        material: TlsMaterial | None,
    ) -> None:
        self.started_at_s = time.monotonic()
        self.material = material
        self.failed_material: TlsMaterial | None = None
        self._listening = listening
        self._fds: set[int] = set()
        self._is_ending = False
        # Not `serve()`: that prints a banner and reads the TLS files itself, which may have changed
        # since they were checked.
        tls = prepare_tls(config, _h2corn_tls(material))
        self._server = Server(application, config)
        self._fds_before = _fds_of(listening)
        self._serving = asyncio.create_task(
            self._server._serve_worker_fds([os.dup(listening.fileno())], prepared_tls=tls)
        )

    @property
    def has_ended(self) -> bool:
        """Whether the drain is over."""
        return self._serving.done()

    async def started(self) -> None:
        """Wait until it accepts connections."""
        await self._server.wait_started()
        self._fds = _fds_of(self._listening) - self._fds_before
        self._serving.add_done_callback(self._note_end)
        _batch_network_threads()

    def _note_end(self, serving: asyncio.Task[None]) -> None:
        if not self._is_ending and not serving.cancelled() and (error := serving.exception()):
            logger.critical("a port is no longer served", error=str(error))

    def trusts_as(self, other: "_Generation") -> bool:
        """Return whether both trust the same authority of callers' certificates."""
        return (self.material and self.material.client_ca) == (
            other.material and other.material.client_ca
        )

    def stop_accepting(self) -> bool:
        """Leave new connections to other generations, and keep the existing ones.

        h2corn has no such state: without new connections it drains. So its descriptors of the
        socket are exchanged for those of a socket that nobody can connect to.

        Returns:
            Whether that was possible; it needs Linux.
        """
        # A descriptor may have been closed meanwhile and be another file's now.
        found = self._fds & _fds_of(self._listening)
        with socket.socket(socket.AF_UNIX) as nobody:
            nobody.setblocking(False)
            nobody.bind("")
            nobody.listen()
            for fd in found:
                os.dup2(nobody.fileno(), fd, inheritable=False)
        return bool(found)

    def shut_down(self) -> None:
        """Stop accepting and begin to drain."""
        self._is_ending = True
        self._server.shutdown()

    async def ended(self) -> None:
        """Wait for the end of the drain."""
        try:
            await self._serving
        except RuntimeError as error:
            # Requests ignored their cancellation.
            logger.error("requests did not end with the drain", error=str(error))
        except OSError as error:
            if not self._is_ending:
                raise
            # `Listener.stop` shuts the socket down. Where h2corn has not heard of the end yet, its
            # next accept fails.
            logger.info("h2corn ended with an error while it was stopped", error=str(error))


def _batch_network_threads() -> None:
    """Let h2corn's threads wait for the thread that wakes them, where processors are scarce.

    Otherwise the first reply of a batch interrupts the event loop and leaves alone, with a packet
    and a wake-up of its own, while the others follow one by one.
    """
    for thread in _THREADS.iterdir() if _THREADS.is_dir() else []:
        try:
            if (thread / "comm").read_text() == _NETWORK_THREAD:
                os.sched_setscheduler(int(thread.name), os.SCHED_BATCH, os.sched_param(0))
        except PermissionError as error:
            logger.info("the network's threads keep their scheduling policy", error=str(error))
            return
        except OSError:
            continue  # the thread has ended meanwhile


def _fds_of(listening: socket.socket) -> set[int]:
    """Return the descriptors of a socket in this process; none if the system does not list them."""
    wanted = os.fstat(listening.fileno()).st_ino
    found = set()
    for name in os.listdir(_FDS) if os.path.isdir(_FDS) else []:
        with contextlib.suppress(OSError):
            if os.fstat(int(name)).st_ino == wanted:
                found.add(int(name))
    return found


def _policies(streaming_paths: tuple[str, ...]) -> tuple[RequestPolicy, ...]:
    """Return the limits by path; without a rule h2corn would set none for gRPC."""
    streams = [_policy(path, body_idle_s=0.0) for path in streaming_paths]
    return (*streams, _policy("/*", body_idle_s=limits.BODY_IDLE_S))


def _policy(path: str, body_idle_s: float) -> RequestPolicy:
    return RequestPolicy(
        path=path,
        max_request_body_size=0,
        timeout_request_body_idle=body_idle_s,
        h2_timeout_response_stall=limits.RESPONSE_STALL_S,
    )


def _h2corn_tls(material: TlsMaterial | None) -> H2cornTls | None:
    if material is None:
        return None
    return H2cornTls(material.certificate, material.key, material.client_ca)
