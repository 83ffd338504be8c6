"""The client library of Convoy; needs no torch, no runtime and no server code.

from clients import Client

with Client("127.0.0.1:8001") as client:
print(client.classify("seven.png").best.label)
"""

from clients.aio import AsyncClient
from clients.client import Client
from clients.errors import (
    ClientError,
    DeadlineExceededError,
    ImageError,
    InferenceError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    ServerError,
    UnavailableError,
)
from clients.images import ImageLike
from clients.results import Classification, ClassScore, ModelStatus, StageTimes

__all__ = [
    "AsyncClient",
    "ClassScore",
    "Classification",
    "Client",
    "ClientError",
    "DeadlineExceededError",
    "ImageError",
    "ImageLike",
    "InferenceError",
    "InvalidRequestError",
    "ModelNotFoundError",
    "ModelStatus",
    "OverloadedError",
    "ServerError",
    "StageTimes",
    "UnavailableError",
]
