"""Gives every request its rows, once, whether they come from one batch or from several."""

from dataclasses import dataclass, field

from server.requests import Batch, InferenceRequest, Outputs, Part, Prediction


@dataclass(slots=True)
class _Collected:
    """Rows of a request that came from more than one run."""

    sealed_at_s: float
    rows: list[tuple[int, Outputs]] = field(default_factory=list)
    images: int = 0
    largest_batch: int = 0


class Answers:
    """Resolves futures; belongs to the event loop."""

    def __init__(self) -> None:
        self._collected: dict[InferenceRequest, _Collected] = {}

    def give(self, part: Part, rows: Outputs, batch: Batch, now_s: float) -> bool:
        """Takes the rows of a part; returns whether the request was answered with them."""
        request = part.request
        if request.future.done():
            self._collected.pop(request, None)
            return False
        if part.size == request.size:
            prediction = Prediction(
                rows,
                batch.sealed_at_s - request.enqueued_at_s,
                now_s - batch.sealed_at_s,
                batch.size,
            )
            request.future.set_result(prediction)
            return True
        return self._collect(part, rows, batch, now_s)

    def fail(self, request: InferenceRequest, error: Exception) -> bool:
        """Ends a request with an error; returns whether it had no answer yet."""
        self._collected.pop(request, None)
        if request.future.done():
            return False
        request.future.set_exception(error)
        return True

    def forget(self, request: InferenceRequest) -> None:
        """Drops what was collected for a request whose caller left."""
        self._collected.pop(request, None)

    def _collect(self, part: Part, rows: Outputs, batch: Batch, now_s: float) -> bool:
        request = part.request
        collected = self._collected.setdefault(request, _Collected(batch.sealed_at_s))
        collected.sealed_at_s = min(collected.sealed_at_s, batch.sealed_at_s)
        collected.rows.append((part.start, rows))
        collected.images += part.size
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
