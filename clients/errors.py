"""What this package raises.

    ClientError
    ├── UsageError             an argument, an option or an environment variable is wrong
    ├── LifetimeError          the client was closed, or made before a fork
    ├── ImageError             a picture cannot be sent: missing file, wrong array
    ├── TensorError            an array or a reply is no tensor of the protocol
    └── ServerError            the server answered with a status that is not OK
        ├── InvalidRequestError   INVALID_ARGUMENT: an image or a field is wrong
        │   └── MessageTooLargeError  the request or the reply is over a message limit
        ├── ModelNotFoundError    NOT_FOUND: no such model or version
        ├── AccessError           UNAUTHENTICATED, PERMISSION_DENIED: no or not the right token
        ├── UnsupportedError      UNIMPLEMENTED: the server has no such call
        ├── OverloadedError       RESOURCE_EXHAUSTED: the queue is full; try again later
        ├── DeadlineExceededError DEADLINE_EXCEEDED: no answer in the time given
        ├── UnavailableError      UNAVAILABLE: not reachable, starting or draining
        └── InferenceError        anything else: the server's own fault

Messages are one line and start with nothing but the cause. `clients.batch` and `clients.bench` add
an error of their own for what they alone do.
"""

import grpc


class ClientError(Exception):
    """Base of everything this package raises on purpose."""


class UsageError(ClientError):
    """An argument, an option or an environment variable is wrong."""


class LifetimeError(ClientError):
    """The client was closed, or was made before the process forked."""


class ImageError(ClientError):
    """A picture cannot be sent."""


class TensorError(ClientError):
    """An array or a reply is no tensor of the Open Inference Protocol."""


class ServerError(ClientError):
    """The server answered with a status that is not OK."""


class InvalidRequestError(ServerError):
    """An image or a field is wrong; sending it again will not help."""


class MessageTooLargeError(InvalidRequestError):
    """The request, or its reply, is larger than one side accepts."""


class ModelNotFoundError(ServerError):
    """The server serves no such model or version."""


class AccessError(ServerError):
    """The server wants a token or a certificate, or another one."""


class UnsupportedError(ServerError):
    """The server does not know this call."""


class OverloadedError(ServerError):
    """The server's queue is full; it may be tried again after a while."""


class DeadlineExceededError(ServerError):
    """No answer came in the time given."""


class UnavailableError(ServerError):
    """The server cannot be reached, starts, or drains."""


class InferenceError(ServerError):
    """The server failed; its log explains the id in the message."""


_ERROR_OF = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: ModelNotFoundError,
    grpc.StatusCode.UNAUTHENTICATED: AccessError,
    grpc.StatusCode.PERMISSION_DENIED: AccessError,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
}
# gRPC itself says RESOURCE_EXHAUSTED for this too; unlike a full queue it never passes.
_OVER_A_MESSAGE_LIMIT = "message larger than max"


def from_rpc_error(error: grpc.RpcError) -> ServerError:
    """Returns the error for a call that did not end with OK."""
    return from_status(error.code(), error.details() or "")


def from_status(code: grpc.StatusCode, details: str) -> ServerError:
    """Returns the error for a status that is not OK."""
    message = " ".join((details or code.name).split())
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and _OVER_A_MESSAGE_LIMIT in message:
        return MessageTooLargeError(message)
    return _ERROR_OF.get(code, InferenceError)(message)
