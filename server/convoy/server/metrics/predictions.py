"""The predicted classes and their confidence, which show drift.

Counting image by image would block the event loop. The scores of batches are collected and counted
together when there are many, or at a scrape.
"""

import itertools
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from convoy.server.requests import Scores

CONFIDENCE_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
# In float32 like the scores, or a confidence of 0.6 would be above the bound 0.6.
_BOUNDS = np.array(CONFIDENCE_BUCKETS, np.float32)
# Bounds the memory of uncounted scores.
_MAX_UNCOUNTED_IMAGES = 256


class Predictions:
    """Counts the predictions of one version.

    Args:
        labels: The labels of the classes, in the order of their scores.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = labels
        self._lock = threading.Lock()
        self._uncounted: list[Scores] = []
        self._uncounted_images = 0
        self._by_class = np.zeros(len(labels), np.int64)
        # By the bucket of the confidence, with one more above the last bound.
        self._by_bucket = np.zeros(len(CONFIDENCE_BUCKETS) + 1, np.int64)
        self._confidence_sum = 0.0
        self._not_finite = 0

    def add(self, probabilities: Scores) -> None:
        """Count the probabilities `[N, K]` of a batch; the array must not change afterwards."""
        with self._lock:
            self._uncounted.append(probabilities)
            self._uncounted_images += len(probabilities)
            if self._uncounted_images >= _MAX_UNCOUNTED_IMAGES:
                self._count()

    def by_label(self) -> Mapping[str, int]:
        """Return how many images each label was predicted for; ImageNet has some labels twice."""
        with self._lock:
            self._count()
            counts: Counter[str] = Counter()
            for label, count in zip(self._labels, self._by_class.tolist(), strict=True):
                counts[label] += count
            return counts

    def confidence(self) -> tuple[list[int], float]:
        """Return the images up to each bucket's bound, all images last, and the sum."""
        with self._lock:
            self._count()
            return list(itertools.accumulate(self._by_bucket.tolist())), self._confidence_sum

    def not_finite(self) -> int:
        """Return how many images have a score that is NaN or infinite; they count nowhere else."""
        with self._lock:
            self._count()
            return self._not_finite

    def _count(self) -> None:
        if not self._uncounted:
            return
        probabilities = np.concatenate(self._uncounted)
        self._uncounted, self._uncounted_images = [], 0
        # One NaN would make the sum NaN for good.
        finite = np.isfinite(probabilities).all(axis=1)  # [N]
        self._not_finite += int(np.count_nonzero(~finite))
        probabilities = probabilities[finite]
        self._by_class += np.bincount(probabilities.argmax(axis=1), minlength=len(self._by_class))
        confidence = probabilities.max(axis=1)
        bucket = np.searchsorted(_BOUNDS, confidence)
        self._by_bucket += np.bincount(bucket, minlength=len(self._by_bucket))
        self._confidence_sum += float(confidence.sum(dtype=np.float64))


class PredictionFamilies:
    """The metrics of predictions, by model and version."""

    def __init__(self) -> None:
        # Replaced, never changed, since a scrape reads it on another thread.
        self._versions: Mapping[tuple[str, str], Predictions] = {}

    def predictions(self, model: str, version: str, labels: Sequence[str]) -> Predictions:
        """Create the counts of a version."""
        created = Predictions(labels)
        self._versions = {**self._versions, (model, version): created}
        return created

    def remove_by_labels(self, labels: Mapping[str, str]) -> None:
        """Remove the version that `model` and `version` name."""
        gone = labels["model"], labels["version"]
        self._versions = {key: each for key, each in self._versions.items() if key != gone}

    def describe(self) -> list[Metric]:
        """Return the metrics without values, for the registry's check of names."""
        return list(_families())

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of all versions."""
        confidence, classes, not_finite = _families()
        bounds = [*map(floatToGoString, CONFIDENCE_BUCKETS), "+Inf"]
        for version, predictions in self._versions.items():
            counts, total = predictions.confidence()
            confidence.add_metric(version, list(zip(bounds, counts, strict=True)), total)
            for label, count in predictions.by_label().items():
                classes.add_metric([*version, label], count)
            not_finite.add_metric(version, predictions.not_finite())
        yield confidence
        yield classes
        yield not_finite


def _families() -> tuple[HistogramMetricFamily, CounterMetricFamily, CounterMetricFamily]:
    return (
        HistogramMetricFamily(
            "convoy_top1_confidence",
            "Probability of the predicted class, by image.",
            labels=["model", "version"],
        ),
        CounterMetricFamily(
            "convoy_predicted_class",
            "Images by predicted class.",
            labels=["model", "version", "label"],
        ),
        CounterMetricFamily(
            "convoy_not_finite_predictions",
            "Images for which the model gave NaN or infinity.",
            labels=["model", "version"],
        ),
    )
