"""Tokens, TLS and mutual TLS on real connections, on both transports."""

import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from http.client import HTTPException

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from convoy.oip.v2 import inference_pb2 as pb
from convoy.oip.v2 import inference_pb2_grpc
from convoy.server.security.tokens import Tokens, warn_if_open
from tests.processes import GRPC_FLAGS, run_module, running_server
from tests.server.certificates import Authority, serial_of

TRANSPORTS = pytest.mark.parametrize("transport", GRPC_FLAGS)


def live(channel: grpc.Channel, token: str | None = None) -> str:
    """Asks ServerLive and returns the status code."""
    stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
    metadata = [("authorization", token)] if token is not None else []
    try:
        stub.ServerLive(pb.ServerLiveRequest(), metadata=metadata, timeout=10)
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


def eventually(ask, expected: object) -> None:
    """Asks until the answer is as expected; the test's own timeout bounds it."""
    while ask() != expected:
        time.sleep(0.01)


@TRANSPORTS
def test_a_token_opens_and_health_needs_none(publish, tmp_path, transport):
    tokens = tmp_path / "tokens"
    tokens.write_text("first\nsecond\n")
    flags = ["--device", "cpu", *GRPC_FLAGS[transport], "--token-file", tokens]
    with (
        running_server(publish().parent.parent, *flags) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        assert live(channel, "Bearer first") == "OK"
        assert live(channel, "bearer second") == "OK"
        for wrong in (None, "", "first", "Bearer", "Bearer firs", "Bearer firstt", "Basic first"):
            assert live(channel, wrong) == "UNAUTHENTICATED", wrong
        check = health_pb2_grpc.HealthStub(channel).Check
        state = check(health_pb2.HealthCheckRequest()).status
        assert state == health_pb2.HealthCheckResponse.SERVING
        tokens.write_text("third")
        eventually(lambda: live(channel, "Bearer third"), "OK")
        assert live(channel, "Bearer first") == "UNAUTHENTICATED"
        tokens.write_text("")
        assert live(channel, "Bearer third") == "OK"
        assert live(channel, "Bearer") == "UNAUTHENTICATED"


def status(url: str, token: str = "", context: ssl.SSLContext | None = None) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_rest_asks_for_the_token_and_speaks_tls_too(publish, tmp_path):
    authority = Authority()
    certificate, key = authority.issue_into(tmp_path)
    (tmp_path / "token").write_text("secret")
    flags = ["--device", "cpu", "--token-file", tmp_path / "token"]
    flags += ["--tls-certificate", certificate, "--tls-key", key]
    context = ssl.create_default_context(cadata=authority.pem.decode())
    with running_server(publish().parent.parent, *flags) as server:
        for path in ("/v2/models/colors", "/ui/state", "/nothing"):
            assert status(server.url + path, context=context) == 401
            assert status(server.url + path, "other", context) == 401
        for path in ("/v2/models/colors", "/ui/state"):
            assert status(server.url + path, "secret", context) == 200
        for path in ("/", "/main.js", "/style.css", "/docs", "/openapi.json"):
            assert status(server.url + path, context=context) == 200
        # Operators have neither certificate nor token.
        for path in ("/healthz", "/readyz", "/metrics"):
            assert status(server.metrics + path) == 200
        # It gets a TLS alert in place of an answer.
        with pytest.raises((OSError, HTTPException)):
            status(server.url.replace("https", "http") + "/")


def secure_channel(address: str, authority: Authority, client=(None, None)) -> grpc.Channel:
    certificate, key = client
    credentials = grpc.ssl_channel_credentials(authority.pem, key, certificate)
    # Sessions and connections of another channel must not be taken over.
    options = [("grpc.use_local_subchannel_pool", 1)]
    return grpc.secure_channel(address, credentials, options)


@TRANSPORTS
def test_tls_follows_a_replaced_certificate(publish, tmp_path, transport):
    authority = Authority()
    certificate, key = authority.issue_into(tmp_path)
    flags = ["--device", "cpu", *GRPC_FLAGS[transport]]
    flags += ["--tls-certificate", certificate, "--tls-key", key]
    with running_server(publish().parent.parent, *flags) as server:
        host, port = server.address.split(":")

        def shown() -> int:
            context = ssl.create_default_context(cadata=authority.pem.decode())
            context.check_hostname = False
            context.set_alpn_protocols(["h2"])
            with (
                socket.create_connection((host, int(port)), timeout=10) as plain,
                context.wrap_socket(plain) as secure,
            ):
                return serial_of(ssl.DER_cert_to_PEM_cert(secure.getpeercert(True)))

        with secure_channel(server.address, authority) as old:
            assert live(old) == "OK"
            assert shown() == serial_of(certificate.read_bytes())
            before = shown()
            certificate.write_bytes(b"not a certificate")
            assert shown() == before
            authority.issue_into(tmp_path)
            eventually(shown, serial_of(certificate.read_bytes()))
            # What is connected stays so.
            assert live(old) == "OK"


@TRANSPORTS
def test_mutual_tls_wants_a_certificate_of_its_authority(publish, tmp_path, transport):
    authority, clients, others = Authority(), Authority("clients"), Authority("others")
    certificate, key = authority.issue_into(tmp_path)
    client_ca = tmp_path / "clients.crt"
    client_ca.write_bytes(clients.pem)
    flags = ["--device", "cpu", *GRPC_FLAGS[transport], "--tls-client-ca", client_ca]
    flags += ["--tls-certificate", certificate, "--tls-key", key]

    def ask(client=(None, None)) -> str:
        with secure_channel(server.address, authority, client) as channel:
            return live(channel)

    with running_server(publish().parent.parent, *flags) as server:
        assert ask(clients.issue("friend")) == "OK"
        assert ask() == "UNAVAILABLE"
        assert ask(others.issue("stranger")) == "UNAVAILABLE"
        client_ca.write_bytes(others.pem)
        eventually(lambda: ask(others.issue("stranger")), "OK")
        # Each front end looks at the file in its own time.
        eventually(lambda: ask(clients.issue("friend")), "UNAVAILABLE")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tls-certificate", "{crt}"], "--tls-certificate and --tls-key: expected both"),
        (["--tls-client-ca", "{crt}"], "--tls-client-ca: expected also --tls-certificate"),
        (
            ["--tls-certificate", "{crt}", "--tls-key", "{other}"],
            "--tls-certificate: expected PEM files that belong together",
        ),
        (["--tls-certificate", "{none}", "--tls-key", "{key}"], "No such file"),
        (["--token-file", "{none}"], "--token-file: .*No such file"),
        (["--token-file", "{empty}"], "--token-file: expected a token, found none"),
        (["--token-file", "{three}"], "--token-file: line 2: expected a token, or a name and"),
        (["--admin-port", "0"], "--admin-port: expected also --admin-token-file"),
    ],
)
def test_credentials_that_cannot_be_used_end_the_start(publish, tmp_path, flags, message):
    certificate, key = Authority().issue_into(tmp_path)
    (tmp_path / "other.key").write_bytes(Authority().issue()[1])
    (tmp_path / "empty").touch()
    (tmp_path / "three").write_text("name token\nname token more\n")
    places = {
        "crt": certificate,
        "key": key,
        "other": tmp_path / "other.key",
        "none": tmp_path / "none",
        "empty": tmp_path / "empty",
        "three": tmp_path / "three",
    }
    ports = ["--port", "0", "--metrics-port", "0", "--device", "cpu"]
    models = publish().parent.parent
    ended = run_module(
        "convoy.server", "--repository", models, *ports, *(flag.format(**places) for flag in flags)
    )
    assert ended.returncode == 2
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("convoy-server: ")]
    assert line == ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert re.search(message, line)


