"""A server with methods of every kind, and grpcio's own client to call it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest

from server.transport import GrpcServer, TransportLimits

SERVICE = "test.Echo"


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
        """Goes on when it is cancelled."""
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


@pytest.fixture
def limits() -> TransportLimits:
    return TransportLimits()


@pytest.fixture
async def server(echo: Echo, limits: TransportLimits) -> AsyncIterator[GrpcServer]:
    server = GrpcServer(limits)
    server.add_generic_rpc_handlers((echo,))
    server.test_port = server.listen("127.0.0.1", 0)
    await server.start()
    yield server
    echo.gate.set()
    await server.stop(5)


@pytest.fixture
def port(server: GrpcServer) -> int:
    return server.test_port


@pytest.fixture
async def channel(port: int) -> AsyncIterator[grpc.aio.Channel]:
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        yield channel
