"""Counts and times of one model version since it went into service."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from server.batcher import BatchReport
from server.requests import Outcome

_NS_PER_S = 1_000_000_000
_MS_PER_S = 1000
# Refused or given up, which is a failure to whoever asked; a caller who left asked no more.
_FAILURES = frozenset(Outcome) - {Outcome.OK, Outcome.CANCELLED}


@dataclass(slots=True)
class Durations:
    """How often something happened, and how long it took in all."""

    count: int = 0
    total_ns: int = 0

    def add(self, duration_s: float, count: int = 1) -> None:
        """Counts so many, which took so long together."""
        self.count += count
        self.total_ns += int(duration_s * _NS_PER_S)


@dataclass(slots=True)
class ModelStatistics:
    """What a batcher did; one of its observers, so it belongs to the event loop.

    Attributes:
        images: Answered.
        batches: Run.
        last_inference_ms: Since 1970; 0 before the first batch.
        success: Requests answered, from the queue's entrance until their answer.
        failure: Requests refused, given up or failed on; their times are not known.
        queue: Requests, from the queue's entrance until their batch was sealed.
        inference: Requests, from there until the batch came back.
        by_batch_size: Batches by their images.
    """

    clock: Callable[[], float] = time.time
    images: int = 0
    batches: int = 0
    last_inference_ms: int = 0
    success: Durations = field(default_factory=Durations)
    failure: Durations = field(default_factory=Durations)
    queue: Durations = field(default_factory=Durations)
    inference: Durations = field(default_factory=Durations)
    by_batch_size: dict[int, Durations] = field(default_factory=dict)

    async def read(self) -> "ModelStatistics":
        """Returns itself; a front end's request for it takes a while."""
        return self

    def batch_finished(self, report: BatchReport) -> None:
        """A batch was run; its requests were answered."""
        parts = len(report.queue_s)
        queue_s = sum(report.queue_s)
        self.images += report.size - report.wasted_images
        self.batches += 1
        self.last_inference_ms = int(self.clock() * _MS_PER_S)
        self.success.add(queue_s + report.inference_s * parts, report.answered)
        self.queue.add(queue_s, parts)
        self.inference.add(report.inference_s * parts, parts)
        self.by_batch_size.setdefault(report.size, Durations()).add(report.inference_s)

    def batch_failed(self, error: Exception) -> None:
        """The model failed on a batch, or in the end on some of its requests only."""
        self.failure.add(0.0)

    def request_refused(self, outcome: Outcome) -> None:
        """A request was refused on arrival, given up in the queue, or left by its caller."""
        if outcome in _FAILURES:
            self.failure.add(0.0)
