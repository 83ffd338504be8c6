"""The domain's types: what travels from a protocol through the batcher to a backend and back."""

import asyncio
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]  # [N, H, W, 3] RGB
Scores = NDArray[np.float32]  # [N, K]


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
        """Returns copies of some rows, which do not keep the whole batch alive."""
        return Outputs(self.logits[start:stop].copy(), self.probabilities[start:stop].copy())


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to one request.

    Attributes:
        outputs: The rows of this request, in the order of its images.
        queue_s: From entering the queue until the batch was sealed.
        inference_s: The batch's run on the device, transfers included.
        batch_size: Images in that batch.
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
    """

    images: Images
    future: asyncio.Future[Prediction]
    enqueued_at_s: float
    deadline_s: float

    @property
    def size(self) -> int:
        """Number of images."""
        return len(self.images)


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that are run together.

    Attributes:
        requests: Oldest first.
        sealed_at_s: On the batcher's clock.
    """

    requests: tuple[InferenceRequest, ...]
    sealed_at_s: float

    @property
    def size(self) -> int:
        """Number of images."""
        return sum(request.size for request in self.requests)
