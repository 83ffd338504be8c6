"""A listening HTTP port on the server's own event loop."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from ssl import SSLContext

import uvicorn
from starlette.types import ASGIApp

from server.errors import StartupError
from server.sockets import open_port


class HttpListener:
    """Serves an ASGI application beside gRPC, in one process and on one loop.

    Args:
        host: Address to listen on.
        port: 0 picks a free one; `port` then tells which.
        tls: Encrypts every connection; None for plain HTTP.

    Raises:
        StartupError: The port is in use or not permitted.
    """

    def __init__(
        self, host: str, port: int, application: ASGIApp, tls: SSLContext | None = None
    ) -> None:
        self._socket = _listen(host, port)
        config = uvicorn.Config(
            application,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            ssl_context_factory=None if tls is None else lambda *_: tls,
        )
        self._server = _LoopServer(config)
        self._serving: asyncio.Task[None]

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._socket.getsockname()[1])

    async def start(self) -> None:
        """Begins to answer; call it on the loop that shall serve."""
        self._serving = asyncio.create_task(self._server.serve([self._socket]))

    async def stop(self, timeout_s: float) -> None:
        """Answers what is under way, for at most `timeout_s`, and frees the port."""
        self._server.config.timeout_graceful_shutdown = max(1, round(timeout_s))
        self._server.should_exit = True
        await self._serving
        self._socket.close()


class _LoopServer(uvicorn.Server):
    """Leaves signals to the process that it is a guest in."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(host: str, port: int) -> socket.socket:
    try:
        return open_port(host, port)
    except OSError as error:
        raise StartupError(
            f"--http-port: cannot listen on {host}:{port}: {error.strerror}"
        ) from error
