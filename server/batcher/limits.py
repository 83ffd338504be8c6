"""What a batcher may hold, and what it holds at a moment."""

from dataclasses import dataclass

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class BatchingLimits:
    """What a batcher may hold.

    Attributes:
        max_batch_size: Images in one batch.
        max_queue_size: Images that may wait; a request beyond them is refused at once.
        max_queue_delay_s: How long a free instance waits for a batch to fill; 0 for not at all.
        instances: Threads that run batches side by side, on all devices together.
        max_queue_bytes: Bytes of pixels that may wait.
        max_request_images: Images that one request may bring; it is split over batches.
        max_client_share: Part of the queue, 0 to 1, that requests of one named client may hold.
        hang_timeout_s: A run on the device that takes longer is taken for dead.
        preferred_batch_size: Images in one batch while fewer wait than two of `max_batch_size` for
            every instance; None for no less than that.
    """

    max_batch_size: int
    max_queue_size: int
    max_queue_delay_s: float = 0.0
    instances: int = 1
    max_queue_bytes: int = 256 * _MIB
    max_request_images: int = 256
    max_client_share: float = 1.0
    hang_timeout_s: float = 60.0
    preferred_batch_size: int | None = None


@dataclass(frozen=True, slots=True)
class BatcherSnapshot:
    """What a batcher holds at a moment.

    Attributes:
        queued_images: Images that wait.
        queued_bytes: Bytes of their pixels.
        busy_instances: Instances that run a batch.
        max_batch_size: Images in one batch; falls when the device's memory did not suffice.
        healthy: False while a run on the device hangs.
        batch_latency_s: For each measured batch size the expected time of a run.
    """

    queued_images: int
    queued_bytes: int
    busy_instances: int
    max_batch_size: int
    healthy: bool
    batch_latency_s: dict[int, float]
