"""Options of calls and clients: deadlines, metadata, addresses, event loops, pickling."""

import asyncio
import math
import pickle
import socket
import threading

import grpc
import numpy as np
import pytest

from convoy.client import (
    AsyncClient,
    Classification,
    Client,
    ConnectionOptions,
    DeadlineExceededError,
    ModelNotFoundError,
    RetryPolicy,
    Tls,
    UnavailableError,
    UsageError,
)
from tests.clients.conftest import ANSWER, answer, scripted_server

BLACK = np.zeros((32, 32, 3), np.uint8)


def hold_until(released: threading.Event):
    def handle(request, context, earlier):
        released.wait(60)
        return ANSWER

    return handle


def test_a_call_has_a_deadline_of_its_own():
    released = threading.Event()
    with scripted_server(hold_until(released)) as slow, Client(slow.address) as client:
        with pytest.raises(DeadlineExceededError) as caught:
            client.classify(b"x", timeout_s=0.1)
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        (late,) = client.classify_many([b"x"], timeout_s=0.1)
        assert isinstance(late, DeadlineExceededError)
        released.set()


@pytest.mark.parametrize("timeout_s", [None, math.inf])
@pytest.mark.parametrize("stream", [False, True])
def test_no_deadline(server, timeout_s, stream):
    with Client(server.address, timeout_s=timeout_s) as client:
        assert client.classify(BLACK).model == "digits"
        answers = list(client.classify_many([BLACK] * 3, stream=stream))
        assert [type(each) for each in answers] == [Classification] * 3
    with Client(server.address, timeout_s=5) as client:
        assert client.classify(BLACK, timeout_s=timeout_s).model == "digits"


@pytest.mark.parametrize("timeout_s", [None, math.inf])
@pytest.mark.parametrize("stream", [False, True])
async def test_no_deadline_in_asyncio(server, timeout_s, stream):
    async with AsyncClient(server.address, timeout_s=timeout_s) as client:
        answers = [each async for each in client.classify_many([BLACK] * 3, stream=stream)]
        assert [type(each) for each in answers] == [Classification] * 3


@pytest.mark.parametrize("timeout_s", [0, -1, math.nan])
def test_an_invalid_deadline_is_rejected(timeout_s):
    with pytest.raises(UsageError, match="timeout_s: expected seconds above 0 or None"):
        Client("127.0.0.1:1", timeout_s=timeout_s)
    with Client("127.0.0.1:1") as client, pytest.raises(UsageError, match="timeout_s"):
        client.classify(b"x", timeout_s=timeout_s)


def test_metadata_and_request_ids_reach_the_server_and_the_error():
    def reject(request, context, earlier):
        context.abort(grpc.StatusCode.NOT_FOUND, "no such model")

    with scripted_server(reject) as scripted, Client(scripted.address) as client:
        with pytest.raises(ModelNotFoundError) as caught:
            client.classify(b"x", metadata={"x-tenant": "a"}, request_id="r-1")
        assert (caught.value.code, caught.value.request_id) == (grpc.StatusCode.NOT_FOUND, "r-1")
        list(client.classify_many([b"x"], metadata={"x-tenant": "b"}))
    first, second = scripted.metadata
    assert (first["x-tenant"], first["x-request-id"]) == ("a", "r-1")
    assert second["x-tenant"] == "b"
    restored = pickle.loads(pickle.dumps(caught.value))
    assert (type(restored), restored.code, restored.request_id) == (
        ModelNotFoundError,
        grpc.StatusCode.NOT_FOUND,
        "r-1",
    )


def test_reserved_metadata_is_rejected():
    with Client("127.0.0.1:1") as client:
        for name in ("grpc-timeout", "X-Upper"):
            with pytest.raises(UsageError, match="metadata: expected a lower-case name"):
                client.classify(b"x", metadata={name: "1"})


