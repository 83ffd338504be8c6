"""What a model predicts, counted in bulk: the drift that dashboards and alerts watch.

Every image counts here, and the event loop has better to do than to count image by image: batches
leave their scores, which are counted together once there are many, or when somebody looks.
"""

import itertools
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from server.requests import Scores

CONFIDENCE_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
# As the scores are, or a confidence of 0.6 would lie above the bound 0.6.
_BOUNDS = np.array(CONFIDENCE_BUCKETS, np.float32)
# Bounds the memory of what is not counted yet.
_COUNTED_AT_ONCE = 256  # images


class Predictions:
    """Counts the answers of one version.

    Args:
        labels: Of the classes, in the order of their scores.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = labels
        self._lock = threading.Lock()
        self._uncounted: list[Scores] = []
        self._uncounted_images = 0
        self._by_class = np.zeros(len(labels), np.int64)
        # By the bucket of the confidence, with one for what is above all.
        self._by_bucket = np.zeros(len(CONFIDENCE_BUCKETS) + 1, np.int64)
        self._confidence_sum = 0.0

    def add(self, probabilities: Scores) -> None:
        """Takes the answers `[N, K]` of a batch; they must not be written to again."""
        with self._lock:
            self._uncounted.append(probabilities)
            self._uncounted_images += len(probabilities)
            if self._uncounted_images >= _COUNTED_AT_ONCE:
                self._count()

    def by_label(self) -> Mapping[str, int]:
        """Returns how many images each label was predicted for; ImageNet has some of them twice."""
        with self._lock:
            self._count()
            counts: Counter[str] = Counter()
            for label, count in zip(self._labels, self._by_class.tolist(), strict=True):
                counts[label] += count
            return counts

    def confidence(self) -> tuple[list[int], float]:
        """Returns the images up to each bucket's bound, all of them last, and the sum."""
        with self._lock:
            self._count()
            return list(itertools.accumulate(self._by_bucket.tolist())), self._confidence_sum

    def _count(self) -> None:
        if not self._uncounted:
            return
        probabilities = np.concatenate(self._uncounted)
        self._uncounted, self._uncounted_images = [], 0
        self._by_class += np.bincount(probabilities.argmax(axis=1), minlength=len(self._by_class))
        confidence = probabilities.max(axis=1)
        bucket = np.searchsorted(_BOUNDS, confidence)
        self._by_bucket += np.bincount(bucket, minlength=len(self._by_bucket))
        self._confidence_sum += float(confidence.sum(dtype=np.float64))


class PredictionFamilies:
    """The metrics of predictions, by model and version."""

    def __init__(self) -> None:
        # Replaced, never changed, since a scrape reads it on a thread of its own.
        self._versions: Mapping[tuple[str, str], Predictions] = {}

    def predictions(self, model: str, version: str, labels: Sequence[str]) -> Predictions:
        """Returns what counts the answers of a version."""
        found = Predictions(labels)
        self._versions = {**self._versions, (model, version): found}
        return found

    def remove_by_labels(self, labels: Mapping[str, str]) -> None:
        """Forgets the version that `model` and `version` name."""
        gone = labels["model"], labels["version"]
        self._versions = {key: each for key, each in self._versions.items() if key != gone}

    def describe(self) -> list[Metric]:
        """Returns the metrics without values, as a registry asks for their names."""
        return list(_families())

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics as they are."""
        confidence, classes = _families()
        bounds = [*map(floatToGoString, CONFIDENCE_BUCKETS), "+Inf"]
        for version, predictions in self._versions.items():
            counts, total = predictions.confidence()
            confidence.add_metric(version, list(zip(bounds, counts, strict=True)), total)
            for label, count in predictions.by_label().items():
                classes.add_metric([*version, label], count)
        yield confidence
        yield classes


def _families() -> tuple[HistogramMetricFamily, CounterMetricFamily]:
    return (
        HistogramMetricFamily(
            "convoy_top1_confidence",
            "Probability of the class that was predicted, by image.",
            labels=["model", "version"],
        ),
        CounterMetricFamily(
            "convoy_predicted_class",
            "Images by the class that was predicted.",
            labels=["model", "version", "label"],
        ),
    )
