"""What batches tell: the observer that every batcher reports to."""

from server.manifest import Manifest
from server.metrics import DURATION_BUCKETS_S, VersionFamilies
from server.requests import Batch

BATCH_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class BatchFamilies:
    """The metrics of batches, by model and version."""

    def __init__(self, families: VersionFamilies) -> None:
        self.queue = families.histogram(
            "convoy_queue_duration_seconds",
            "Time a request waited for its batch.",
            DURATION_BUCKETS_S,
        )
        self.inference = families.histogram(
            "convoy_inference_duration_seconds",
            "Time a batch took on the device, transfers included.",
            DURATION_BUCKETS_S,
        )
        self.batch_size = families.histogram(
            "convoy_batch_size_images", "Images in a batch.", BATCH_SIZE_BUCKETS
        )
        self.queued = families.gauge("convoy_queued_images", "Images that wait for a batch.")
        self.failed = families.counter(
            "convoy_failed_batches_total", "Batches that the model failed on."
        )

    def observer(self, manifest: Manifest) -> "BatchMetrics":
        """Returns the observer for the batcher of one version."""
        return BatchMetrics(self, manifest.name, str(manifest.version))


class BatchMetrics:
    """One version's share of the metrics; resolves the labels once."""

    def __init__(self, families: BatchFamilies, model: str, version: str) -> None:
        self._queue = families.queue.labels(model, version)
        self._inference = families.inference.labels(model, version)
        self._batch_size = families.batch_size.labels(model, version)
        self._queued = families.queued.labels(model, version)
        self._failed = families.failed.labels(model, version)

    def batch_finished(self, batch: Batch, inference_s: float) -> None:
        """A batch was run and its requests were answered."""
        self._inference.observe(inference_s)
        self._batch_size.observe(batch.size)
        for request in batch.requests:
            self._queue.observe(batch.sealed_at_s - request.enqueued_at_s)

    def batch_failed(self) -> None:
        """The model failed on a batch."""
        self._failed.inc()

    def queue_changed(self, images: int) -> None:
        """So many images wait now."""
        self._queued.set(images)
