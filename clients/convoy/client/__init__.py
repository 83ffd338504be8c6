"""The client library of Convoy. It needs neither torch nor a model runtime nor server code.

Example:
    from convoy.client import Client

    with Client("127.0.0.1:8001") as client:
        print(client.classify("seven.png").best.label)

    client, aio               Client and AsyncClient
    connection                address, deadline, retries, TLS, token
    images, tensors, results  what calls take and return
    streams, pending          classify_many over one ClassifyStream call
    errors                    the exception tree
    batch                     batch jobs: many images to a table
    bench                     the load generator
    cli                       the command convoy-client
"""

from importlib.metadata import version as _version

from convoy.client.aio import AsyncClient
from convoy.client.client import Client
from convoy.client.connection import ConnectionOptions, RetryPolicy, Tls
from convoy.client.errors import (
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
from convoy.client.images import ImageLike
from convoy.client.results import (
    Classification,
    ClassScore,
    Health,
    Inference,
    ModelStatus,
    StageTimes,
)

__version__ = _version("convoy-serving")

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
    "__version__",
]
