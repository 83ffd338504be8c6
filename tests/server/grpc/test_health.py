"""grpc.health.v1 over real connections."""

import grpc
import pytest
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc

from convoy.server.grpc.health import HEALTH, WHOLE_SERVER, HealthServicer
from convoy.server.grpc.registration import handler_of

SERVING = pb.HealthCheckResponse.SERVING
NOT_SERVING = pb.HealthCheckResponse.NOT_SERVING
UNKNOWN = pb.HealthCheckResponse.SERVICE_UNKNOWN


@pytest.fixture
async def health():
    """The servicer and a stub that reaches it."""
    servicer = HealthServicer()
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler_of(HEALTH, servicer),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield servicer, health_pb2_grpc.HealthStub(channel)
    await server.stop(None)


def watch(stub, name=""):
    return stub.Watch(pb.HealthCheckRequest(service=name))


async def test_check_tells_the_state_and_knows_no_other_names(health):
    servicer, stub = health
    assert (await stub.Check(pb.HealthCheckRequest())).status == NOT_SERVING
    servicer.update({"digits": True})
    assert (await stub.Check(pb.HealthCheckRequest(service="digits"))).status == SERVING
    with pytest.raises(grpc.RpcError) as caught:
        await stub.Check(pb.HealthCheckRequest(service="cats"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_model_that_comes_and_goes_is_watched(health):
    servicer, stub = health
    call = watch(stub, "digits")
    assert (await call.read()).status == UNKNOWN
    servicer.update({"digits": True})
    assert (await call.read()).status == SERVING
    servicer.update({"digits": False})
    assert (await call.read()).status == NOT_SERVING
    servicer.update({})
    assert (await call.read()).status == UNKNOWN
    call.cancel()


async def test_a_watcher_that_leaves_does_not_silence_the_others(health):
    servicer, stub = health
    first, second = watch(stub), watch(stub)
    assert (await first.read()).status == NOT_SERVING
    assert (await second.read()).status == NOT_SERVING
    first.cancel()
    # A third one comes and goes whole, so the server has seen the first one leave.
    third = watch(stub)
    assert (await third.read()).status == NOT_SERVING
    third.cancel()
    servicer.update({WHOLE_SERVER: True})
    assert (await second.read()).status == SERVING
    second.cancel()


async def test_closing_ends_the_watches(health):
    servicer, stub = health
    servicer.update({"digits": True})
    call = watch(stub, "digits")
    assert (await call.read()).status == SERVING
    servicer.close()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
