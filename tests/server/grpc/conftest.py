"""A server with methods of every kind, and grpcio's own client to call it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import pytest
from prometheus_client import CollectorRegistry

from convoy.server.edge.limits import ByteBudget, ConnectionLimits, MessageLimits
from convoy.server.edge.listener import Listener, ListenerOptions, open_port
from convoy.server.grpc.context import GrpcBoundary
from convoy.server.grpc.endpoint import GrpcEndpoint
from convoy.server.metrics.requests import ServerMetrics
from convoy.server.security.tls import Tls
from convoy.server.security.tokens import Tokens

SERVICE = "test.Echo"
MIB = 1024 * 1024
# h2corn closes an idle connection right after its GOAWAY: a request that crosses it is not
# processed, and the caller may see a reset before the GOAWAY.
_RETRY = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.01s",
                "maxBackoff": "0.1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
RETRIES = [("grpc.service_config", json.dumps(_RETRY))]


class Echo(grpc.GenericRpcHandler):
    """Messages are bytes.

    Attributes:
        running: Calls to Wait whose handler runs.
        expected: How many of them set `started`.
        gate: Lets them end.
        left: How they ended when they were cancelled.
    """

    def __init__(self) -> None:
        self.running = 0
        self.expected = 1
        self.started = asyncio.Event()
        self.gate = asyncio.Event()
        self.left = asyncio.Event()

    def service(self, details: grpc.HandlerCallDetails) -> object:
        service, _, method = details.method.lstrip("/").partition("/")
        kinds = {
            "Unary": grpc.unary_unary_rpc_method_handler(self.unary),
            "Wait": grpc.unary_unary_rpc_method_handler(self.wait),
            "Stubborn": grpc.unary_unary_rpc_method_handler(self.stubborn),
            "Fail": grpc.unary_unary_rpc_method_handler(self.fail),
            "Abort": grpc.unary_unary_rpc_method_handler(self.abort),
            "Metadata": grpc.unary_unary_rpc_method_handler(self.metadata),
            "Remaining": grpc.unary_unary_rpc_method_handler(self.remaining),
            "Many": grpc.unary_stream_rpc_method_handler(self.many),
            "Join": grpc.stream_unary_rpc_method_handler(self.join),
            "Both": grpc.stream_stream_rpc_method_handler(self.both),
        }
        return kinds.get(method) if service == SERVICE else None

    async def unary(self, request, context):
        return request

    async def wait(self, request, context):
        self.running += 1
        if self.running == self.expected:
            self.started.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.left.set()
            raise
        finally:
            self.running -= 1
        return request

    async def stubborn(self, request, context):
        """Continues when it is cancelled."""
        self.running += 1
        while not self.gate.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await self.gate.wait()
        return request

    async def fail(self, request, context):
        raise RuntimeError("secret")

    async def abort(self, request, context):
        await context.abort(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "voll: 100 % belegt überfüllt",
            (("grpc-retry-pushback-ms", "20"), ("detail-bin", b"\x00\xff")),
        )

    async def metadata(self, request, context):
        context.set_trailing_metadata((("peer", context.peer()),))
        return repr(sorted(dict(context.invocation_metadata()).items())).encode()

    async def remaining(self, request, context):
        return repr(context.time_remaining()).encode()

    async def many(self, request, context):
        for number in range(int(request)):
            yield b"%d " % number + bytes(1000)

    async def join(self, requests, context):
        return b"".join([request async for request in requests])

    async def both(self, requests, context):
        async for request in requests:
            yield request


@pytest.fixture
def echo() -> Echo:
    return Echo()


@dataclass
class Limits:
    """What the server takes, and how long its drain may last."""

    max_message_bytes: int = 16 * MIB
    max_streams: int = 256
    drain_timeout_s: float = 20.0
    age_s: float = 0.0


@pytest.fixture
def limits() -> Limits:
    return Limits()


@pytest.fixture
def metrics() -> ServerMetrics:
    return ServerMetrics(CollectorRegistry())


def listener_of(
    echo: Echo, limits: Limits, metrics: ServerMetrics, port: int = 0, tls: Tls | None = None
) -> Listener:
    endpoint = GrpcEndpoint(
        MessageLimits(limits.max_message_bytes, limits.max_message_bytes),
        Tokens(None),
        ByteBudget(64 * MIB),
        GrpcBoundary(metrics),
        metrics.calls,
    )
    endpoint.add_generic_rpc_handlers((echo,))
    options = ListenerOptions(
        ConnectionLimits(max_streams=limits.max_streams, age_s=limits.age_s),
        (),
        limits.drain_timeout_s,
    )
    return Listener(open_port("127.0.0.1", port), endpoint, options, tls)


@pytest.fixture
async def server(echo: Echo, limits: Limits, metrics: ServerMetrics) -> AsyncIterator[Listener]:
    server = listener_of(echo, limits, metrics)
    await server.start()
    yield server
    echo.gate.set()
    await server.stop()


@pytest.fixture
def port(server: Listener) -> int:
    return server.port


@pytest.fixture
async def channel(port: int) -> AsyncIterator[grpc.aio.Channel]:
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        yield channel
