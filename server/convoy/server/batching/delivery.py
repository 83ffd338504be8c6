"""Delivery: resolve each request's future once, with the rows of one batch or of several."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from convoy.server.batching.batch import Batch, InferenceRequest, RequestSlice
from convoy.server.batching.worker import BatchResult
from convoy.server.errors import InferenceError, RequestError
from convoy.server.requests import Outcome, Outputs, Prediction


@dataclass(frozen=True, slots=True)
class BatchReport:
    """A batch that was run.

    Attributes:
        size: Images in it.
        padded_images: Rows that were added to reach a batch size that the device was warmed up for.
        wasted_images: Images whose caller had cancelled before their rows were available.
        outputs: The rows of all `size` images.
        queue_s: For each slice of a request in it, how long it waited.
        answered: Requests that this batch completed.
        inference_s: From sealing the batch until its outputs were available.
        predicted_s: The predicted duration of that; 0 before anything was measured.
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
    """Receives the reports of a batcher, on the event loop, at most one for each request.

    `DynamicBatcher.snapshot` returns its current state.
    """

    def batch_finished(self, report: BatchReport) -> None:
        """Handle a batch that was run."""

    def batch_failed(self, error: Exception, requests: int) -> None:
        """Handle a batch that the model failed on, or finally only on some of its requests.

        Args:
            error: The first error.
            requests: How many requests failed with it.
        """

    def batch_did_not_fit(self) -> None:
        """Handle a batch that a device had no memory for; it ran in parts."""

    def request_rejected(self, outcome: Outcome) -> None:
        """Handle a request that was rejected on arrival, dropped from the queue, or cancelled."""


@dataclass(slots=True)
class _Collected:
    """The rows of a request that is split over several runs."""

    sealed_at_s: float
    rows: list[tuple[int, Outputs]] = field(default_factory=list)
    images: int = 0
    largest_batch: int = 0


class Delivery:
    """Answers requests with rows or with an error; belongs to the event loop.

    Args:
        observer: Receives reports on batches and requests.
    """

    def __init__(self, observer: BatchObserver) -> None:
        self._observer = observer
        self._collected: dict[InferenceRequest, _Collected] = {}

    def deliver(self, batch: Batch, result: BatchResult, now_s: float) -> list[InferenceRequest]:
        """Answer the requests of a batch that was run.

        Returns:
            The requests that failed; some of their images may still be queued.
        """
        failed: list[InferenceRequest] = []
        failures = 0
        error: Exception | None = None
        for run in result.runs:
            if isinstance(run.result, Outputs):
                self._answer(batch, run.slices, run.result, result.padded_images, now_s)
            else:
                error = error or run.result
                failed.append(run.slices[0].request)
                failures += self._fail(run.slices[0].request, _inference_error(run.result))
        if error:
            self._observer.batch_failed(error, failures)
        if result.largest_run is not None:
            self._observer.batch_did_not_fit()
        return failed

    def reject(
        self,
        requests: Iterable[InferenceRequest],
        outcome: Outcome,
        error: Callable[[], RequestError],
    ) -> None:
        """End accepted requests that will not run; each gets an error of its own."""
        for request in requests:
            if self._fail(request, error()):
                self._observer.request_rejected(outcome)

    def cancel(self, request: InferenceRequest) -> None:
        """Drop the rows of a request whose caller cancelled it."""
        self._collected.pop(request, None)
        self._observer.request_rejected(Outcome.CANCELLED)

    def _answer(
        self,
        batch: Batch,
        slices: tuple[RequestSlice, ...],
        outputs: Outputs,
        padded_images: int,
        now_s: float,
    ) -> None:
        end = answered = wasted = 0
        queue_s = []
        inference_s = now_s - batch.sealed_at_s
        for each in slices:
            request, size = each.request, each.stop - each.start
            start, end = end, end + size
            queue_s.append(batch.sealed_at_s - request.enqueued_at_s)
            if request.future.done():
                wasted += size
                self._collected.pop(request, None)
                continue
            rows = outputs if len(slices) == 1 else outputs.rows(start, end)
            if size == request.size:
                prediction = Prediction(rows, queue_s[-1], inference_s, batch.size)
                request.future.set_result(prediction)
                answered += 1
            elif self._collect(each, rows, batch, now_s):
                answered += 1
        self._observer.batch_finished(
            BatchReport(
                end,
                padded_images,
                wasted,
                outputs,
                tuple(queue_s),
                answered,
                inference_s,
                batch.predicted_s,
            )
        )

    def _collect(
        self, request_slice: RequestSlice, rows: Outputs, batch: Batch, now_s: float
    ) -> bool:
        """Keep the rows of a slice; return whether they completed the request."""
        request = request_slice.request
        collected = self._collected.setdefault(request, _Collected(batch.sealed_at_s))
        collected.sealed_at_s = min(collected.sealed_at_s, batch.sealed_at_s)
        collected.rows.append((request_slice.start, rows))
        collected.images += request_slice.size
        collected.largest_batch = max(collected.largest_batch, batch.size)
        if collected.images < request.size:
            return False
        del self._collected[request]
        ordered = [outputs for _, outputs in sorted(collected.rows, key=lambda row: row[0])]
        prediction = Prediction(
            Outputs.join(ordered),
            collected.sealed_at_s - request.enqueued_at_s,
            now_s - collected.sealed_at_s,
            collected.largest_batch,
        )
        request.future.set_result(prediction)
        return True

    def _fail(self, request: InferenceRequest, error: Exception) -> bool:
        """End a request with an error; return whether it had no answer yet."""
        self._collected.pop(request, None)
        if request.future.done():
            return False
        request.future.set_exception(error)
        return True


def _inference_error(cause: Exception) -> InferenceError:
    error = InferenceError("the model failed on this request")
    error.__cause__ = cause
    return error
