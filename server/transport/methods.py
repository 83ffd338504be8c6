"""What answers a call, as grpcio's handlers say it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

Convert = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Method:
    """A handler with what converts its messages; None leaves them as bytes.

    Attributes:
        behaviour: Takes a request, or an iterator of requests, and the call as its context;
            returns an awaitable reply or, where replies stream, an asynchronous iterator of them.
    """

    requests_stream: bool
    replies_stream: bool
    behaviour: Callable[[Any, Any], Any]
    deserialise: Convert | None = None
    serialise: Convert | None = None

    @classmethod
    def of(cls, handler: Any) -> "Method":
        """Returns what a `grpc.RpcMethodHandler` describes."""
        behaviours = {
            (False, False): handler.unary_unary,
            (False, True): handler.unary_stream,
            (True, False): handler.stream_unary,
            (True, True): handler.stream_stream,
        }
        kind = (handler.request_streaming, handler.response_streaming)
        return cls(
            *kind, behaviours[kind], handler.request_deserializer, handler.response_serializer
        )


async def _refuse(requests: object, context: Any) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")


async def _ask_for_token(requests: object, context: Any) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "authorization: expected a bearer token")


# They take a stream of requests so that the answer need not wait for one.
UNKNOWN_METHOD = Method(requests_stream=True, replies_stream=False, behaviour=_refuse)
UNAUTHENTICATED = Method(requests_stream=True, replies_stream=False, behaviour=_ask_for_token)
