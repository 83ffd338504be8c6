"""What batches tell: the observer that every batcher reports to."""

from collections.abc import Callable

from server.batcher import BatcherSnapshot, BatchingLimits, BatchReport
from server.manifest import Manifest
from server.metrics import DURATION_BUCKETS_S, VersionFamilies
from server.prediction_metrics import PredictionFamilies
from server.requests import Outcome

BATCH_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# A batch that ran faster than predicted is below zero.
ERROR_BUCKETS_S = (
    *(-0.1, -0.025, -0.01, -0.005, -0.0025, -0.001, -0.0005, 0.0),
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1),
)


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
        self.error = families.histogram(
            "convoy_predicted_minus_actual_batch_seconds",
            "Time that was predicted for a batch, less what it took.",
            ERROR_BUCKETS_S,
        )
        self.batch_size = families.histogram(
            "convoy_batch_size_images", "Images in a batch.", BATCH_SIZE_BUCKETS
        )
        self.padded = families.counter(
            "convoy_padded_images_total", "Images run beyond the requests' own, to fill a bucket."
        )
        self.wasted = families.counter(
            "convoy_wasted_images_total", "Images run whose caller had left by the end."
        )
        self.failed = families.counter(
            "convoy_failed_batches_total", "Batches, or halves of one, that the model failed on."
        )
        self.queued = families.gauge("convoy_queued_images", "Images that wait for a batch.")
        self.queued_bytes = families.gauge("convoy_queued_bytes", "Bytes of pixels that wait.")
        self.queue_limit = families.gauge("convoy_queue_limit_images", "Images that may wait.")
        self.instances = families.gauge("convoy_instances", "Threads that run batches.")
        self.busy = families.gauge("convoy_instances_busy", "Threads that run a batch.")
        self.predictions = PredictionFamilies()
        families.adopt(self.predictions)

    def observer(self, manifest: Manifest, limits: BatchingLimits) -> "BatchMetrics":
        """Returns the observer for the batcher of one version."""
        return BatchMetrics(self, manifest, limits)


class BatchMetrics:
    """One version's share of the metrics; resolves the labels once."""

    def __init__(self, families: BatchFamilies, manifest: Manifest, limits: BatchingLimits) -> None:
        labels = (manifest.name, str(manifest.version))
        self._queue = families.queue.labels(*labels)
        self._inference = families.inference.labels(*labels)
        self._error = families.error.labels(*labels)
        self._batch_size = families.batch_size.labels(*labels)
        self._padded = families.padded.labels(*labels)
        self._wasted = families.wasted.labels(*labels)
        self._failed = families.failed.labels(*labels)
        self._predictions = families.predictions.predictions(*labels, manifest.labels)
        self._families = families
        self._labels = labels
        families.queue_limit.labels(*labels).set(limits.max_queue_size)
        families.instances.labels(*labels).set(limits.instances)

    def follow(self, snapshot: Callable[[], BatcherSnapshot]) -> None:
        """Shows what the batcher holds whenever somebody looks."""
        families, labels = self._families, self._labels
        families.queued.labels(*labels).set_function(lambda: snapshot().queued_images)
        families.queued_bytes.labels(*labels).set_function(lambda: snapshot().queued_bytes)
        families.busy.labels(*labels).set_function(lambda: snapshot().busy_instances)

    def batch_finished(self, report: BatchReport) -> None:
        """A batch was run and its requests were answered."""
        self._inference.observe(report.inference_s)
        if report.predicted_s:
            self._error.observe(report.predicted_s - report.inference_s)
        self._batch_size.observe(report.size)
        for queue_s in report.queue_s:
            self._queue.observe(queue_s)
        if report.padded_images:
            self._padded.inc(report.padded_images)
        if report.wasted_images:
            self._wasted.inc(report.wasted_images)
        self._predictions.add(report.outputs.probabilities)

    def batch_failed(self, error: Exception) -> None:
        """The model failed on a batch, or on a part of one."""
        self._failed.inc()

    def request_refused(self, outcome: Outcome) -> None:
        """The protocols count outcomes, once for each call."""
