"""Servicers as handlers of gRPC methods.

The generated `add_…_to_server` wants every RPC of the service, and an object for each message.
Here a servicer offers the RPCs that it has methods for, some of them with bytes as messages.
"""

import inspect
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from convoy.server.protocol.calls import INFERENCE_METHODS

# By whether the caller and the server stream.
_HANDLERS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


@dataclass(frozen=True, slots=True)
class Method:
    """A handler as the endpoint calls it.

    Attributes:
        name: Of the RPC, as metrics show it.
        requests_stream: Whether the caller sends any number of messages.
        replies_stream: Whether the server does.
        behavior: Takes a request, or an asynchronous iterator of requests, and the context;
            returns an awaitable reply or, where replies stream, an asynchronous iterator of them.
        deserialize: Turns bytes into a request; None passes the bytes on.
        serialize: Turns a reply into bytes; None if it is bytes.
        carries_images: Whether a message may be as large as the images of a request.
    """

    name: str
    requests_stream: bool
    replies_stream: bool
    behavior: Callable[[Any, Any], Any]
    deserialize: Callable[[bytes], Any] | None = None
    serialize: Callable[[Any], bytes] | None = None
    carries_images: bool = False

    def serialized(self, message: Any) -> bytes:
        """Return a reply as it is sent."""
        data: bytes = message if self.serialize is None else self.serialize(message)
        return data


def method_name(path: str) -> str:
    """Return the RPC's name in "/package.Service/Method"."""
    return path.rpartition("/")[2]


def _never(request: object, context: object) -> None:
    raise NotImplementedError


# The name under which calls to unknown methods are counted.
UNKNOWN_METHOD = Method("unknown", False, False, _never)


class _Details(grpc.HandlerCallDetails):  # type: ignore[misc]  # grpcio is untyped
    def __init__(self, path: str) -> None:
        self.method = path
        self.invocation_metadata = ()


def find_method(handlers: Iterable[grpc.GenericRpcHandler], path: str) -> Method | None:
    """Return the handler of a path, "/package.Service/Method"; None if there is none."""
    for each in handlers:
        handler = each.service(_Details(path))
        if handler is not None:
            return _method(path, handler)
    return None


def handler_of(
    service: ServiceDescriptor, servicer: object, as_bytes: Collection[str] = ()
) -> grpc.GenericRpcHandler:
    """Return a handler for `add_generic_rpc_handlers`; other RPCs are answered UNIMPLEMENTED.

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


def inside(
    handler: Any, enter: Callable[[Any], AbstractContextManager[object]]
) -> "grpc.RpcMethodHandler[Any, Any]":
    """Return a handler that runs another one inside a context manager.

    Args:
        handler: A `grpc.RpcMethodHandler`.
        enter: Takes the call's context and returns the context manager.
    """
    kind = (handler.request_streaming, handler.response_streaming)
    behavior = _behavior(handler)

    async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
        with enter(context):
            async for reply in behavior(request, context):
                yield reply

    async def answer(request: Any, context: Any) -> Any:
        with enter(context):
            return await behavior(request, context)

    return _HANDLERS[kind](
        generate if inspect.isasyncgenfunction(behavior) else answer,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


def _behavior(handler: Any) -> Callable[[Any, Any], Any]:
    behaviors = {
        (False, False): handler.unary_unary,
        (False, True): handler.unary_stream,
        (True, False): handler.stream_unary,
        (True, True): handler.stream_stream,
    }
    behavior: Callable[[Any, Any], Any] = behaviors[
        handler.request_streaming, handler.response_streaming
    ]
    return behavior


def _method(path: str, handler: Any) -> Method:
    name = method_name(path)
    return Method(
        name,
        handler.request_streaming,
        handler.response_streaming,
        _behavior(handler),
        handler.request_deserializer,
        handler.response_serializer,
        name in INFERENCE_METHODS,
    )


def _method_handler(
    method: MethodDescriptor, servicer: object, as_bytes: bool
) -> "grpc.RpcMethodHandler[Any, Any]":
    make = _HANDLERS[method.client_streaming, method.server_streaming]
    behavior = getattr(servicer, method.name)
    if as_bytes:
        return make(behavior)
    return make(
        behavior,
        request_deserializer=GetMessageClass(method.input_type).FromString,
        response_serializer=GetMessageClass(method.output_type).SerializeToString,
    )
