"""What a batcher reports of its work."""

from dataclasses import dataclass
from typing import Protocol

from server.requests import Outcome, Outputs


@dataclass(frozen=True, slots=True)
class BatchReport:
    """A batch that came back from the device.

    Attributes:
        size: Images in it.
        padded_images: Rows that were added to reach a batch size the device was warmed for.
        wasted_images: Images whose caller had left by the time their rows came.
        outputs: Its rows, of all `size` images.
        queue_s: For each part of a request in it, how long it waited.
        answered: Requests that got their answer with this batch.
        inference_s: From sealing the batch until it came back.
        predicted_s: What that was expected to take; 0 before anything was measured.
    """

    size: int
    padded_images: int
    wasted_images: int
    outputs: Outputs
    queue_s: tuple[float, ...]
    answered: int
    inference_s: float
    predicted_s: float


class BatchObserver(Protocol):
    """Is told what a batcher did; called on the event loop, never once per image.

    What a batcher holds at a moment is not told but asked for: `DynamicBatcher.snapshot`.
    """

    def batch_finished(self, report: BatchReport) -> None:
        """A batch was run; its requests were answered."""

    def batch_failed(self, error: Exception) -> None:
        """The model failed on a batch, or in the end on some of its requests only."""

    def request_refused(self, outcome: Outcome) -> None:
        """A request was refused on arrival, given up in the queue, or left by its caller."""
