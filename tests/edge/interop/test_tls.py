"""Mutual TLS while files are replaced: no request is lost, and a replaced authority revokes."""

import contextlib
import socket
import ssl
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import inference_pb2_grpc
from tests.edge.interop.clients import PIXELS
from tests.processes import GRPC_FLAGS, ServerProcess, running_server
from tests.server.certificates import Authority, serial_of

TIMEOUT_S = 60
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
TRANSPORTS = pytest.mark.parametrize("transport", GRPC_FLAGS)


@dataclass(frozen=True)
class Secured:
    """A server with mutual TLS, and who may call it.

    Attributes:
        servers: The authority of the server's certificate.
        clients: The authority that clients' certificates must be of at first.
        folder: Holds server.crt, server.key and clients.crt.
    """

    server: ServerProcess
    servers: Authority
    clients: Authority
    folder: Path

    def trust(self, authority: Authority) -> None:
        """Replace the authority of clients' certificates."""
        replace_file(self.folder / "clients.crt", authority.pem)

    def context_of(self, client: Authority, version: ssl.TLSVersion) -> ssl.SSLContext:
        """Return a client's context with a certificate of an authority."""
        context = ssl.create_default_context(cadata=self.servers.pem.decode())
        context.minimum_version = context.maximum_version = version
        context.set_alpn_protocols(["h2"])
        for path, content in zip(("own.crt", "own.key"), client.issue("client"), strict=True):
            (self.folder / path).write_bytes(content)
        context.load_cert_chain(self.folder / "own.crt", self.folder / "own.key")
        return context

    def channel(self, client: Authority) -> grpc.Channel:
        certificate, key = client.issue("client")
        credentials = grpc.ssl_channel_credentials(self.servers.pem, key, certificate)
        # Neither connections nor sessions of another channel are taken over, and a call that the
        # server never saw is not repeated in secret.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        return grpc.secure_channel(self.server.address, credentials, options)


def replace_file(path: Path, content: bytes) -> None:
    fresh = path.with_suffix(".fresh")
    fresh.write_bytes(content)
    fresh.rename(path)


@pytest.fixture
def secured(colors, tmp_path, transport) -> Iterator[Secured]:
    servers, clients = Authority("servers"), Authority("clients")
    certificate, key = servers.issue_into(tmp_path)
    (tmp_path / "clients.crt").write_bytes(clients.pem)
    (tmp_path / "token").write_text("secret")
    flags = ["--device", "cpu", *GRPC_FLAGS[transport], "--tls-client-ca", tmp_path / "clients.crt"]
    flags += ["--tls-certificate", certificate, "--tls-key", key]
    flags += ["--token-file", tmp_path / "token"]
    with running_server(colors, *flags) as server:
        yield Secured(server, servers, clients, tmp_path)


@dataclass(frozen=True)
class Greeted:
    """A TLS connection that reached HTTP/2.

    Attributes:
        session: For the next connection.
        is_resumed: Whether it continued an earlier session.
        serial: Of the server's certificate.
    """

    session: ssl.SSLSession | None
    is_resumed: bool
    serial: int


