"""The types of an inference that protocols, batcher and backends share."""

from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]  # [N, H, W, 3] RGB
Scores = NDArray[np.float32]  # [N, K]


class Outcome(Enum):
    """How an inference request ended; the values are the label `reason` of metrics."""

    OK = "ok"
    FULL = "full"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    INVALID = "invalid"
    UNAVAILABLE = "unavailable"
    BACKEND = "backend"


@dataclass(frozen=True, slots=True)
class Outputs:
    """The outputs of a model for N images.

    Attributes:
        logits: `[N, K]`.
        probabilities: `[N, K]`; each row sums to 1.
    """

    logits: Scores
    probabilities: Scores

    def rows(self, start: int, stop: int) -> "Outputs":
        """Return views of some rows."""
        return Outputs(self.logits[start:stop], self.probabilities[start:stop])

    def copy(self) -> "Outputs":
        """Return a copy, which stays valid when a buffer is reused."""
        return Outputs(self.logits.copy(), self.probabilities.copy())

    @staticmethod
    def join(outputs: "list[Outputs]") -> "Outputs":
        """Concatenate the rows of several outputs, in the order given."""
        return Outputs(
            np.concatenate([each.logits for each in outputs]),
            np.concatenate([each.probabilities for each in outputs]),
        )


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to one request.

    Attributes:
        outputs: The rows of this request, in the order of its images.
        queue_s: From the arrival in the queue until its (first) batch was sealed.
        inference_s: From then until the outputs of its (last) batch were ready, copies included.
        batch_size: Images in the batch; the largest of them where the request was split.
    """

    outputs: Outputs
    queue_s: float
    inference_s: float
    batch_size: int
