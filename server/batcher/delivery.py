"""Brings what came of a batch to those who asked, and tells of it."""

from collections.abc import Callable, Iterable

from server.batcher.answers import Answers
from server.batcher.instance import BatchResult
from server.batcher.observer import BatchObserver, BatchReport
from server.errors import InferenceError, RequestError
from server.requests import Batch, InferenceRequest, Outcome, Outputs, Part


class Delivery:
    """Ends requests, with rows or with an error; belongs to the event loop.

    Args:
        observer: Is told what happened.
        withdraw: Takes out of the queue what still waits of a request that failed.
    """

    def __init__(
        self, observer: BatchObserver, withdraw: Callable[[InferenceRequest], None]
    ) -> None:
        self._observer = observer
        self._withdraw = withdraw
        self._answers = Answers()

    def deliver(self, batch: Batch, result: BatchResult, now_s: float) -> None:
        """Ends the requests of a batch that came back from the device."""
        for piece in result.pieces:
            if isinstance(piece.result, Outputs):
                self._answer(batch, piece.parts, piece.result, result.padded_images, now_s)
            else:
                self._fail(piece.parts[0].request, piece.result)
        errors = [piece.result for piece in result.pieces if isinstance(piece.result, Exception)]
        if errors:
            self._observer.batch_failed(errors[0])

    def refuse(
        self,
        requests: Iterable[InferenceRequest],
        outcome: Outcome,
        error: Callable[[], RequestError],
    ) -> None:
        """Ends accepted requests that will not be run; each gets an error of its own."""
        for request in requests:
            if self._answers.fail(request, error()):
                self._observer.request_refused(outcome)

    def forget(self, request: InferenceRequest) -> None:
        """Drops a request whose caller left."""
        self._withdraw(request)
        self._answers.forget(request)
        self._observer.request_refused(Outcome.CANCELLED)

    def _answer(
        self,
        batch: Batch,
        parts: tuple[Part, ...],
        outputs: Outputs,
        padded_images: int,
        now_s: float,
    ) -> None:
        end = answered = wasted = 0
        for part in parts:
            start, end = end, end + part.size
            wasted += part.size if part.request.future.done() else 0
            if self._answers.give(part, outputs.rows(start, end), batch, now_s):
                answered += 1
        self._observer.batch_finished(
            BatchReport(
                size=end,
                padded_images=padded_images,
                wasted_images=wasted,
                outputs=outputs,
                queue_s=tuple(batch.sealed_at_s - part.request.enqueued_at_s for part in parts),
                answered=answered,
                inference_s=now_s - batch.sealed_at_s,
                predicted_s=batch.predicted_s,
            )
        )

    def _fail(self, request: InferenceRequest, error: Exception) -> None:
        failure = InferenceError("the model failed on this request")
        failure.__cause__ = error
        self._withdraw(request)
        self._answers.fail(request, failure)