def greet(
    secured: Secured, context: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> Greeted:
    """Connect, exchange the greetings of HTTP/2, and leave.

    Raises:
        OSError: The server rejects the client.
    """
    host, port = secured.server.address.split(":")
    with (
        socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as plain,
        context.wrap_socket(plain, server_hostname=host, session=session) as secure,
    ):
        secure.sendall(HTTP2_GREETING)
        # With TLS 1.3 the client learns only here that it is rejected, and the tickets come here.
        if not secure.recv(9):
            raise ConnectionResetError("the server closed the connection")
        serial = serial_of(ssl.DER_cert_to_PEM_cert(secure.getpeercert(True)))
        return Greeted(secure.session, bool(secure.session_reused), serial)


def accepts(
    secured: Secured, context: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> bool:
    """Say whether the server lets a client in."""
    with contextlib.suppress(OSError):
        greet(secured, context, session)
        return True
    return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@TRANSPORTS
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_replaced_authority_rejects_resumed_sessions_of_the_old_one(secured, version, transport):
    friend = secured.context_of(secured.clients, version)
    others = Authority("others")
    session = greet(secured, friend).session
    resumed = greet(secured, friend, session)
    # Front ends share no sessions: the second connection may reach another one.
    assert resumed.is_resumed or transport == "front ends"
    secured.trust(others)
    stranger = secured.context_of(others, version)
    # Each front end looks at the file in its own time.
    wait_until(lambda: all(accepts(secured, stranger) for _ in range(8)))
    wait_until(lambda: not any(accepts(secured, friend, session) for _ in range(8)))
    if transport != "front ends":
        assert not accepts(secured, friend, resumed.session)
    assert not accepts(secured, friend)


def infer_request() -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="colors", raw_input_contents=[PIXELS.tobytes()])
    request.inputs.add(name="image", datatype="UINT8", shape=PIXELS.shape)
    return request


TOKEN = [("authorization", "Bearer secret")]


@TRANSPORTS
def test_no_request_is_lost_while_certificates_are_replaced(secured):
    stopped = threading.Event()
    ends: Counter[str] = Counter()
    shown: set[int] = set()
    request = infer_request()

    def call(channel: grpc.Channel) -> None:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            stub.ModelInfer(request, metadata=TOKEN, timeout=TIMEOUT_S)
            ends["OK"] += 1
        except grpc.RpcError as error:
            ends[str(error)] += 1

    def keep_calling() -> None:
        with secured.channel(secured.clients) as channel:
            while not stopped.is_set():
                call(channel)

    def keep_connecting() -> None:
        while not stopped.is_set():
            with secured.channel(secured.clients) as channel:
                call(channel)

    threads = [threading.Thread(target=keep_calling) for _ in range(3)]
    threads += [threading.Thread(target=keep_connecting) for _ in range(2)]
    for thread in threads:
        thread.start()
    context = secured.context_of(secured.clients, ssl.TLSVersion.TLSv1_3)
    try:
        for _ in range(4):
            certificate, _ = secured.servers.issue_into(secured.folder)
            fresh = serial_of(certificate.read_bytes())
            wait_until(lambda fresh=fresh: greet(secured, context).serial == fresh)
            shown.add(fresh)
            # Calls continue for a while with each.
            before = ends["OK"]
            wait_until(lambda before=before: ends["OK"] > before + 20)
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
    assert set(ends) == {"OK"}
    assert len(shown) == 4


@TRANSPORTS
def test_a_stream_continues_while_the_certificate_is_replaced(secured):
    context = secured.context_of(secured.clients, ssl.TLSVersion.TLSv1_3)
    replaced = threading.Event()

    def requests() -> Iterator[pb.ModelInferRequest]:
        yield infer_request()
        replaced.wait(TIMEOUT_S)
        yield infer_request()

    with secured.channel(secured.clients) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        replies = stub.ModelStreamInfer(requests(), metadata=TOKEN, timeout=TIMEOUT_S)
        assert not next(replies).error_message
        certificate, _ = secured.servers.issue_into(secured.folder)
        fresh = serial_of(certificate.read_bytes())
        wait_until(lambda: greet(secured, context).serial == fresh)
        replaced.set()
        assert not next(replies).error_message
        assert list(replies) == []


@TRANSPORTS
def test_operators_need_neither_certificate_nor_token(secured):
    with secured.channel(secured.clients) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as rejected:
            stub.ModelInfer(infer_request(), timeout=TIMEOUT_S)
        assert rejected.value.code() is grpc.StatusCode.UNAUTHENTICATED
        stub.ModelInfer(infer_request(), metadata=TOKEN, timeout=TIMEOUT_S)
    for path in ("/healthz", "/readyz", "/metrics"):
        with urllib.request.urlopen(secured.server.metrics + path, timeout=TIMEOUT_S) as reply:
            assert reply.status == 200
    # Front ends report their counts to the owner of the device from time to time.
    wait_until(lambda: secured.server.metric("convoy_outcomes_total", reason="ok") == 1)


@TRANSPORTS
def test_old_versions_of_tls_are_rejected(secured):
    with pytest.warns(DeprecationWarning, match="TLS"):
        context = secured.context_of(secured.clients, ssl.TLSVersion.TLSv1_1)
    context.set_ciphers("ALL:@SECLEVEL=0")
    assert not accepts(secured, context)
