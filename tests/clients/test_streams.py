"""Images over a ClassifyStream call: real servers that reject, hang, close, restart."""

import asyncio
import itertools
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

import grpc
import numpy as np
import pytest

from convoy.client import (
    AccessError,
    AsyncClient,
    Classification,
    Client,
    ConnectionOptions,
    DeadlineExceededError,
    ImageError,
    InvalidRequestError,
    OverloadedError,
    RetryPolicy,
    UnavailableError,
    UnsupportedError,
)
from convoy.client.pending import PendingRequests
from convoy.v1 import classifier_pb2 as pb
from convoy.v1 import classifier_pb2_grpc
from tests.processes import running_server

QUICK = RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.05)
OPTIONS = ConnectionOptions(QUICK)


def reply(request):
    """Answers with the image's own text, so that a mix-up shows."""
    label = request.request.encoded.decode()
    response = pb.ClassifyResponse(model="m", version=1, classes=[pb.ClassScore(label=label)])
    return pb.ClassifyStreamResponse(id=request.id, response=response)


def rejection(request, code, retry_after_ms=0):
    error = pb.Error(code=code.value[0], message="not now", retry_after_ms=retry_after_ms)
    return pb.ClassifyStreamResponse(id=request.id, error=error)


class StreamServer(classifier_pb2_grpc.ClassifierServiceServicer):
    """Answers ClassifyStream by `handler`: of requests, context, how many calls came before.

    Attributes:
        received: The images of each call.
        answered: Those that a reply was sent for.
    """

    def __init__(self, handler):
        self._handler = handler
        self.received = []
        self.answered = []

    def ClassifyStream(self, requests, context):
        mine = []
        self.received.append(mine)

        def noting():
            for request in requests:
                mine.append(request.request.encoded)
                yield request

        for message in self._handler(noting(), context, len(self.received) - 1):
            if message.WhichOneof("result") == "response":
                self.answered.append(message.response.classes[0].label.encode())
            yield message


@contextmanager
def serving(handler, address="127.0.0.1:0"):
    servicer = handler if isinstance(handler, StreamServer) else StreamServer(handler)
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    classifier_pb2_grpc.add_ClassifierServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port(address)
    servicer.address = f"127.0.0.1:{port}"
    servicer.stop = lambda: server.stop(None).wait()
    server.start()
    try:
        yield servicer
    finally:
        servicer.stop()


def echo(requests, context, earlier):
    yield from map(reply, requests)


@pytest.fixture(params=["sync", "aio"])
def classify_many(request):
    """`classify_many(address, images, …)` over a stream, by one of the two clients."""

    def by_client(address, images, in_flight=8, timeout_s=30, options=OPTIONS):
        with Client(address, timeout_s=timeout_s, options=options) as client:
            return list(client.classify_many(images, in_flight=in_flight, stream=True))

    def by_async_client(address, images, in_flight=8, timeout_s=30, options=OPTIONS):
        async def run():
            async with AsyncClient(address, timeout_s=timeout_s, options=options) as client:
                answers = client.classify_many(images, in_flight=in_flight, stream=True)
                return [answer async for answer in answers]

        return asyncio.run(run())

    return by_client if request.param == "sync" else by_async_client


def labels(answers):
    return [
        answer.best.label.encode() if isinstance(answer, Classification) else type(answer)
        for answer in answers
    ]


IMAGES = [f"{number:03}".encode() for number in range(100)]


def test_answers_come_in_order_though_the_server_mixes_them_up(classify_many):
    def in_pairs(requests, context, earlier):
        for first, second in zip(requests, requests, strict=True):
            yield from (reply(second), reply(first))

    with serving(in_pairs) as server:
        assert labels(classify_many(server.address, IMAGES)) == IMAGES
    assert server.received == [IMAGES]


def test_the_error_of_an_image_is_in_its_place(classify_many):
    def handle(requests, context, earlier):
        for request in requests:
            bad = request.request.encoded == b"bad"
            yield rejection(request, grpc.StatusCode.INVALID_ARGUMENT) if bad else reply(request)

    with serving(handle) as server:
        answers = classify_many(server.address, [b"a", b"bad", "nowhere.png", b"b"])
    assert labels(answers) == [b"a", InvalidRequestError, ImageError, b"b"]


def test_a_broken_stream_is_opened_anew_and_only_what_was_not_answered_is_sent_again(classify_many):
    def breaks_off(requests, context, earlier):
        for number, request in enumerate(requests):
            if earlier < 3 and number == 10:
                context.abort(grpc.StatusCode.UNAVAILABLE, "going down")
            yield reply(request)

    with serving(breaks_off) as server:
        assert labels(classify_many(server.address, IMAGES)) == IMAGES
    assert len(server.received) == 4
    # The server answered each image once, so none was sent again after its answer.
    assert server.answered == IMAGES
    for earlier, later in itertools.pairwise(server.received):
        assert later[: len(earlier) - 10] == earlier[10:]


def test_a_stream_that_ends_with_ok_is_opened_again(classify_many):
    def ends(requests, context, earlier):
        yield from map(reply, itertools.islice(requests, None if earlier else 5))

    with serving(ends) as server:
        assert labels(classify_many(server.address, IMAGES)) == IMAGES
    assert server.answered == IMAGES


def test_a_server_that_is_restarted_midway_is_found(classify_many):
    reached = Event()

    def hangs_then_ends(requests, context, earlier):
        gone = Event()
        context.add_callback(gone.set)
        for request in requests:
            if request.request.encoded == IMAGES[30]:
                reached.set()
                gone.wait(60)
                return
            yield reply(request)

    with ThreadPoolExecutor(1) as pool:
        with serving(hangs_then_ends) as first:
            answers = pool.submit(classify_many, first.address, IMAGES)
            assert reached.wait(60)
        with serving(echo, first.address) as second:
            assert labels(answers.result(60)) == IMAGES
    sent_again = list(itertools.chain(*second.received))
    assert sent_again == IMAGES[30:]
    assert first.answered + second.answered == IMAGES


