"""A gRPC listener: its port, its limits, the services on it."""

from collections.abc import Sequence
from enum import Enum

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from server.errors import StartupError
from server.transport import GrpcServer, TransportLimits


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
        transport: Transport = Transport.NATIVE,
        flag: str = "--port",
    ) -> None:
        self.server: GrpcServer | grpc.aio.Server
        try:
            if transport is Transport.NATIVE:
                native = GrpcServer(TransportLimits(max_message_bytes=max_message_bytes))
                self.server, self.port = native, native.listen(host, port)
            else:
                self.server = _grpcio_server(max_message_bytes)
                self.port = int(self.server.add_insecure_port(f"{host}:{port}"))
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


def _grpcio_server(max_message_bytes: int) -> grpc.aio.Server:
    return grpc.aio.server(
        options=[
            # Two servers must not share a port by accident.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
        ]
    )
