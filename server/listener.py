"""A gRPC listener: its port, its limits, the services on it."""

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
        host: Address to listen on.
        port: 0 picks a free one; `port` then tells which.
        max_message_bytes: Of a request and of a reply.
        access: Who may call.
        transport: What carries the calls.
        flag: The setting that chose the port, for the message.

    Attributes:
        server: Where services are added before `start`.
        port: The port it listens on.

    Raises:
        StartupError: The port is in use or not permitted.
    """

    def __init__(
        self,
        host: str,
        port: int,
        max_message_bytes: int,
        *,
        access: Access,
        transport: Transport = Transport.NATIVE,
        flag: str = "--port",
    ) -> None:
        self.server: GrpcServer | grpc.aio.Server
        try:
            if transport is Transport.NATIVE:
                limits = TransportLimits(max_message_bytes=max_message_bytes)
                native = GrpcServer(limits, access.allows_rpc)
                self.server = native
                self.port = native.listen(host, port, access.tls_context(["h2"]))
            else:
                self.server = _grpcio_server(max_message_bytes, access)
                address = f"{host}:{port}"
                if credentials := access.grpcio_credentials():
                    self.port = int(self.server.add_secure_port(address, credentials))
                else:
                    self.port = int(self.server.add_insecure_port(address))
        except (OSError, RuntimeError) as error:
            raise StartupError(
                f"{flag}: cannot listen on {host}:{port}: the port is in use or not permitted"
            ) from error

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
