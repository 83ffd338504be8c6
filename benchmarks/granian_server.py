"""convoy-server with Granian in the place of uvicorn, for comparison: `uv pip install granian`.

Granian's embedded server runs on the server's own event loop, as uvicorn does.
"""

import asyncio
import socket
from ssl import SSLContext

from granian.constants import HTTPModes, Interfaces
from granian.server.embed import Server
from starlette.types import ASGIApp

import server.app
from server.__main__ import main


class GranianListener:
    """What server.http.listener.HttpListener is, by Granian."""

    def __init__(
        self, host: str, port: int, application: ASGIApp, tls: SSLContext | None = None
    ) -> None:
        with socket.create_server((host, port)) as free:
            self.port = free.getsockname()[1]
        self._server = Server(
            application,
            host,
            self.port,
            interface=Interfaces.ASGINL,
            http=HTTPModes.http1,
            websockets=False,
            log_enabled=False,
        )

    async def start(self) -> None:
        self._serving = asyncio.create_task(self._server.serve())

    async def stop(self, timeout_s: float) -> None:
        self._server.stop()
        await self._serving


if __name__ == "__main__":
    server.app.HttpListener = GranianListener
    main()
