"""Every metric of the server, in one class over a registry that is passed in.

Durations are in seconds. Labels come from closed sets: the models in service, the RPCs, the gRPC
status codes; a name that a caller made up never becomes a label.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from server.backends import Backend
from server.manifest import Manifest
from server.requests import Batch

# 0.25 ms to 10 s: a small net on a warm server to a large one under overload.
DURATION_BUCKETS_S = (
    *(0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
BATCH_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
NO_MODEL = ("", "")


class ServerMetrics:
    """The server's metrics.

    Example:
        metrics = ServerMetrics(CollectorRegistry())
        metrics.request("Classify", "OK", ("digits", "1"), 0.004)
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        model = ["model", "version"]
        self._requests = Histogram(
            "convoy_request_duration_seconds",
            "From the arrival of a request until its reply, by outcome.",
            [*model, "method", "code"],
            buckets=DURATION_BUCKETS_S,
            registry=registry,
        )
        self._queue = Histogram(
            "convoy_queue_duration_seconds",
            "Time a request waited for its batch.",
            model,
            buckets=DURATION_BUCKETS_S,
            registry=registry,
        )
        self._inference = Histogram(
            "convoy_inference_duration_seconds",
            "Time a batch took on the device, transfers included.",
            model,
            buckets=DURATION_BUCKETS_S,
            registry=registry,
        )
        self._batch_size = Histogram(
            "convoy_batch_size_images",
            "Images in a batch.",
            model,
            buckets=BATCH_SIZE_BUCKETS,
            registry=registry,
        )
        self._queued = Gauge(
            "convoy_queued_images", "Images that wait for a batch.", model, registry=registry
        )
        self._failed = Counter(
            "convoy_failed_batches_total",
            "Batches that the model failed on.",
            model,
            registry=registry,
        )
        self._info = Gauge(
            "convoy_model_info",
            "1 for each version in service, with what really runs it.",
            [*model, "platform", "device", "provider"],
            registry=registry,
        )

    def request(self, method: str, code: str, model: tuple[str, str], duration_s: float) -> None:
        """Counts a finished RPC; model is (name, version), or NO_MODEL before one was found."""
        self._requests.labels(*model, method, code).observe(duration_s)

    def model_serves(self, manifest: Manifest, backend: Backend) -> None:
        """Names a version that went into service."""
        self._info.labels(
            *_labels(manifest), backend.platform, backend.device, backend.provider
        ).set(1)

    def batches_of(self, manifest: Manifest) -> "BatchMetrics":
        """Returns the observer for one model's batcher."""
        return BatchMetrics(self, manifest)


class BatchMetrics:
    """One model's share of the metrics; resolves the labels once."""

    def __init__(self, metrics: ServerMetrics, manifest: Manifest) -> None:
        labels = _labels(manifest)
        self._queue = metrics._queue.labels(*labels)
        self._inference = metrics._inference.labels(*labels)
        self._batch_size = metrics._batch_size.labels(*labels)
        self._queued = metrics._queued.labels(*labels)
        self._failed = metrics._failed.labels(*labels)

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


def _labels(manifest: Manifest) -> tuple[str, str]:
    return manifest.name, str(manifest.version)
