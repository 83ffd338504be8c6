"""Streams while the server starts and while it drains."""

import asyncio
import contextlib
import signal
from queue import SimpleQueue

import grpc
import numpy as np
import pytest

from convoy.server.edge.limits import ByteBudget
from convoy.server.grpc.streams import Streams
from convoy.server.models.readiness import ServerState
from convoy.server.models.registry import ModelRegistry
from convoy.v1 import classifier_pb2, classifier_pb2_grpc
from tests.processes import GRPC_FLAGS, running_server
from tests.server.conftest import HEIGHT, WIDTH
from tests.server.inprocess import AbortedError, Context, servicers

PIXELS = np.zeros((HEIGHT, WIDTH, 3), np.uint8)


def request(name: str) -> classifier_pb2.ClassifyStreamRequest:
    image = classifier_pb2.RawImage(height=HEIGHT, width=WIDTH, pixels=PIXELS.tobytes())
    return classifier_pb2.ClassifyStreamRequest(
        id=name, request=classifier_pb2.ClassifyRequest(raw=image)
    )


async def nothing():
    await asyncio.Event().wait()
    yield


@pytest.mark.parametrize("state", [ServerState.STARTING, ServerState.DRAINING])
@pytest.mark.parametrize("method", ["ClassifyStream", "ModelStreamInfer"])
async def test_a_stream_is_rejected_as_a_whole_while_the_server_starts_or_drains(
    publish, state, method
):
    async with servicers(publish()) as served:
        served.models.state = state
        servicer = served.classifier if method == "ClassifyStream" else served.inference
        with pytest.raises(AbortedError) as ended:
            await getattr(servicer, method)(nothing(), Context())
    assert ended.value.code is grpc.StatusCode.UNAVAILABLE


async def test_requests_in_flight_count_until_they_are_answered():
    """A budget for two ends a stream with three; afterwards there is room again."""
    budget = ByteBudget(2 * request("a").ByteSize())
    models = ModelRegistry()
    models.state = ServerState.SERVING
    streams = Streams(models, budget)

    async def three():
        for name in "abc":
            yield request(name)

    async def never(_):
        await asyncio.Event().wait()

    with pytest.raises(AbortedError) as ended:
        await streams.answer_as_ready(three(), Context(), never)
    assert ended.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert budget.used_bytes == 0


@pytest.mark.parametrize("transport", GRPC_FLAGS)
def test_a_stream_that_waits_does_not_hold_up_the_drain_and_its_caller_hears_of_it(
    publish, transport
):
    models = publish().parent.parent
    flags = ("--device", "cpu", *GRPC_FLAGS[transport], "--drain-timeout-s", "600")
    outgoing = SimpleQueue()
    with (
        running_server(models, *flags) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = classifier_pb2_grpc.ClassifierServiceStub(channel)
        replies = stub.ClassifyStream(iter(outgoing.get, None))
        outgoing.put(request("first"))
        assert next(replies).response.classes
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as ended:
            next(replies)
        assert server.process.wait(timeout=60) == 0
        outgoing.put(None)
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_what_was_read_of_a_stream_is_answered_before_it_ends(publish):
    all_read = asyncio.Event()

    async def requests():
        for number in range(20):
            yield request(str(number))
        all_read.set()
        await asyncio.Event().wait()

    context = Context()
    async with servicers(publish()) as served:
        call = asyncio.create_task(served.classifier.ClassifyStream(requests(), context))
        await all_read.wait()
        served.models.state = ServerState.DRAINING
        served.streams.close()
        with contextlib.suppress(AbortedError):
            await call
        assert {reply.id for reply in context.written} == {str(number) for number in range(20)}
