"""What clients promise, against a convoy-server process: encryption, tokens, pushback, restarts."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing

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
    OverloadedError,
    RetryPolicy,
    Tls,
    UnavailableError,
)
from convoy.v1 import classifier_pb2 as pb
from convoy.v1 import classifier_pb2_grpc
from tests.processes import ServerProcess, run_module, running_server
from tests.server.certificates import Authority

PIXELS = np.zeros((32, 32, 3), np.uint8)
IN_FLIGHT = 8


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A folder with the certificates and tokens of a server and its callers."""
    folder = tmp_path_factory.mktemp("certificates")
    servers, callers = Authority("servers"), Authority("callers")
    for name, authority in (("servers", servers), ("callers", callers)):
        (folder / f"{name}.pem").write_bytes(authority.pem)
        (folder / name).mkdir()
        authority.issue_into(folder / name)
    (folder / "tokens").write_text("secret\n")
    return folder


def server_tls(certificates) -> tuple[object, ...]:
    own = certificates / "servers"
    return "--tls-certificate", own / "server.crt", "--tls-key", own / "server.key"


@pytest.fixture(scope="module")
def tls_server(repository, certificates) -> Iterator[ServerProcess]:
    flags = (*server_tls(certificates), "--token-file", certificates / "tokens")
    with running_server(repository, "--device", "cpu", *flags) as server:
        yield server


@pytest.fixture(scope="module")
def mutual_tls_server(repository, certificates) -> Iterator[ServerProcess]:
    flags = (*server_tls(certificates), "--tls-client-ca", certificates / "callers.pem")
    with running_server(repository, "--device", "cpu", *flags) as server:
        yield server


def trusting(certificates, **options) -> ConnectionOptions:
    return ConnectionOptions(tls=Tls(certificates / "servers.pem"), **options)


def test_tls_and_the_token_by_argument(tls_server, certificates, classify):
    address = tls_server.address
    right = trusting(certificates, token="secret")
    assert classify(address, PIXELS, options=right).model == "digits"
    for token in (None, "other"):
        with pytest.raises(AccessError):
            classify(address, PIXELS, options=trusting(certificates, token=token))
    stranger = ConnectionOptions(tls=Tls(certificates / "callers.pem"), token="secret")
    for options in (stranger, ConnectionOptions(token="secret")):
        with pytest.raises(UnavailableError):
            classify(address, PIXELS, options=options)


def test_tls_and_the_token_by_the_environment(tls_server, certificates, classify, monkeypatch):
    monkeypatch.setenv("CONVOY_TLS_CA", str(certificates / "servers.pem"))
    monkeypatch.setenv("CONVOY_TOKEN", "secret")
    assert classify(tls_server.address, PIXELS).model == "digits"
    listed = run_module("convoy.client", "models", "--address", tls_server.address)
    assert listed.returncode == 0, listed.stderr
    assert "digits" in listed.stdout
    monkeypatch.setenv("CONVOY_TOKEN", "other")
    rejected = run_module("convoy.client", "models", "--address", tls_server.address)
    assert rejected.returncode == 1
    assert rejected.stderr.count("\n") == 1
    assert "token" in rejected.stderr


def test_mutual_tls(mutual_tls_server, certificates, classify):
    own = certificates / "callers"
    known = Tls(certificates / "servers.pem", own / "server.crt", own / "server.key")
    options = ConnectionOptions(tls=known)
    assert classify(mutual_tls_server.address, PIXELS, options=options).model == "digits"
    strange = certificates / "servers"
    unknown = Tls(certificates / "servers.pem", strange / "server.crt", strange / "server.key")
    for tls in (unknown, Tls(certificates / "servers.pem")):
        with pytest.raises(UnavailableError):
            classify(mutual_tls_server.address, PIXELS, options=ConnectionOptions(tls=tls))


