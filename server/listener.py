"""A gRPC listener: its port, its limits, the services on it."""

import socket
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from server.access import Access
from server.errors import StartupError
from server.transport import GrpcServer, TransportLimits
from server.transport.methods import UNAUTHENTICATED


class Transport(Enum):
    """What carries the calls; the values are the names that settings use."""

    NATIVE = "native"
    GRPCIO = "grpcio"


class GrpcListener:
    """Listens on one address and answers until it is drained.

    Args:
        server: Where services are added before `start`.
        port: The port it listens on.

    Example:
        listener = GrpcListener.open("127.0.0.1", 8001, max_message_bytes, access=access)
        add_…_to_server(servicer, listener.server)
        await listener.start(services)
    """

    def __init__(self, server: GrpcServer | grpc.aio.Server, port: int) -> None:
        self.server = server
        self.port = port

    @classmethod
    def open(
        cls,
        host: str,
        port: int,
        max_message_bytes: int,
        *,
        access: Access,
        transport: Transport = Transport.NATIVE,
        flag: str = "--port",
    ) -> "GrpcListener":
        """Takes a port.

        Args:
            host: Address to listen on.
            port: 0 picks a free one.
            max_message_bytes: Of a request and of a reply.
            access: Who may call.
            transport: What carries the calls.
            flag: The setting that chose the port, for the message.

        Raises:
            StartupError: The port is in use or not permitted.
        """
        try:
            if transport is Transport.NATIVE:
                native = _native_server(max_message_bytes, access)
                return cls(native, native.listen(host, port, access.tls_context(["h2"])))
            server = _grpcio_server(max_message_bytes, access)
            address = f"{host}:{port}"
            if credentials := access.grpcio_credentials():
                return cls(server, server.add_secure_port(address, credentials))
            return cls(server, server.add_insecure_port(address))
        except (OSError, RuntimeError) as error:
            raise StartupError(
                f"{flag}: cannot listen on {host}:{port}: the port is in use or not permitted"
            ) from error

    @classmethod
    def on_socket(
        cls, listening: socket.socket, max_message_bytes: int, access: Access
    ) -> "GrpcListener":
        """Takes a socket that listens already; the native transport answers on it."""
        server = _native_server(max_message_bytes, access)
        return cls(server, server.adopt(listening, access.tls_context(["h2"])))

    async def start(self, services: Sequence[str]) -> None:
        """Begins to answer; reflection lists these services and itself."""
        names = (*services, reflection.SERVICE_NAME)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            reflection.aio.ReflectionServicer(names), self.server
        )
        await self.server.start()

    async def drain(self, timeout_s: float) -> None:
        """Refuses new calls, lets accepted ones finish, cancels what is left after the timeout."""
        await self.server.stop(timeout_s)


def _native_server(max_message_bytes: int, access: Access) -> GrpcServer:
    return GrpcServer(TransportLimits(max_message_bytes=max_message_bytes), access.allows_rpc)


def _grpcio_server(max_message_bytes: int, access: Access) -> grpc.aio.Server:
    return grpc.aio.server(
        interceptors=[_Gate(access)],
        options=[
            # Two servers must not share a port by accident.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
        ],
    )


class _Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpcio is untyped
    """Refuses calls without a token on grpcio's transport."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Lets the call go on, or answers UNAUTHENTICATED."""
        details = handler_call_details
        if self._access.allows_rpc(details.method, details.invocation_metadata):
            return await continuation(details)
        return grpc.stream_unary_rpc_method_handler(UNAUTHENTICATED.behaviour)
