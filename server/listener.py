"""A gRPC listener: its port, its limits, the services on it."""

from collections.abc import Sequence

import grpc
from grpc_reflection.v1alpha import reflection

from server.errors import StartupError


class GrpcListener:
    """Listens on one address and answers until it is drained.

    Args:
        host: Address to listen on.
        port: 0 picks a free one; `port` then tells which.
        max_message_bytes: Of a request and of a reply.
        flag: The setting that chose the port, for the message.

    Attributes:
        server: Where services are added before `start`.
        port: The port it listens on.

    Raises:
        StartupError: The port is in use or not permitted.
    """

    def __init__(self, host: str, port: int, max_message_bytes: int, flag: str = "--port") -> None:
        self.server = grpc.aio.server(
            options=[
                # Two servers must not share a port by accident.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
            ]
        )
        try:
            self.port = int(self.server.add_insecure_port(f"{host}:{port}"))
        except RuntimeError as error:
            raise StartupError(
                f"{flag}: cannot listen on {host}:{port}: the port is in use or not permitted"
            ) from error

    async def start(self, services: Sequence[str]) -> None:
        """Begins to answer; reflection lists these services and itself."""
        reflection.enable_server_reflection((*services, reflection.SERVICE_NAME), self.server)
        await self.server.start()

    async def drain(self, timeout_s: float) -> None:
        """Refuses new calls, lets accepted ones finish, cancels what is left after the timeout."""
        await self.server.stop(timeout_s)
