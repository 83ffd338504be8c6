"""Lets a batcher report to several observers."""

from server.batcher import BatchObserver, BatchReport
from server.requests import Outcome


class BatchObservers:
    """Tells each of its observers, in their order, what a batcher did."""

    def __init__(self, *observers: BatchObserver) -> None:
        self._observers = observers

    def batch_finished(self, report: BatchReport) -> None:
        """A batch was run; its requests were answered."""
        for observer in self._observers:
            observer.batch_finished(report)

    def batch_failed(self, error: Exception) -> None:
        """The model failed on a batch, or in the end on some of its requests only."""
        for observer in self._observers:
            observer.batch_failed(error)

    def request_refused(self, outcome: Outcome) -> None:
        """A request was refused on arrival, given up in the queue, or left by its caller."""
        for observer in self._observers:
            observer.request_refused(outcome)