@pytest.fixture(scope="module")
def full_server(repository) -> Iterator[ServerProcess]:
    """A server whose queue has room for one image, which waits there for an hour."""
    flags = ("--max-queue-delay-ms", 3_600_000, "--max-queue-size", 1)
    with (
        running_server(repository, "--device", "cpu", *flags) as server,
        closing(grpc.insecure_channel(server.address)) as channel,
    ):
        image = pb.RawImage(height=32, width=32, pixels=PIXELS.tobytes())
        stub = classifier_pb2_grpc.ClassifierServiceStub(channel)
        waiting = stub.Classify.future(pb.ClassifyRequest(raw=image))
        while not server.metric("convoy_queued_images"):
            assert not waiting.done()
        yield server
        waiting.cancel()


def test_the_pushback_replaces_the_backoff(full_server, classify):
    """The pushback is milliseconds, the policy's backoff an hour: only one fits the deadline."""
    before = full_server.metric("convoy_outcomes_total", reason="full")
    patient = RetryPolicy(attempts=3, initial_backoff_s=3600, max_backoff_s=3600)
    with pytest.raises(OverloadedError):
        classify(full_server.address, PIXELS, options=ConnectionOptions(patient), timeout_s=60)
    assert full_server.metric("convoy_outcomes_total", reason="full") == before + 3


def test_without_retries_a_full_queue_is_an_error_at_once(full_server, classify):
    once = ConnectionOptions(RetryPolicy(attempts=1))
    with pytest.raises(OverloadedError):
        classify(full_server.address, PIXELS, options=once, timeout_s=60)


def test_a_waiting_image_ends_at_its_deadline(repository, classify):
    flags = ("--device", "cpu", "--max-queue-delay-ms", 3_600_000)
    with running_server(repository, *flags) as server, pytest.raises(DeadlineExceededError):
        classify(server.address, PIXELS, timeout_s=1)


@pytest.fixture(params=["sync", "aio"])
def classify_many(request):
    """`classify_many(address, images, outcomes)` by one of the two clients, to its end."""

    def by_client(address, images, outcomes):
        with Client(address, timeout_s=60) as client:
            for outcome in client.classify_many(images, in_flight=IN_FLIGHT):
                outcomes.append(outcome)

    def by_async_client(address, images, outcomes):
        async def run():
            async with AsyncClient(address, timeout_s=60) as client:
                async for outcome in client.classify_many(images, in_flight=IN_FLIGHT):
                    outcomes.append(outcome)

        asyncio.run(run())

    return by_client if request.param == "sync" else by_async_client


def test_a_server_that_is_killed_and_returns_midway(repository, classify_many):
    """Each image has its own outcome in its place, and those after the restart are answered."""
    with np.load(repository / "digits" / "1" / "samples.npz", allow_pickle=False) as samples:
        images, classes = samples["images"], samples["logits"].argmax(axis=1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ("--device", "cpu", "--port", port)
    outcomes: list[object] = []

    def around_a_restart():
        for number in range(40):
            yield images[number % 16]
        first.process.kill()
        first.process.wait()
        for number in range(40, 80):
            yield images[number % 16]
        servers.enter_context(running_server(repository, *flags))
        number = 80
        while len(outcomes) < 100 or not isinstance(outcomes[-1], Classification):
            yield images[number % 16]
            number += 1

    with ExitStack() as servers:
        first = servers.enter_context(running_server(repository, *flags))
        classify_many(first.address, around_a_restart(), outcomes)
    for number, outcome in enumerate(outcomes):
        if isinstance(outcome, Classification):
            assert outcome.best.index == classes[number % 16]
        else:
            assert isinstance(outcome, UnavailableError)
    # At most IN_FLIGHT were in flight when it died, and were still being retried when it came back.
    assert all(isinstance(each, Classification) for each in outcomes[: 40 - IN_FLIGHT])
    assert all(isinstance(each, UnavailableError) for each in outcomes[40 : 80 - IN_FLIGHT])
    assert isinstance(outcomes[-1], Classification)
