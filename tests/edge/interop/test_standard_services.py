"""grpc.health.v1 and grpc.reflection, v1 and v1alpha, of a running server."""

from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from tests.processes import GRPC_FLAGS, running_server

SERVING = health_pb2.HealthCheckResponse.SERVING
SERVICES = {
    "convoy.v1.ClassifierService",
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
    "inference.GRPCInferenceService",
}


@pytest.fixture
def channel(edge) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(edge.address) as opened:
        yield opened


def reflected(channel: grpc.Channel, version: str, **question: str):
    """Ask one question of a version of reflection and return the reply."""
    call = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    (reply,) = call(iter([reflection_pb2.ServerReflectionRequest(**question)]), timeout=30)
    return reply


def described(channel: grpc.Channel, version: str, symbol: str) -> DescriptorPool:
    """Build a descriptor pool from nothing but what reflection says of a symbol."""
    reply = reflected(channel, version, file_containing_symbol=symbol)
    files = [
        FileDescriptorProto.FromString(each)
        for each in reply.file_descriptor_response.file_descriptor_proto
    ]
    pool = DescriptorPool()
    # Dependencies first; a file whose dependencies are missing would make this loop end short.
    added: set[str] = set()
    for _ in files:
        for file in files:
            if file.name not in added and added.issuperset(file.dependency):
                pool.AddSerializedFile(file.SerializeToString())
                added.add(file.name)
    assert added == {file.name for file in files}
    return pool


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_lists_every_service(channel, version):
    reply = reflected(channel, version, list_services="*")
    assert {each.name for each in reply.list_services_response.service} == SERVICES


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
@pytest.mark.parametrize("service", sorted(SERVICES))
def test_reflection_describes_every_service(channel, version, service):
    pool = described(channel, version, service)
    assert pool.FindServiceByName(service).methods


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_does_not_know_other_symbols(channel, version):
    reply = reflected(channel, version, file_containing_symbol="grpc.health.v2.Health")
    assert reply.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_a_call_is_made_of_what_reflection_says(channel):
    pool = described(channel, "v1", "inference.GRPCInferenceService")
    method = pool.FindMethodByName("inference.GRPCInferenceService.ModelReady")
    ask = channel.unary_unary(
        "/inference.GRPCInferenceService/ModelReady",
        GetMessageClass(method.input_type).SerializeToString,
        GetMessageClass(method.output_type).FromString,
    )
    assert ask(GetMessageClass(method.input_type)(name="colors"), timeout=30).ready


def health_list(channel: grpc.Channel) -> dict[str, int]:
    """Call Health/List, of whose messages the installed stubs know nothing."""
    pool = described(channel, "v1", "grpc.health.v1.Health")
    method = pool.FindMethodByName("grpc.health.v1.Health.List")
    call = channel.unary_unary(
        "/grpc.health.v1.Health/List",
        GetMessageClass(method.input_type).SerializeToString,
        GetMessageClass(method.output_type).FromString,
    )
    reply = call(GetMessageClass(method.input_type)(), timeout=30)
    return {name: status.status for name, status in reply.statuses.items()}


def test_health_lists_what_check_knows(channel):
    names = {"", "colors", "convoy.v1.ClassifierService", "inference.GRPCInferenceService"}
    assert health_list(channel) == dict.fromkeys(names, SERVING)


def test_health_is_watched(channel):
    watch = channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        health_pb2.HealthCheckRequest.SerializeToString,
        health_pb2.HealthCheckResponse.FromString,
    )
    call = watch(health_pb2.HealthCheckRequest(service="colors"), timeout=30)
    assert next(call).status == SERVING
    call.cancel()
    unknown = watch(health_pb2.HealthCheckRequest(service="unknown"), timeout=30)
    assert next(unknown).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    unknown.cancel()


@pytest.mark.parametrize("transport", GRPC_FLAGS)
def test_health_list_needs_the_token_that_check_does_without(colors, tmp_path, transport):
    (tmp_path / "token").write_text("secret")
    flags = ["--device", "cpu", *GRPC_FLAGS[transport], "--token-file", tmp_path / "token"]
    with (
        running_server(colors, *flags) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        assert check(health_pb2.HealthCheckRequest(service="colors"), timeout=30).status == SERVING
        call = channel.unary_unary("/grpc.health.v1.Health/List")
        with pytest.raises(grpc.RpcError) as rejected:
            call(b"", timeout=30)
        assert rejected.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert call(b"", metadata=[("authorization", "Bearer secret")], timeout=30)
