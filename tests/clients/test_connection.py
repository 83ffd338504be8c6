"""Deadlines, retries, several addresses, encryption and identity, against real gRPC servers."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event, Thread

import grpc
import pytest

from convoy.client import (
    AccessError,
    Client,
    ConnectionOptions,
    DeadlineExceededError,
    InferenceError,
    InvalidRequestError,
    LifetimeError,
    MessageTooLargeError,
    OverloadedError,
    RetryPolicy,
    Tls,
    UnavailableError,
    UnsupportedError,
    UsageError,
)
from convoy.client.connection import DEFAULT_ADDRESS, Connection
from convoy.v1 import classifier_pb2 as pb
from tests.clients.conftest import ANSWER, answer, reject_first, scripted_server
from tests.server.certificates import Authority

QUICK = RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.02)


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_a_rejection_is_retried_transparently(classify, code):
    with scripted_server(reject_first(3, code)) as server:
        assert classify(server.address, options=ConnectionOptions(QUICK)).best.label == "yes"
        assert server.calls == 4


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError),
        (grpc.StatusCode.INTERNAL, InferenceError),
        (grpc.StatusCode.UNAUTHENTICATED, AccessError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceededError),
    ],
)
def test_a_call_that_may_have_run_is_not_retried(classify, code, error):
    with scripted_server(reject_first(9, code)) as server:
        with pytest.raises(error, match="not now"):
            classify(server.address)
        assert server.calls == 1


def test_retries_end_and_may_be_switched_off(classify):
    with scripted_server(reject_first(99, grpc.StatusCode.RESOURCE_EXHAUSTED)) as server:
        with pytest.raises(OverloadedError, match="not now"):
            classify(server.address, options=ConnectionOptions(QUICK))
        assert server.calls == 4
        with pytest.raises(OverloadedError):
            classify(server.address, options=ConnectionOptions(RetryPolicy(attempts=1)))
        assert server.calls == 5


def test_a_retry_waits_for_the_pushback(classify):
    with scripted_server(reject_first(1, pushback_ms=600)) as server:
        started_s = time.monotonic()
        classify(server.address, options=ConnectionOptions(QUICK))
        assert time.monotonic() - started_s >= 0.6
        assert server.calls == 2


def test_a_negative_pushback_forbids_retries(classify):
    with scripted_server(reject_first(1, pushback_ms=-1)) as server:
        with pytest.raises(UnavailableError):
            classify(server.address, options=ConnectionOptions(QUICK))
        assert server.calls == 1


def test_a_deadline_ends_a_call_that_waits_to_be_tried_again(classify):
    with scripted_server(reject_first(99, pushback_ms=3_600_000)) as server:
        with pytest.raises((DeadlineExceededError, UnavailableError)):
            classify(server.address, timeout_s=1)
        assert server.calls <= 1


def test_the_server_sees_one_deadline_for_a_call_and_its_retries(classify):
    remaining_s = []
    reject = reject_first(1, pushback_ms=1500)

    def handle(request, context, earlier):
        remaining_s.append(context.time_remaining())
        return reject(request, context, earlier)

    with scripted_server(handle) as server:
        classify(server.address, timeout_s=20)
    # A busy machine makes them smaller; gRPC rounds up to whole seconds on the way.
    first_s, second_s = remaining_s
    assert 0 < first_s < 20.5
    assert 0 < second_s < 19.5


def test_a_server_that_rejects_most_calls_gets_few_retries():
    options = ConnectionOptions(RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.02, budget=8))
    with (
        scripted_server(reject_first(10_000)) as server,
        Client(server.address, options=options) as client,
    ):
        for _ in range(20):
            with pytest.raises(UnavailableError):
                client.classify(b"x")
        # Without a budget there would be four attempts a call.
        assert 20 <= server.calls < 30


def test_calls_are_spread_over_servers_and_avoid_a_dead_one():
    with scripted_server(answer) as first, scripted_server(answer) as second:
        both = f"{first.address},{second.address}"
        with Client(both) as client:
            while not (first.calls and second.calls):  # until both are connected
                client.classify(b"x")
            before = first.calls, second.calls
            for _ in range(40):
                client.classify(b"x")
        assert min(first.calls - before[0], second.calls - before[1]) >= 15
        seen = first.calls
        with Client(f"{first.address},127.0.0.1:1") as client:
            for _ in range(20):
                client.classify(b"x")
        assert first.calls == seen + 20


def test_a_restarted_server_is_found_again():
    with scripted_server(answer) as server:
        port = server.address
        client = Client(port)
        client.classify(b"x")
    with pytest.raises(UnavailableError):
        client.classify(b"x")
    again = grpc.server(ThreadPoolExecutor(2))
    again.add_insecure_port(port)
    again.start()
    try:
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s:
            try:
                client.classify(b"x")
            except UnsupportedError:  # it answers, though it knows no Classify
                return
            except UnavailableError:
                time.sleep(0.05)
        pytest.fail("the client did not come back")
    finally:
        client.close()
        again.stop(None).wait()


def test_a_message_over_the_limit_has_an_error_of_its_own(classify):
    small = ConnectionOptions(max_message_bytes=1000)
    with scripted_server(answer) as server:
        with pytest.raises(MessageTooLargeError, match="larger than max"):
            classify(server.address, b"x" * 2000, options=small)
        # Servers accept 4 MiB unless they say otherwise.
        with pytest.raises(MessageTooLargeError, match="larger than max"):
            classify(server.address, b"x" * 5_000_000)
        assert server.calls == 0


@contextmanager
def tcp_proxy(address: str, vanished: Event | None = None) -> Iterator[tuple[str, list[int]]]:
    """Forwards TCP connections until it has vanished, and swallows everything from then on.

    Gives its address and a list of the bytes that clients sent.
    """
    host, _, port = address.partition(":")
    sent: list[int] = []

    def pump(source, sink, sizes):
        with contextlib.suppress(OSError):
            while chunk := source.recv(65536):
                sizes.append(len(chunk))
                if not (vanished and vanished.is_set()):
                    sink.sendall(chunk)

    def end(connection):
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                client = sockets.enter_context(listener.accept()[0])
                server = sockets.enter_context(socket.create_connection((host, port)))
                sockets.callback(end, client)
                sockets.callback(end, server)
                threads.submit(pump, client, server, sent)
                threads.submit(pump, server, client, [])

    with (
        ThreadPoolExecutor(32) as threads,
        ExitStack() as sockets,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        accepting = threads.submit(accept)
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}", sent
        finally:
            end(listener)
            accepting.result()


def test_a_peer_that_vanished_is_noticed_during_a_call(classify):
    """Simulate a vanished machine: nothing comes back, not even the end of the connection."""
    arrived, vanished, over = Event(), Event(), Event()
    options = ConnectionOptions(
        RetryPolicy(attempts=1), keepalive_s=0.5, keepalive_timeout_s=1, private_connection=True
    )

    def handle(request, context, earlier):
        arrived.set()
        over.wait()
        return ANSWER

    def vanish():
        arrived.wait()
        vanished.set()

    with scripted_server(handle) as server, tcp_proxy(server.address, vanished) as (address, _):
        watch = Thread(target=vanish)
        watch.start()
        try:
            with pytest.raises(UnavailableError, match=r"keepalive|ping timeout"):
                classify(address, timeout_s=3600, options=options)
        finally:
            arrived.set()
            over.set()
            watch.join()


def test_gzip_makes_requests_smaller(classify):
    with scripted_server(answer) as server, tcp_proxy(server.address) as (address, sent):
        classify(address, bytes(1_000_000), options=ConnectionOptions(gzip=True))
        compressed_bytes = sum(sent)
        classify(address, bytes(1_000_000))
        assert compressed_bytes < 50_000
        assert sum(sent) - compressed_bytes > 1_000_000


@pytest.mark.parametrize("abstain", [True, False])
def test_an_answer_says_whether_the_model_abstains(classify, abstain):
    reply = pb.ClassifyResponse(model="m", version=1, abstain=abstain)
    with scripted_server(lambda *call: reply) as server:
        assert classify(server.address).abstain is abstain


def test_a_closed_client_raises():
    with scripted_server(answer) as server:
        with Client(server.address) as client:
            pass
        with pytest.raises(LifetimeError, match="closed"):
            client.classify(b"x")


FORKING = """
import os, sys
from convoy.client import Client, LifetimeError
client = Client(sys.argv[1])
print(client.classify(b"x").best.label, flush=True)
if os.fork() == 0:
    try:
        client.classify(b"x")
    except LifetimeError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
