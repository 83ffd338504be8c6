"""Handlers by name, a listening port, draining."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from ssl import SSLContext

import grpc

from server.sockets import open_port
from server.transport.call import Call
from server.transport.connection import Connection
from server.transport.headers import Metadata, RequestHead
from server.transport.limits import TransportLimits
from server.transport.methods import UNAUTHENTICATED, UNKNOWN_METHOD, Method

Allows = Callable[[str, Metadata], bool]


class _CallDetails(grpc.HandlerCallDetails):  # type: ignore[misc]  # grpcio is untyped
    def __init__(self, method: str, invocation_metadata: object) -> None:
        self.method = method
        self.invocation_metadata = invocation_metadata


class GrpcServer:
    """Serves gRPC handlers; the part of `grpc.aio.Server` that this server uses.

    Args:
        limits: What a connection and a call may take.
        allows: Says by path and metadata whether a call may go on; None lets all.

    Example:
        server = GrpcServer(TransportLimits())
        classifier_pb2_grpc.add_ClassifierServiceServicer_to_server(servicer, server)
        port = server.listen("127.0.0.1", 0)
        await server.start()
        await server.stop(grace_s=30)
    """

    def __init__(self, limits: TransportLimits, allows: Allows | None = None) -> None:
        self._limits = limits
        self._allows = allows
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._methods: dict[str, Method] = {}
        self._connections: set[Connection] = set()
        self._all_lost = asyncio.Event()
        self._tls: SSLContext | None = None
        self._socket: socket.socket
        self._server: asyncio.Server

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Adds handlers; the first that knows a method answers it."""
        self._handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, object]) -> None:
        """Does nothing: what generated code registers here it adds as a generic handler too."""

    def listen(self, host: str, port: int, tls: SSLContext | None = None) -> int:
        """Takes the port, 0 for a free one, and returns it.

        Raises:
            OSError: It is in use or not permitted.
        """
        return self.adopt(open_port(host, port), tls)

    def adopt(self, listening: socket.socket, tls: SSLContext | None = None) -> int:
        """Takes a socket that listens already, and returns its port."""
        self._socket = listening
        self._tls = tls
        return int(listening.getsockname()[1])

    async def start(self) -> None:
        """Begins to answer, on the running loop."""
        make = partial(Connection, self._open_call, self._limits, self._made, self._lost)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(make, sock=self._socket, ssl=self._tls)

    async def stop(self, grace_s: float) -> None:
        """Takes no new calls, lets those under way finish, ends after the grace what is left."""
        self._server.close()
        for connection in list(self._connections):
            connection.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self._connections:
                    self._all_lost.clear()
                    await self._all_lost.wait()
        for connection in list(self._connections):
            connection.close()

    def _made(self, connection: Connection) -> None:
        self._connections.add(connection)

    def _lost(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._all_lost.set()

    def _open_call(self, connection: Connection, stream_id: int, head: RequestHead) -> Call:
        method = self._methods.get(head.path) or self._find(head)
        if self._allows is not None and not self._allows(head.path, head.metadata):
            method = UNAUTHENTICATED
        return Call(connection, stream_id, head, method, self._limits)

    def _find(self, head: RequestHead) -> Method:
        details = _CallDetails(head.path, head.metadata)
        for each in self._handlers:
            handler = each.service(details)
            if handler is not None:
                method = self._methods[head.path] = Method.of(handler)
                return method
        return UNKNOWN_METHOD
