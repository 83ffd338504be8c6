"""grpc.health.v1 and reflection, the services that every gRPC server has.

Health has Check, List and Watch for the whole server, each gRPC service and each model.

The servicer of grpcio-health-checking keeps one condition for all watchers of a name and removes it
when any of them ends, so that the others receive no more updates; and it waits for slow watchers.
Here each watcher has an event of its own.
"""

import asyncio
from collections.abc import Mapping, Sequence

import grpc
from google.protobuf import descriptor_pool, text_format
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_health.v1 import health_pb2 as pb
from grpc_reflection.v1alpha import reflection, reflection_pb2

# Supervisors and load balancers call these without a token. List needs one, because it names every
# model.
OPEN_METHODS = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})
REFLECTION_SERVICES = ("grpc.reflection.v1.ServerReflection", reflection.SERVICE_NAME)

_HEALTH_LIST = """
  message_type { name: "HealthListRequest" }
  message_type {
    name: "HealthListResponse"
    nested_type {
      name: "StatusesEntry"
      options { map_entry: true }
      field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
      field {
        name: "value" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE
        type_name: ".grpc.health.v1.HealthCheckResponse"
      }
    }
    field {
      name: "statuses" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE
      type_name: ".grpc.health.v1.HealthListResponse.StatusesEntry"
    }
  }
"""
_HEALTH_LIST_METHOD = """
  name: "List"
  input_type: ".grpc.health.v1.HealthListRequest"
  output_type: ".grpc.health.v1.HealthListResponse"
"""


def _health_file() -> FileDescriptorProto:
    file = _proto_of(health_pb2.DESCRIPTOR)
    (service,) = file.service
    if all(method.name != "List" for method in service.method):
        text_format.Merge(_HEALTH_LIST, file)
        text_format.Merge(_HEALTH_LIST_METHOD, service.method.add())
    return file


def _reflection_v1_file() -> FileDescriptorProto:
    # The two versions differ only in the package's name.
    text = text_format.MessageToString(_proto_of(reflection_pb2.DESCRIPTOR))
    return text_format.Parse(text.replace("v1alpha", "v1"), FileDescriptorProto())


def _proto_of(file: FileDescriptor) -> FileDescriptorProto:
    proto = FileDescriptorProto()
    file.CopyToProto(proto)
    return proto


def _standard_pool() -> DescriptorPool:
    pool = DescriptorPool()
    for file in (_health_file(), _reflection_v1_file(), _proto_of(reflection_pb2.DESCRIPTOR)):
        pool.AddSerializedFile(file.SerializeToString())
    return pool


HEALTH = _standard_pool().FindServiceByName("grpc.health.v1.Health")


def reflection_handlers(services: Sequence[str]) -> list[grpc.GenericRpcHandler]:
    """Return the handlers of grpc.reflection v1 and v1alpha.

    Args:
        services: Full names of the services to list, beside those of reflection.
    """
    pool = _standard_pool()
    for name in services:
        if name != HEALTH.full_name:
            _add_with_dependencies(pool, descriptor_pool.Default().FindServiceByName(name).file)
    servicer = reflection.aio.ReflectionServicer((*services, *REFLECTION_SERVICES), pool)
    # The messages of both versions are the same on the wire.
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return [
        grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": method})
        for name in REFLECTION_SERVICES
    ]


def _add_with_dependencies(pool: DescriptorPool, file: FileDescriptor) -> None:
    for dependency in file.dependencies:
        _add_with_dependencies(pool, dependency)
    pool.AddSerializedFile(file.serialized_pb)


SERVING = pb.HealthCheckResponse.SERVING
NOT_SERVING = pb.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = pb.HealthCheckResponse.SERVICE_UNKNOWN
# The empty name stands for the whole server.
WHOLE_SERVER = ""

_CheckReply = GetMessageClass(HEALTH.methods_by_name["Check"].output_type)
_ListReply = GetMessageClass(HEALTH.methods_by_name["List"].output_type)


class HealthServicer:
    """Answers Check, List and Watch; the whole server is NOT_SERVING at first."""

    def __init__(self) -> None:
        self._states: dict[str, int] = {WHOLE_SERVER: NOT_SERVING}
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._closed = False

    def update(self, serving: Mapping[str, bool]) -> None:
        """Set which names are served, and notify the watchers of those that changed.

        Args:
            serving: By name; the watchers of a name that is not in it receive SERVICE_UNKNOWN.
        """
        before = self._states
        self._states = {name: SERVING if yes else NOT_SERVING for name, yes in serving.items()}
        for name in {*before, *self._states}:
            if before.get(name) != self._states.get(name):
                self._notify(name)

    def close(self) -> None:
        """End all watches, which would otherwise block the server's stop."""
        self._closed = True
        for name in self._watchers:
            self._notify(name)

    async def Check(
        self,
        request: pb.HealthCheckRequest,
        context: grpc.aio.ServicerContext[pb.HealthCheckRequest, pb.HealthCheckResponse],
    ) -> Message:
        """Return the status of a name; NOT_FOUND for an unknown name."""
        state = self._states.get(request.service)
        if state is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service {request.service!r}")
        return _CheckReply(status=state)

    async def List(self, request: Message, context: object) -> Message:
        """Return the state of every name that Check knows."""
        statuses = {name: _CheckReply(status=state) for name, state in self._states.items()}
        return _ListReply(statuses=statuses)

    async def Watch(
        self,
        request: pb.HealthCheckRequest,
        context: grpc.aio.ServicerContext[pb.HealthCheckRequest, pb.HealthCheckResponse],
    ) -> None:
        """Send the status of a name at once and at each change, until caller or server ends."""
        changed = asyncio.Event()
        watchers = self._watchers.setdefault(request.service, set())
        watchers.add(changed)
        sent: int | None = None
        try:
            while True:
                changed.clear()
                state = self._states.get(request.service, SERVICE_UNKNOWN)
                if state != sent:
                    await context.write(_CheckReply(status=state))
                    sent = state
                elif self._closed:
                    return
                else:
                    await changed.wait()
        finally:
            watchers.discard(changed)
            if not watchers and self._watchers.get(request.service) is watchers:
                del self._watchers[request.service]

    def _notify(self, name: str) -> None:
        for changed in self._watchers.get(name, ()):
            changed.set()