"""


def test_a_client_created_before_a_fork_raises():
    with scripted_server(answer) as server:
        result = subprocess.run(
            [sys.executable, "-c", FORKING, server.address],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    first, second = result.stdout.splitlines()
    assert first == "yes"
    assert "created before this process was forked" in second


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture
def ca(authority, tmp_path):
    path = tmp_path / "ca.pem"
    path.write_bytes(authority.pem)
    return path


def server_credentials(authority, *, mutual):
    certificate, key = authority.issue()
    root = authority.pem if mutual else None
    return grpc.ssl_server_credentials([(key, certificate)], root, require_client_auth=mutual)


def test_tls_by_argument_and_by_environment(classify, authority, ca, monkeypatch):
    with scripted_server(answer, server_credentials(authority, mutual=False)) as server:
        assert classify(server.address, options=ConnectionOptions(tls=Tls(ca)))
        with pytest.raises(UnavailableError):  # not the system's roots
            classify(server.address, options=ConnectionOptions(tls=Tls()))
        with pytest.raises(UnavailableError):
            classify(server.address)
        monkeypatch.setenv("CONVOY_TLS_CA", str(ca))
        monkeypatch.setenv("CONVOY_TOKEN", "secret")
        assert classify(server.address)
        assert server.metadata[-1]["authorization"] == "Bearer secret"


def test_mutual_tls(classify, authority, ca, tmp_path):
    with scripted_server(answer, server_credentials(authority, mutual=True)) as server:
        tls = Tls(ca, *authority.issue_into(tmp_path))
        assert classify(server.address, options=ConnectionOptions(tls=tls))
        with pytest.raises(UnavailableError):
            classify(server.address, options=ConnectionOptions(tls=Tls(ca)))


def test_a_token_is_never_sent_unencrypted(classify):
    options = ConnectionOptions(token="secret")
    with scripted_server(answer) as server:
        classify(server.address, options=options)
        assert server.metadata[-1]["authorization"] == "Bearer secret"
    with pytest.raises(UsageError, match="unencrypted"):
        classify("192.0.2.1:8001", options=options)
    assert "secret" not in repr(options)


@pytest.mark.parametrize(
    ("address", "options", "words"),
    [
        ("127.0.0.1:1", {"timeout_s": 0}, "timeout_s"),
        ("127.0.0.1:1", {"options": ConnectionOptions(tls=Tls(Path("no.pem")))}, "no.pem"),
        ("127.0.0.1:1", {"options": ConnectionOptions(tls=Tls(key=Path("k")))}, "one of the two"),
    ],
)
def test_wrong_options_fail_at_once(classify, address, options, words):
    with pytest.raises(UsageError, match=words):
        classify(address, **options)


def test_retries_and_keepalive_have_limits():
    with pytest.raises(UsageError, match="1 to 5"):
        RetryPolicy(attempts=6)
    with pytest.raises(UsageError, match="initial_backoff_s"):
        RetryPolicy(initial_backoff_s=0.001)
    with pytest.raises(UsageError, match=r"keepalive_timeout_s: .* got 0"):
        ConnectionOptions(keepalive_timeout_s=0)


@pytest.mark.parametrize("address", [None, ""])
def test_an_empty_address_is_the_default(monkeypatch, address):
    monkeypatch.setenv("CONVOY_ADDRESS", "")
    assert Connection.to(address, 1, None).address == DEFAULT_ADDRESS
    monkeypatch.setenv("CONVOY_ADDRESS", "127.0.0.1:7")
    assert Connection.to(address, 1, None).address == "127.0.0.1:7"


def test_the_environment_is_read_once_and_only_what_is_asked_for():
    assert ConnectionOptions.from_environment({}) == ConnectionOptions()
    options = ConnectionOptions.from_environment({"CONVOY_TLS": "1", "CONVOY_GZIP": "yes"})
    assert options == ConnectionOptions(tls=Tls(), gzip=True)
    assert os.environ.get("CONVOY_TLS") is None