def test_the_request_id_of_a_tensor_request_comes_back(server):
    with Client(server.address) as client:
        reply = client.infer("digits", {"image": BLACK[np.newaxis]}, request_id="r-2")
    assert reply.request_id == "r-2"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_call_may_wait_for_a_server_that_starts():
    port = free_port()
    options = ConnectionOptions(wait_for_ready=True, retry=RetryPolicy(attempts=1))
    results = []
    with Client(f"127.0.0.1:{port}", timeout_s=60, options=options) as client:
        thread = threading.Thread(target=lambda: results.append(client.classify(b"x")))
        thread.start()
        with Client(f"127.0.0.1:{port}", timeout_s=60) as hasty, pytest.raises(UnavailableError):
            hasty.classify(b"x")
        assert not results
        with scripted_server(answer, port=port):
            thread.join(60)
    assert [each.model for each in results] == ["m"]


def test_several_host_names_share_the_calls():
    with scripted_server(answer) as one, scripted_server(answer) as other:
        ports = [each.address.rpartition(":")[2] for each in (one, other)]
        address = f"localhost:{ports[0]},127.0.0.1:{ports[1]},no-such-name.invalid:1"
        with Client(address, timeout_s=60) as client:
            for _ in range(200):
                client.classify(b"x")
                if one.calls and other.calls:
                    break
        assert one.calls
        assert other.calls


def test_an_address_of_unknown_hosts():
    with pytest.raises(UnavailableError, match="none of the names can be resolved"):
        Client("no-such-name.invalid:1,nor-this.invalid:2")


def test_several_names_and_one_certificate_name():
    with pytest.raises(UsageError, match="several host names need Tls"):
        Client("one:1,two:2", options=ConnectionOptions(tls=Tls()))


@pytest.mark.parametrize(
    "address",
    [
        "localhost",
        "localhost:0",
        "localhost:65536",
        "localhost:http",
        ":8001",
        "http://a:1",
        "a:1,b",
        "dns:///a:99999",
        "ipv4:1.2.3.4:70000",
        "a b:1",
        "[::1]",
        "a:1,,b:2",
    ],
)
def test_a_malformed_address(address):
    with pytest.raises(UsageError, match="address: expected"):
        Client(address)
    with pytest.raises(UsageError, match="address: expected"):
        AsyncClient(address)


@pytest.mark.parametrize(
    "address",
    [
        "[::1]:8001",
        "dns:///name:8001",
        "dns:///name",
        "unix:/tmp/socket",
        "1.2.3.4:1,[::1]:2",
        "ipv4:1.2.3.4:1,1.2.3.5:2",
        "a-b.example:8001",
    ],
)
def test_a_valid_address(address):
    Client(address).close()


@pytest.mark.parametrize("stream", [False, True])
async def test_images_from_an_async_iterable(server, stream):
    async def images():
        for _ in range(40):
            await asyncio.sleep(0)
            yield BLACK

    async with AsyncClient(server.address) as client:
        answers = [each async for each in client.classify_many(images(), stream=stream)]
    assert [type(each) for each in answers] == [Classification] * 40


async def test_a_stream_answers_while_the_next_image_is_awaited(server):
    answered = asyncio.Event()

    async def images():
        yield BLACK
        await answered.wait()  # never comes unless the first answer does
        yield BLACK

    async with AsyncClient(server.address) as client:
        answers = []
        async for each in client.classify_many(images(), stream=True):
            answers.append(each)
            answered.set()
    assert [type(each) for each in answers] == [Classification] * 2


def test_an_async_client_may_be_made_before_the_event_loop_and_outlive_it(server):
    client = AsyncClient(server.address)

    async def classify():
        return await client.classify(BLACK)

    for _ in range(2):
        assert asyncio.run(classify()).model == "digits"

    async def close():
        await client.close()

    asyncio.run(close())


def test_clients_are_pickled_by_their_settings(server):
    options = ConnectionOptions(gzip=True)
    with Client(server.address, timeout_s=7, options=options) as client:
        client.classify(BLACK)
        with pickle.loads(pickle.dumps(client)) as copy:
            assert copy.classify(BLACK).classes == client.classify(BLACK).classes
            assert pickle.dumps(copy) == pickle.dumps(client)

    async def classify():
        async with pickle.loads(pickle.dumps(AsyncClient(server.address))) as copy:
            return await copy.classify(BLACK)

    assert asyncio.run(classify()).model == "digits"
