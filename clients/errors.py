"""What this package raises.

    ClientError
    ├── ImageError             a picture cannot be sent: missing file, wrong array
    └── ServerError            the server answered with a status that is not OK
        ├── InvalidRequestError   INVALID_ARGUMENT: an image or a field is wrong
        ├── ModelNotFoundError    NOT_FOUND: no such model or version
        ├── OverloadedError       RESOURCE_EXHAUSTED: the queue is full; try again later
        ├── DeadlineExceededError DEADLINE_EXCEEDED: no answer in the time given
        ├── UnavailableError      UNAVAILABLE: not reachable, starting or draining
        └── InferenceError        anything else: the server's own fault

Messages are one line and start with nothing but the cause.
"""

import grpc


class ClientError(Exception):
    """Base of everything this package raises on purpose."""


class ImageError(ClientError):
    """A picture cannot be sent."""


class ServerError(ClientError):
    """The server answered with a status that is not OK."""


class InvalidRequestError(ServerError):
    """An image or a field is wrong; sending it again will not help."""


class ModelNotFoundError(ServerError):
    """The server serves no such model or version."""


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
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
}


def from_status(code: grpc.StatusCode, details: str | None) -> ServerError:
    """Returns the error for a status that a call ended with."""
    message = " ".join((details or code.name).split())
    return _ERROR_OF.get(code, InferenceError)(message)