@pytest.mark.parametrize(
    ("host", "warned"),
    [("127.0.0.1", 0), ("::1", 0), ("localhost", 0), ("0.0.0.0", 1), ("192.0.2.7", 1)],
)
def test_an_open_port_beyond_loopback_is_warned_of(tmp_path, host, warned):
    tokens = tmp_path / "tokens"
    tokens.write_text("secret")
    with capture_logs() as lines:
        warn_if_open(host, Tokens(None), mutual_tls=False)
        warn_if_open(host, Tokens(None), mutual_tls=True)
        warn_if_open(host, Tokens(tokens), mutual_tls=False)
    assert len(lines) == warned


ADMIN_TOKEN = [("authorization", "Bearer admin")]


def test_the_admin_port_indexes_loads_and_unloads_with_its_own_token(publish, tmp_path):
    models = publish().parent.parent
    (tmp_path / "admin").write_text("old\nrota admin\n")
    (tmp_path / "everyone").write_text("everyone")
    flags = ["--device", "cpu", "--poll-s", "0", "--token-file", tmp_path / "everyone"]
    flags += ["--admin-port", "0", "--admin-token-file", tmp_path / "admin"]
    with (
        running_server(models, *flags) as server,
        grpc.insecure_channel(str(server.wait_for("serving")["admin"])) as admin_channel,
        grpc.insecure_channel(server.address) as channel,
    ):
        admin = inference_pb2_grpc.GRPCInferenceServiceStub(admin_channel)
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        everyone = [("authorization", "Bearer everyone")]

        def code(call, request, metadata) -> str:
            with pytest.raises(grpc.RpcError) as caught:
                call(request, metadata=metadata, timeout=20)
            return caught.value.code().name

        def index() -> dict[str, str]:
            reply = admin.RepositoryIndex(pb.RepositoryIndexRequest(), metadata=ADMIN_TOKEN)
            return {model.version: model.state for model in reply.models}

        load = pb.RepositoryModelLoadRequest(model_name="colors")
        unload = pb.RepositoryModelUnloadRequest(model_name="colors")
        ready = pb.ModelReadyRequest(name="colors")
        everything = pb.RepositoryIndexRequest()
        assert code(admin.RepositoryIndex, everything, everyone) == "UNAUTHENTICATED"
        assert code(stub.RepositoryIndex, everything, everyone) == "UNIMPLEMENTED"
        assert code(admin.ModelInfer, pb.ModelInferRequest(), ADMIN_TOKEN) == "UNIMPLEMENTED"
        assert index() == {"1": "READY"}
        publish(2)
        assert index() == {"1": "READY", "2": "UNAVAILABLE"}
        admin.RepositoryModelLoad(load, metadata=ADMIN_TOKEN)
        eventually(index, {"1": "UNAVAILABLE", "2": "READY"})
        load.parameters["config"].string_param = "{}"
        assert code(admin.RepositoryModelLoad, load, ADMIN_TOKEN) == "UNIMPLEMENTED"
        admin.RepositoryModelUnload(unload, metadata=ADMIN_TOKEN)
        assert not stub.ModelReady(ready, metadata=everyone).ready
        assert code(admin.RepositoryModelUnload, unload, ADMIN_TOKEN) == "NOT_FOUND"
        del load.parameters["config"]
        load.model_name = "../models/colors"
        assert code(admin.RepositoryModelLoad, load, ADMIN_TOKEN) == "NOT_FOUND"
        load.model_name = "colors"
        admin.RepositoryModelLoad(load, metadata=[("authorization", "Bearer old")])
        assert stub.ModelReady(ready, metadata=everyone).ready
        server.wait_for("admin action", action="load", caller="token 1")
        audited = [
            (line["action"], line["model"], line["caller"], line.get("error", ""))
            for line in server.events
            if str(line["event"]).startswith("admin action")
        ]
        assert audited == [
            ("load", "colors", "rota", ""),
            ("unload", "colors", "rota", ""),
            ("unload", "colors", "rota", "model: 'colors' is not served"),
            (
                "load",
                "../models/colors",
                "rota",
                "model: the repository has none named '../models/colors'",
            ),
            ("load", "colors", "token 1", ""),
        ]
        assert server.metric("convoy_authentication_failures_total", port="admin") == 1
        assert server.metric("convoy_authentication_failures_total", port="callers") == 0
