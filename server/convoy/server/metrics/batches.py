"""The metrics of batches and queues, and the observer that every batcher reports to."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from convoy.server.batching import (
    BatcherSnapshot,
    BatchingLimits,
    BatchObserver,
    BatchReport,
    Health,
)
from convoy.server.metrics.predictions import PredictionFamilies
from convoy.server.metrics.requests import DURATION_BUCKETS_S, VersionFamilies
from convoy.server.models.manifest import Manifest
from convoy.server.requests import Outcome

_NS_PER_S = 1_000_000_000
_MS_PER_S = 1000
# Outcomes that a caller sees as a failure; a caller that cancelled sees none.
_FAILURES = frozenset(Outcome) - {Outcome.OK, Outcome.CANCELLED}


@dataclass(slots=True)
class Durations:
    """A number of events and their total duration."""

    count: int = 0
    total_ns: int = 0


@dataclass(slots=True)
class ModelStatistics:
    """Counts the work of one batcher as its observer; belongs to the event loop.

    Attributes:
        images: Images answered.
        batches: Batches run.
        last_inference_ms: Unix time of the last batch; 0 before the first one.
        success: Requests answered, from their arrival in the queue until their answer.
        failure: Requests that were rejected, dropped or failed; their durations are not known.
        queue: Requests, from their arrival in the queue until their batch was sealed.
        inference: Requests, from then until the outputs of the batch were available.
        by_batch_size: Batches by their number of images.
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
        """Return the statistics; a front end has to wait for those of its owner."""
        return self

    def batch_finished(self, report: BatchReport) -> None:
        """Count a batch that was run."""
        slices = len(report.queue_s)
        batch_ns = int(report.inference_s * _NS_PER_S)
        queue_ns = int(sum(report.queue_s) * _NS_PER_S)
        self.images += report.size - report.wasted_images
        self.batches += 1
        self.last_inference_ms = int(self.clock() * _MS_PER_S)
        self.success.count += report.answered
        self.success.total_ns += queue_ns + batch_ns * slices
        self.queue.count += slices
        self.queue.total_ns += queue_ns
        self.inference.count += slices
        self.inference.total_ns += batch_ns * slices
        by_size = self.by_batch_size.get(report.size)
        if by_size is None:
            by_size = self.by_batch_size[report.size] = Durations()
        by_size.count += 1
        by_size.total_ns += batch_ns

    def batch_failed(self, error: Exception, requests: int) -> None:
        """Count the requests that the model failed on."""
        self.failure.count += requests

    def batch_did_not_fit(self) -> None:
        """Count nothing here: the requests of the batch are answered."""

    def request_rejected(self, outcome: Outcome) -> None:
        """Count a request that was rejected or dropped."""
        if outcome in _FAILURES:
            self.failure.count += 1


class BatchObservers:
    """Forwards the reports of a batcher to several observers, in their order."""

    def __init__(self, *observers: BatchObserver) -> None:
        self._observers = observers

    def batch_finished(self, report: BatchReport) -> None:
        """Forward a batch that was run."""
        for observer in self._observers:
            observer.batch_finished(report)

    def batch_failed(self, error: Exception, requests: int) -> None:
        """Forward a batch that the model failed on."""
        for observer in self._observers:
            observer.batch_failed(error, requests)

    def batch_did_not_fit(self) -> None:
        """Forward a batch that a device had no memory for."""
        for observer in self._observers:
            observer.batch_did_not_fit()

    def request_rejected(self, outcome: Outcome) -> None:
        """Forward a request that was rejected, dropped or cancelled."""
        for observer in self._observers:
            observer.request_rejected(outcome)


BATCH_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# Below zero the batch took longer than predicted.
ERROR_BUCKETS_S = (
    *(-0.1, -0.025, -0.01, -0.005, -0.0025, -0.001, -0.0005, 0.0),
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1),
)