def test_rejected_images_are_sent_again_after_the_pushback(classify_many):
    seen = set()

    def rejects_once(requests, context, earlier):
        for request in requests:
            first = request.request.encoded not in seen
            seen.add(request.request.encoded)
            full = grpc.StatusCode.RESOURCE_EXHAUSTED
            yield rejection(request, full, 20) if first else reply(request)

    with serving(rejects_once) as server:
        assert labels(classify_many(server.address, IMAGES[:20])) == IMAGES[:20]
    assert sorted(server.received[0]) == sorted(IMAGES[:20] * 2)


def test_retries_of_rejections_end(classify_many):
    def rejects(requests, context, earlier):
        for request in requests:
            yield rejection(request, grpc.StatusCode.RESOURCE_EXHAUSTED)

    with serving(rejects) as server:
        assert labels(classify_many(server.address, [b"a"])) == [OverloadedError]
        assert server.received == [[b"a"] * QUICK.attempts]


def test_an_image_without_an_answer_times_out_alone(classify_many):
    def forgets(requests, context, earlier):
        yield from (reply(request) for request in requests if request.request.encoded != b"001")

    with serving(forgets) as server:
        answers = labels(classify_many(server.address, IMAGES[:20], timeout_s=5))
    assert answers == [IMAGES[0], DeadlineExceededError, *IMAGES[2:20]]


def test_an_absent_server_is_unavailable_by_the_deadline(classify_many):
    answers = classify_many("127.0.0.1:1", IMAGES[:5], timeout_s=0.5)
    assert labels(answers) == [UnavailableError] * 5


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.UNIMPLEMENTED, UnsupportedError),
        (grpc.StatusCode.UNAUTHENTICATED, AccessError),
    ],
)
def test_a_server_that_rejects_streams_fails_at_once(classify_many, code, error):
    def rejects(requests, context, earlier):
        context.abort(code, "no")

    with serving(rejects) as server:
        with pytest.raises(error, match="no"):
            classify_many(server.address, IMAGES)
        # gRPC for asyncio hides the reason now and then; the next attempt listens first.
        assert len(server.received) < 10


def test_images_are_taken_only_as_fast_as_they_are_answered():
    taken = itertools.count()

    def endless():
        for number in taken:
            yield str(number).encode()

    with serving(echo) as server, Client(server.address) as client:
        answers = client.classify_many(endless(), in_flight=4, stream=True)
        first = [next(answers).best.label for _ in range(20)]
        answers.close()
        assert first == [str(number) for number in range(20)]
        assert next(taken) <= 20 + 4 + 1
        assert list(client.classify_many([], stream=True)) == []


def test_the_first_image_is_sent_before_the_second_is_there():
    first_answered = Event()

    def slow():
        yield b"000"
        assert first_answered.wait(60)
        yield b"001"

    def handle(requests, context, earlier):
        for request in requests:
            first_answered.set()
            yield reply(request)

    with serving(handle) as server, Client(server.address) as client:
        assert labels(client.classify_many(slow(), stream=True)) == IMAGES[:2]


def test_a_stream_ends_its_threads():
    with serving(echo) as server, Client(server.address) as client:
        list(client.classify_many(IMAGES, stream=True))
        for thread in threading.enumerate():
            if thread.name == "classify-stream":
                thread.join(30)
                assert not thread.is_alive()


def test_a_server_process_that_is_killed_midway_and_restarted_loses_no_image(
    classify_many, repository
):
    with np.load(repository / "digits" / "1" / "samples.npz", allow_pickle=False) as samples:
        pixels, classes = samples["images"], samples["logits"].argmax(axis=1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    flags = ("--device", "cpu", "--port", port)
    midway = Event()

    def images():
        for number in range(1000):
            if number == 300:
                midway.set()
            yield pixels[number % len(pixels)]

    with ThreadPoolExecutor(1) as pool:
        with running_server(repository, *flags) as first:
            address = f"127.0.0.1:{port}"
            answers = pool.submit(classify_many, address, images(), 64, timeout_s=90)
            assert midway.wait(60)
            first.process.kill()
            first.process.wait()
        with running_server(repository, *flags):
            indices = [answer.best.index for answer in answers.result(100)]
    assert indices == [classes[number % len(pixels)] for number in range(1000)]


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def test_waits_are_drawn_below_a_bound_that_doubles_and_the_budget_stops_retries():
    clock = Clock()
    policy = RetryPolicy(attempts=5, initial_backoff_s=1, max_backoff_s=3, budget=8)
    backlog = PendingRequests(100, 60, policy, clock, draw=lambda: 1.0)
    waits_s = []
    backlog.add(pb.ClassifyRequest(encoded=b"x"))
    (message,) = backlog.due()
    rejected = pb.ClassifyStreamResponse(id=message.id, error=pb.Error(code=14, message="no"))
    for _ in range(3):
        backlog.answered(rejected)
        waits_s.append(backlog.wait_s())
        assert backlog.due() == []
        clock.now_s += backlog.wait_s()
        assert backlog.due() == [message]
    assert waits_s == [1, 2, 3]
    assert backlog.take() is None
    # The fourth of eight tokens is spent: no more retries, though an attempt was left.
    backlog.answered(rejected)
    assert isinstance(backlog.take(), UnavailableError)
    assert backlog.is_empty
