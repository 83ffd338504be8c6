"""The client library of Convoy; needs no torch, no runtime and no server code.

Example:
    from clients import Client

    with Client("127.0.0.1:8001") as client:
        print(client.classify("seven.png").best.label)
"""

from clients.aio import AsyncClient
from clients.client import Client
from clients.connection import ConnectionOptions, RetryPolicy, Tls
from clients.errors import (
    AccessError,
    ClientError,
    DeadlineExceededError,
    ImageError,
    InferenceError,
    InvalidRequestError,
    LifetimeError,
    MessageTooLargeError,
    ModelNotFoundError,
    OverloadedError,
    ServerError,
    TensorError,
    UnavailableError,
    UnsupportedError,
    UsageError,
)
from clients.images import ImageLike
from clients.results import (
    Classification,
    ClassScore,
    Health,
    Inference,
    ModelStatus,
    StageTimes,
)

__all__ = [
    "AccessError",
    "AsyncClient",
    "ClassScore",
    "Classification",
    "Client",
    "ClientError",
    "ConnectionOptions",
    "DeadlineExceededError",
    "Health",
    "ImageError",
    "ImageLike",
    "Inference",
    "InferenceError",
    "InvalidRequestError",
    "LifetimeError",
    "MessageTooLargeError",
    "ModelNotFoundError",
    "ModelStatus",
    "OverloadedError",
    "RetryPolicy",
    "ServerError",
    "StageTimes",
    "TensorError",
    "Tls",
    "UnavailableError",
    "UnsupportedError",
    "UsageError",
]
