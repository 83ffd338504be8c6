"""Puts a servicer on a gRPC server by the service's descriptor.

The generated `add_…_to_server` wants every RPC of the service, and an object for each message.
Here a servicer offers the RPCs that it has methods for, and may take and return some as bytes.
"""

from collections.abc import Collection
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

# By whether the caller and the server stream.
_HANDLERS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def handler_of(
    service: ServiceDescriptor, servicer: object, as_bytes: Collection[str] = ()
) -> grpc.GenericRpcHandler:
    """Returns what `add_generic_rpc_handlers` takes; other RPCs are answered UNIMPLEMENTED.

    Args:
        service: The service's description.
        servicer: Has a method for each RPC that it answers.
        as_bytes: RPCs whose messages it takes and returns as they are on the wire.
    """
    handlers = {
        method.name: _method_handler(method, servicer, method.name in as_bytes)
        for method in service.methods
        if hasattr(servicer, method.name)
    }
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def _method_handler(
    method: MethodDescriptor, servicer: object, as_bytes: bool
) -> "grpc.RpcMethodHandler[Any, Any]":
    make = _HANDLERS[method.client_streaming, method.server_streaming]
    behaviour = getattr(servicer, method.name)
    if as_bytes:
        return make(behaviour)
    return make(
        behaviour,
        request_deserializer=GetMessageClass(method.input_type).FromString,
        response_serializer=GetMessageClass(method.output_type).SerializeToString,
    )
