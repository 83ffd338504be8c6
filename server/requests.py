"""The domain's types: what travels from a protocol through the batcher to a backend and back."""

import asyncio
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]  # [N, H, W, 3] RGB
Scores = NDArray[np.float32]  # [N, K]


class Outcome(Enum):
    """How a request for inference ended; the values are the label `reason` of metrics."""

    OK = "ok"
    FULL = "full"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    INVALID = "invalid"
    UNAVAILABLE = "unavailable"
    BACKEND = "backend"


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a backend returns for a batch.

    Attributes:
        logits: `[N, K]`.
        probabilities: `[N, K]`; each row sums to 1.
    """

    logits: Scores
    probabilities: Scores

    def rows(self, start: int, stop: int) -> "Outputs":
        """Returns views of some rows."""
        return Outputs(self.logits[start:stop], self.probabilities[start:stop])

    def copy(self) -> "Outputs":
        """Returns a copy, which does not change with a reused buffer."""
        return Outputs(self.logits.copy(), self.probabilities.copy())

    @staticmethod
    def join(parts: "list[Outputs]") -> "Outputs":
        """Puts parts below one another, in the order given."""
        return Outputs(
            np.concatenate([part.logits for part in parts]),
            np.concatenate([part.probabilities for part in parts]),
        )


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to one request.

    Attributes:
        outputs: The rows of this request, in the order of its images.
        queue_s: From entering the queue until its (first) batch was sealed.
        inference_s: From then until its (last) batch came back, transfers included.
        batch_size: Images in the batch; the largest of them where the request was split.
    """

    outputs: Outputs
    queue_s: float
    inference_s: float
    batch_size: int


@dataclass(slots=True, eq=False)
class InferenceRequest:
    """Images that wait for a batch, with the future that carries their answer.

    Attributes:
        images: `[N, H, W, 3]`, already of the model's size.
        future: Resolved on the event loop, once, by the batcher; cancelled by a caller who leaves.
        enqueued_at_s: On the batcher's clock.
        deadline_s: On the batcher's clock; infinity without one.
        priority: 1 is the highest, 0 stands for the default level.
        client: Who asks, for the share of the queue one client may hold; empty if unknown.
        taken: How many of its images were sealed into batches so far.
    """

    images: Images
    future: asyncio.Future[Prediction]
    enqueued_at_s: float
    deadline_s: float = float("inf")
    priority: int = 0
    client: str = ""
    taken: int = 0

    @property
    def size(self) -> int:
        """Number of images."""
        return len(self.images)

    @property
    def waiting(self) -> int:
        """Number of images that are not in a batch yet."""
        return len(self.images) - self.taken


@dataclass(frozen=True, slots=True)
class Part:
    """Images `start` to `stop` of a request, which share a batch; mostly the whole request."""

    request: InferenceRequest
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of images."""
        return self.stop - self.start

    @property
    def images(self) -> Images:
        """The images `[size, H, W, 3]`."""
        return self.request.images[self.start : self.stop]


@dataclass(frozen=True, slots=True)
class Batch:
    """Parts of requests that are run together.

    Attributes:
        parts: In the order of their rows.
        sealed_at_s: On the batcher's clock.
        predicted_s: How long the run was expected to take when the batch was sealed.
    """

    parts: tuple[Part, ...]
    sealed_at_s: float
    predicted_s: float = 0.0

    @property
    def size(self) -> int:
        """Number of images."""
        return sum(part.size for part in self.parts)
