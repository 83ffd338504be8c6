"""A request in the batcher, the slices it is split into, and the batches that these form."""

import asyncio
from dataclasses import dataclass

from convoy.server.requests import Images, Prediction


class InferenceRequest:
    """Images that wait for a batch, with the future of their prediction.

    Args:
        images: `[N, H, W, 3]` uint8, of the model's size.
        future: The batcher resolves it on the event loop, once; a caller that cancels its request
            cancels the future.
        enqueued_at_s: On the batcher's clock.
        deadline_s: On the batcher's clock; infinity without one.
        priority: 1 is the highest, 0 stands for the default level.
        client: Identifies the caller, whose share of the queue is limited; empty if unknown.

    Attributes:
        size: Number of images.
        waiting: Number of images that are not in a batch yet.
    """

    __slots__ = (
        "client",
        "deadline_s",
        "enqueued_at_s",
        "future",
        "images",
        "priority",
        "size",
        "waiting",
    )

    def __init__(  # noqa: PLR0917  # built once for each request: keywords would cost time
        self,
        images: Images,
        future: asyncio.Future[Prediction],
        enqueued_at_s: float,
        deadline_s: float = float("inf"),
        priority: int = 0,
        client: str = "",
    ) -> None:
        self.images = images
        self.future = future
        self.enqueued_at_s = enqueued_at_s
        self.deadline_s = deadline_s
        self.priority = priority
        self.client = client
        self.size = self.waiting = len(images)


@dataclass(frozen=True, slots=True)
class RequestSlice:
    """Images `start` to `stop` of a request, which run in one batch; mostly the whole request."""

    request: InferenceRequest
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of images."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Batch:
    """Slices of requests that run together.

    Attributes:
        slices: In the order of their rows.
        size: Number of images in all of them.
        sealed_at_s: On the batcher's clock.
        predicted_s: The predicted duration of the run.
        under_load: Whether every worker is busy while it runs, at least at first.
    """

    slices: tuple[RequestSlice, ...]
    size: int
    sealed_at_s: float
    predicted_s: float = 0.0
    under_load: bool = False
