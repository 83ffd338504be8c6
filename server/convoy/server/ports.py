"""The ports of one process: gRPC, REST and the page for callers, and the admin port."""

import asyncio
import contextlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from starlette.applications import Starlette

from convoy.oip.v2 import inference_pb2
from convoy.server.assembly import (
    MESSAGE_OVERHEAD_BYTES,
    MIB,
    byte_budget,
    call_boundary,
    image_decoder,
    listener_options,
    open_tracing,
)
from convoy.server.edge.application import Application, CallerApplication
from convoy.server.edge.limits import MessageLimits
from convoy.server.edge.listener import Listener, listen_on
from convoy.server.errors import StartupError
from convoy.server.grpc.admin import RepositoryServicer
from convoy.server.grpc.context import GrpcBoundary
from convoy.server.grpc.core_server import CoreServer
from convoy.server.grpc.endpoint import GrpcEndpoint
from convoy.server.grpc.health import reflection_handlers
from convoy.server.grpc.registration import handler_of
from convoy.server.grpc.services import STREAMING_PATHS, GrpcServices
from convoy.server.metrics.requests import ServerMetrics
from convoy.server.models.manager import ModelManager
from convoy.server.models.registry import Models
from convoy.server.protocol.inference import Inference
from convoy.server.rest.endpoint import http_application
from convoy.server.rest.infer import RestInfer
from convoy.server.rest.routes import HttpBoundary, RestRoutes
from convoy.server.rest.traffic import Traffic
from convoy.server.rest.ui import Page
from convoy.server.security.tls import open_tls
from convoy.server.security.tokens import Tokens, warn_if_open
from convoy.server.settings import ServerSettings

_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]


class AdminPort(Listener):
    """The repository extension of the Open Inference Protocol.

    Args:
        settings: Of the server.
        manager: Manages the models.
        metrics: Counts the calls.

    Raises:
        StartupError: There is no token file, or the port is in use or not permitted.
    """

    def __init__(
        self, settings: ServerSettings, manager: ModelManager, metrics: ServerMetrics
    ) -> None:
        if settings.admin_token_file is None or settings.admin_port is None:
            raise StartupError("--admin-port: expected also --admin-token-file")
        boundary = GrpcBoundary(metrics)
        rejected = metrics.rejected_tokens.labels("admin").inc
        self._tokens = Tokens(settings.admin_token_file, "--admin-token-file", rejected)
        endpoint = GrpcEndpoint(
            MessageLimits(MESSAGE_OVERHEAD_BYTES, MESSAGE_OVERHEAD_BYTES),
            self._tokens,
            byte_budget(settings, MESSAGE_OVERHEAD_BYTES),
            boundary,
            metrics.calls,
        )
        servicer = RepositoryServicer(manager, boundary, self._tokens)
        endpoint.add_generic_rpc_handlers((handler_of(_INFERENCE, servicer),))
        endpoint.add_generic_rpc_handlers(reflection_handlers((_INFERENCE.full_name,)))
        super().__init__(
            listen_on(settings.host, settings.admin_port, "--admin-port"),
            CallerApplication(endpoint, Starlette()),
            listener_options(settings),
            open_tls(settings.tls_certificate, settings.tls_key, settings.tls_client_ca),
        )

    def reload(self) -> None:
        """Read the files of tokens and TLS again, whether or not they changed."""
        self._tokens.reload()
        super().reload()


