"""The exceptions of this package.

    ClientError
    ├── UsageError             an argument, an option or an environment variable is wrong
    ├── LifetimeError          the client was closed, or created before a fork
    ├── ImageError             an image cannot be sent: missing file, wrong type or array
    ├── TensorError            an array or a reply is not a tensor of the protocol
    └── ServerError            the server answered with a status other than OK, in `code`
        ├── InvalidRequestError   INVALID_ARGUMENT: an image or a field is wrong
        │   └── MessageTooLargeError  the request or the reply is over a message limit
        ├── ModelNotFoundError    NOT_FOUND: no such model or version
        ├── AccessError           UNAUTHENTICATED, PERMISSION_DENIED: a missing or wrong token
        ├── UnsupportedError      UNIMPLEMENTED: the server has no such call
        ├── OverloadedError       RESOURCE_EXHAUSTED: the queue is full; try again later
        ├── DeadlineExceededError DEADLINE_EXCEEDED: no answer within the deadline
        ├── UnavailableError      UNAVAILABLE: not reachable, starting or draining
        └── InferenceError        anything else: the server failed

A message is one line. `batch` and `bench` derive errors of their own from ClientError.
"""

import grpc


class ClientError(Exception):
    """The base class of the exceptions of this package."""


class UsageError(ClientError):
    """An argument, an option or an environment variable is wrong."""


class LifetimeError(ClientError):
    """The client was closed, or created before the process forked."""


class ImageError(ClientError):
    """An image cannot be sent."""


class TensorError(ClientError):
    """An array or a reply is not a tensor of the Open Inference Protocol."""


class ServerError(ClientError):
    """The server answered with a status that is not OK.

    Args:
        message: The status message, on one line.
        code: The gRPC status.
        request_id: The id that the caller gave the request, if any.
    """

    def __init__(
        self,
        message: str,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.request_id = request_id


class InvalidRequestError(ServerError):
    """An image or a field is wrong; sending it again does not help."""


class MessageTooLargeError(InvalidRequestError):
    """The request, or its reply, is larger than one side accepts."""


class ModelNotFoundError(ServerError):
    """The server serves no such model or version."""


class AccessError(ServerError):
    """The server requires a token or a certificate, or rejected the given one."""


class UnsupportedError(ServerError):
    """The server does not implement this call."""


class OverloadedError(ServerError):
    """The server's queue is full; retry later."""


class DeadlineExceededError(ServerError):
    """No answer arrived within the deadline."""


class UnavailableError(ServerError):
    """The server cannot be reached, is starting, or is draining."""


class InferenceError(ServerError):
    """The server failed; its log has the details under the id in the message."""


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
# gRPC itself uses RESOURCE_EXHAUSTED for this too; unlike for a full queue, a retry cannot help.
_OVER_A_MESSAGE_LIMIT = "message larger than max"
STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}


def from_rpc_error(error: grpc.RpcError, request_id: str | None = None) -> ServerError:
    """Return the error for a call that did not end with OK."""
    return from_status(error.code(), error.details() or "", request_id)


def from_status(code: grpc.StatusCode, details: str, request_id: str | None = None) -> ServerError:
    """Return the error for a status that is not OK."""
    message = " ".join((details or code.name).split())
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and _OVER_A_MESSAGE_LIMIT in message:
        return MessageTooLargeError(message, code, request_id)
    return _ERROR_OF.get(code, InferenceError)(message, code, request_id)