class QueueCollector:
    """The gauges of each batcher, read at every scrape, by model and version.

    A `Gauge` with a function keeps that function, and so the batcher, until the garbage collector
    runs.
    """

    def __init__(self) -> None:
        # Replaced, never changed, since a scrape reads it on another thread.
        self._snapshots: Mapping[tuple[str, str], Callable[[], BatcherSnapshot]] = {}

    def watch(self, manifest: Manifest, snapshot: Callable[[], BatcherSnapshot]) -> None:
        """Read the batcher of a version from now on."""
        key = manifest.name, str(manifest.version)
        self._snapshots = {**self._snapshots, key: snapshot}

    def remove_by_labels(self, labels: Mapping[str, str]) -> None:
        """Remove the version that `model` and `version` name."""
        gone = labels["model"], labels["version"]
        self._snapshots = {key: each for key, each in self._snapshots.items() if key != gone}

    def describe(self) -> list[Metric]:
        """Return the metrics without values, for the registry's check of names."""
        return list(_queue_families())

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of all versions."""
        images, size_bytes, busy, preferred, largest, healthy = _queue_families()
        for version, read in self._snapshots.items():
            snapshot = read()
            images.add_metric(version, snapshot.queued_images)
            size_bytes.add_metric(version, snapshot.queued_bytes)
            busy.add_metric(version, snapshot.busy_instances)
            preferred.add_metric(version, snapshot.preferred_batch_size)
            largest.add_metric(version, snapshot.max_batch_size)
            healthy.add_metric(version, snapshot.health is Health.HEALTHY)
        yield from (images, size_bytes, busy, preferred, largest, healthy)


def _queue_families() -> tuple[GaugeMetricFamily, ...]:
    labels = ("model", "version")
    return (
        GaugeMetricFamily("convoy_queued_images", "Images in the queue.", labels=labels),
        GaugeMetricFamily("convoy_queued_bytes", "Bytes of pixels in the queue.", labels=labels),
        GaugeMetricFamily("convoy_instances_busy", "Threads that run a batch now.", labels=labels),
        GaugeMetricFamily(
            "convoy_preferred_batch_size_images",
            "Images that batches are filled up to while little is queued.",
            labels=labels,
        ),
        GaugeMetricFamily(
            "convoy_max_batch_size_images",
            "Images that batches are filled up to while much is queued; falls for a while when a "
            "device runs out of memory.",
            labels=labels,
        ),
        GaugeMetricFamily(
            "convoy_version_healthy",
            "0 while every run of a version fails or a run hangs, otherwise 1.",
            labels=labels,
        ),
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
            "Predicted duration of a batch minus its actual duration.",
            ERROR_BUCKETS_S,
        )
        self.batch_size = families.histogram(
            "convoy_batch_size_images", "Images in a batch.", BATCH_SIZE_BUCKETS
        )
        self.padded = families.counter(
            "convoy_padded_images_total", "Images added to pad batches to a warmed-up size."
        )
        self.wasted = families.counter(
            "convoy_wasted_images_total", "Images whose caller had cancelled before the run ended."
        )
        self.failed = families.counter(
            "convoy_failed_batches_total", "Batches, or parts of one, that the model failed on."
        )
        self.out_of_memory = families.counter(
            "convoy_out_of_memory_batches_total",
            "Batches that did not fit into a device's memory and ran in parts.",
        )
        self.queue_limit = families.gauge(
            "convoy_queue_limit_images", "Images that the queue may hold."
        )
        self.instances = families.gauge("convoy_instances", "Threads that run batches.")
        self.queues = QueueCollector()
        families.adopt(self.queues)
        self.predictions = PredictionFamilies()
        families.adopt(self.predictions)

    def observer(self, manifest: Manifest, limits: BatchingLimits) -> "BatchMetrics":
        """Return the observer for the batcher of one version."""
        return BatchMetrics(self, manifest, limits)


class BatchMetrics:
    """The batch metrics of one version; resolves the labels once."""

    def __init__(self, families: BatchFamilies, manifest: Manifest, limits: BatchingLimits) -> None:
        labels = (manifest.name, str(manifest.version))
        self._queue = families.queue.labels(*labels)
        self._inference = families.inference.labels(*labels)
        self._error = families.error.labels(*labels)
        self._batch_size = families.batch_size.labels(*labels)
        self._padded = families.padded.labels(*labels)
        self._wasted = families.wasted.labels(*labels)
        self._failed = families.failed.labels(*labels)
        self._out_of_memory = families.out_of_memory.labels(*labels)
        self._predictions = families.predictions.predictions(*labels, manifest.labels)
        families.queue_limit.labels(*labels).set(limits.max_queue_size)
        families.instances.labels(*labels).set(limits.instances)

    def batch_finished(self, report: BatchReport) -> None:
        """Count a batch that was run."""
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

    def batch_failed(self, error: Exception, requests: int) -> None:
        """Count a batch, or a part of one, that the model failed on."""
        self._failed.inc()

    def batch_did_not_fit(self) -> None:
        """Count a batch that a device had no memory for."""
        self._out_of_memory.inc()

    def request_rejected(self, outcome: Outcome) -> None:
        """Count nothing here: the protocols count outcomes, once for each call."""