class _Port(Protocol):
    @property
    def port(self) -> int: ...

    async def start(self) -> None: ...

    def reload(self) -> None: ...

    async def stop(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Served:
    """Everything needed to answer callers.

    Attributes:
        models: The models in service.
        metrics: Counts requests.
        traffic: Of the last minutes, for the page.
        limits: Of requests and replies.
        processors: That may be used for decoding.
    """

    models: Models
    metrics: ServerMetrics
    traffic: Traffic
    limits: MessageLimits
    processors: int


class CallerPort:
    """Answer callers in this process.

    Args:
        services: The gRPC services.
        ports: The ports, that of gRPC first.
        tokens: Who may call.
    """

    def __init__(self, services: GrpcServices, ports: Sequence[_Port], tokens: Tokens) -> None:
        self._services = services
        self._ports = ports
        self._tokens = tokens

    @property
    def port(self) -> int:
        """The port of gRPC, and of REST unless REST has its own."""
        return self._ports[0].port

    @property
    def rest_port(self) -> int:
        """The separate port of REST and the page; 0 if they are on `port` or disabled."""
        return self._ports[1].port if len(self._ports) > 1 else 0

    async def start(self) -> None:
        """Begin to answer: NOT_SERVING until a model is ready."""
        for port in self._ports:
            await port.start()

    async def drain(self) -> None:
        """Reject new requests and let accepted ones finish within the drain time-out."""
        self._services.close()
        await asyncio.gather(*(port.stop() for port in self._ports))

    def reload(self) -> None:
        """Read the files of tokens and TLS again, whether or not they changed."""
        self._tokens.reload()
        for port in self._ports:
            port.reload()

    async def settled(self) -> None:
        """Return at once: callers of this process see a reported state immediately."""


def open_caller_port(
    settings: ServerSettings,
    served: Served,
    cleanup: contextlib.AsyncExitStack,
    listening: socket.socket | None = None,
) -> CallerPort:
    """Open the port for callers.

    Args:
        settings: Of the server.
        served: Answers callers.
        cleanup: Closes the resources of the port after the drain.
        listening: A socket that listens already; None opens the port of the settings.

    Raises:
        StartupError: A port is in use or not permitted, or credentials cannot be used.
    """
    builder = _Builder(settings, served, cleanup)
    if settings.transport == "grpcio":
        return builder.core_port()
    return builder.port(listening or listen_on(settings.host, settings.port, "--port"))


class _Builder:
    """Builds the ports of both transports."""

    def __init__(
        self, settings: ServerSettings, served: Served, cleanup: contextlib.AsyncExitStack
    ) -> None:
        self._settings = settings
        self._served = served
        rejected = served.metrics.rejected_tokens.labels("callers").inc
        self._tokens = Tokens(settings.token_file, on_rejected=rejected)
        self._tls = open_tls(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
        warn_if_open(settings.host, self._tokens, settings.tls_client_ca is not None)
        self._decoder = image_decoder(settings, served.processors, served.metrics, cleanup)
        self._tracing = open_tracing(settings, cleanup)
        self._boundary = call_boundary(settings, served.metrics, self._tracing)
        cleanup.callback(self._boundary.failures.close)
        self._budget = byte_budget(settings, int(settings.max_message_mib * MIB))
        self._services = GrpcServices(
            served.models,
            self._decoder,
            self._boundary,
            self._budget,
            self._tracing.traced if self._tracing else None,
        )

    def port(self, listening: socket.socket) -> CallerPort:
        """Return the port that answers gRPC, REST and the page on a socket."""
        endpoint = GrpcEndpoint(
            self._served.limits,
            self._tokens,
            self._budget,
            self._boundary,
            self._served.metrics.calls,
        )
        self._services.add_to(endpoint)
        application = CallerApplication(endpoint, self._http_application())
        ports = [self._listener(listening, application)]
        return CallerPort(self._services, ports, self._tokens)

    def core_port(self) -> CallerPort:
        """Return the port of grpcio's C core, and that of REST if the settings have one."""
        settings = self._settings
        core = CoreServer(
            settings.host,
            settings.port,
            self._served.limits.images_bytes,
            tokens=self._tokens,
            calls=self._served.metrics.calls,
            boundary=self._boundary,
            tls=self._tls,
            drain_timeout_s=settings.drain_timeout_s,
        )
        self._services.add_to(core.server)
        ports: list[_Port] = [core]
        if settings.rest_port is not None:
            listening = listen_on(settings.host, settings.rest_port, "--rest-port")
            ports.append(self._listener(listening, self._http_application(core.port)))
        return CallerPort(self._services, ports, self._tokens)

    def _http_application(self, grpc_port: int = 0) -> Application:
        settings, served = self._settings, self._served
        page = Page(served.models, served.traffic, settings.metrics_port, grpc_port)
        inference = Inference(served.models, self._decoder)
        infer = RestInfer(inference, self._boundary, served.limits, self._budget)
        rest = RestRoutes(
            served.models,
            inference,
            infer,
            HttpBoundary(self._boundary),
            trace=self._tracing.traced_route if self._tracing else None,
        )
        return http_application(
            rest,
            page if settings.ui else None,
            self._tokens,
            served.metrics.calls,
        )

    def _listener(self, listening: socket.socket, application: Application) -> Listener:
        options = listener_options(self._settings, STREAMING_PATHS)
        return Listener(listening, application, options, self._tls)
