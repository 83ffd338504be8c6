"""Every call is counted once, by method and status, whether or not it reaches a servicer."""

import http.client
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from convoy.oip.v2 import inference_pb2_grpc
from tests.processes import GRPC_FLAGS, ServerProcess, running_server
from tests.server.test_process import infer_request

INFER = "/inference.GRPCInferenceService/ModelInfer"
MIB = 1024 * 1024


def counted(server: ServerProcess, **labels: str) -> float:
    return server.metric("convoy_calls_total", **labels)


def eventually(value, expected: object) -> None:
    """Asks until the value is as expected; front ends report twice a second."""
    for _ in range(3000):
        if value() == expected:
            return
        time.sleep(0.01)
    assert value() == expected


@pytest.mark.parametrize("transport", GRPC_FLAGS)
def test_calls_are_counted_by_method_and_status(publish, tmp_path, transport):
    (tmp_path / "tokens").write_text("secret")
    flags = ["--device", "cpu", "--token-file", tmp_path / "tokens", *GRPC_FLAGS[transport]]
    metadata = [("authorization", "Bearer secret")]
    with (
        running_server(publish().parent.parent, *flags) as server,
        grpc.insecure_channel(server.address) as channel,
    ):

        def status(path: str, body: bytes, **options: object) -> str:
            options.setdefault("metadata", metadata)
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(path)(body, timeout=60, **options)
            return caught.value.code().name

        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        stub.ModelInfer(infer_request(), metadata=metadata)
        health = health_pb2_grpc.HealthStub(channel)
        health.Check(health_pb2.HealthCheckRequest())
        assert status(INFER, b"", metadata=[]) == "UNAUTHENTICATED"
        assert status("/made.Up/Name", b"") == "UNIMPLEMENTED"
        assert status(INFER, b"\xff") == "INVALID_ARGUMENT"
        assert status(INFER, bytes(17 * MIB)) == "RESOURCE_EXHAUSTED"
        watch = health.Watch(health_pb2.HealthCheckRequest())
        next(watch)
        eventually(lambda: server.metric("convoy_open_calls", protocol="grpc"), 1)
        watch.cancel()

        def of(method: str, code: str) -> float:
            return counted(server, protocol="grpc", method=method, code=code)

        # The C core does not say what it answers to a message that it does not take.
        too_large = "rejected" if transport == "grpcio" else "RESOURCE_EXHAUSTED"
        expected = {
            ("ModelInfer", "OK"): 1,
            ("Check", "OK"): 1,
            ("ModelInfer", "UNAUTHENTICATED"): 1,
            ("unknown", "UNIMPLEMENTED"): 1,
            ("ModelInfer", "INVALID_ARGUMENT"): 1,
            ("ModelInfer", too_large): 1,
            ("Watch", "CANCELLED"): 1,
        }
        for (method, code), count in expected.items():
            eventually(lambda method=method, code=code: of(method, code), count)
        assert counted(server, protocol="grpc") == sum(expected.values())
        eventually(lambda: server.metric("convoy_open_calls", protocol="grpc"), 0)
        # Nor are they lost where the objective is counted: 1 OK, 3 others.
        assert server.metric("convoy_outcomes_total") == 4
        assert server.metric("convoy_outcomes_total", reason="backend") == 0


@pytest.mark.parametrize("transport", GRPC_FLAGS)
def test_a_cancelled_inference_is_counted_once_as_cancelled(publish, transport):
    flags = ["--device", "cpu", "--max-queue-delay-ms", "600000", *GRPC_FLAGS[transport]]
    with (
        running_server(publish().parent.parent, *flags) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        call = stub.ModelInfer.future(infer_request())
        eventually(lambda: server.metric("convoy_queued_images") > 0, True)
        call.cancel()
        eventually(lambda: counted(server, method="ModelInfer", code="CANCELLED"), 1)
        eventually(lambda: server.metric("convoy_outcomes_total", reason="cancelled"), 1)
        assert server.metric("convoy_outcomes_total") == 1


@pytest.mark.parametrize("transport", ["h2corn", "front ends"])
def test_rest_requests_are_counted_by_route_and_status(publish, tmp_path, transport):
    (tmp_path / "tokens").write_text("secret")
    flags = ["--device", "cpu", "--token-file", tmp_path / "tokens", *GRPC_FLAGS[transport]]
    with running_server(publish().parent.parent, *flags) as server:

        def status(verb: str, path: str, token: str = "secret", body: bytes = b"") -> int:
            connection = http.client.HTTPConnection(server.address, timeout=60)
            connection.request(verb, path, body, {"Authorization": f"Bearer {token}"})
            reply = connection.getresponse()
            reply.read()
            connection.close()
            return reply.status

        assert status("GET", "/v2") == 200
        assert status("GET", "/v2", "other") == 401
        assert status("GET", "/made/up") == 404
        assert status("POST", "/v2/models/colors/infer", body=b"{") == 400
        assert status("GET", "/", "none") == 200
        expected = {
            ("RestServerMetadata", "200"): 1,
            ("unknown", "401"): 1,
            ("unknown", "404"): 1,
            ("RestInfer", "400"): 1,
            ("Page", "200"): 1,
        }

        def all_counted() -> dict[tuple[str, str], float]:
            return {
                (method, code): counted(server, protocol="http", method=method, code=code)
                for method, code in expected
            }

        eventually(all_counted, expected)
        assert counted(server, protocol="http") == sum(expected.values())
