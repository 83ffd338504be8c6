"""Predictions counted in bulk: what a scrape shows is what counting one by one would."""

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from convoy.server.metrics.predictions import CONFIDENCE_BUCKETS, PredictionFamilies
from convoy.server.metrics.requests import VersionFamilies

LABELS = ("cat", "dog", "eel")
VERSION = {"model": "pets", "version": "1"}


@pytest.fixture
def families() -> VersionFamilies:
    return VersionFamilies(CollectorRegistry())


@pytest.fixture
def predictions(families):
    prediction_families = PredictionFamilies()
    families.adopt(prediction_families)
    return prediction_families.predictions("pets", "1", LABELS)


def scores(images: int, seed: int) -> np.ndarray:
    draws = np.random.default_rng(seed).dirichlet((0.3, 0.3, 0.3), images)
    return draws.astype(np.float32)  # [N, 3]


@pytest.mark.parametrize("batches", [(1,), (8, 3, 8), (255, 1, 1), (300, 7), (64,) * 9])
def test_a_scrape_shows_what_counting_image_by_image_would(families, predictions, batches):
    registry = families.registry
    reference_registry = CollectorRegistry()
    reference = Histogram(
        "confidence", "One by one.", buckets=CONFIDENCE_BUCKETS, registry=reference_registry
    )
    expected = dict.fromkeys(LABELS, 0)
    for seed, images in enumerate(batches):
        batch = scores(images, seed)
        predictions.add(batch)
        for row in batch:
            reference.observe(float(row.max()))
            expected[LABELS[int(row.argmax())]] += 1
        # A look in between changes nothing.
        assert registry.get_sample_value("convoy_top1_confidence_count", VERSION)
    for sample in next(iter(reference_registry.collect())).samples:
        _, _, suffix = sample.name.partition("confidence")
        if suffix != "_created":
            found = registry.get_sample_value(
                f"convoy_top1_confidence{suffix}", VERSION | sample.labels
            )
            assert found == pytest.approx(sample.value), sample
    for label, count in expected.items():
        labels = VERSION | {"label": label}
        assert registry.get_sample_value("convoy_predicted_class_total", labels) == count


def test_a_confidence_on_a_bound_belongs_below_it(families, predictions):
    predictions.add(np.array([[0.6, 0.4, 0.0]], np.float32))
    below = VERSION | {"le": "0.6"}
    assert families.registry.get_sample_value("convoy_top1_confidence_bucket", below) == 1


def test_nan_scores_are_counted_separately_and_do_not_spoil_the_sum(families, predictions):
    predictions.add(np.array([[0.6, 0.4, 0.0], [np.nan] * 3, [0.1, 0.2, np.inf]], np.float32))
    value = families.registry.get_sample_value
    assert value("convoy_not_finite_predictions_total", VERSION) == 2
    assert value("convoy_top1_confidence_count", VERSION) == 1
    assert value("convoy_top1_confidence_sum", VERSION) == pytest.approx(0.6)
    assert value("convoy_predicted_class_total", VERSION | {"label": "cat"}) == 1
    predictions.add(np.full((300, 3), np.nan, np.float32))
    assert value("convoy_not_finite_predictions_total", VERSION) == 302
    assert value("convoy_predicted_class_total", VERSION | {"label": "cat"}) == 1


def test_a_version_that_predicted_nothing_yet_is_shown_with_zeros(families, predictions):
    labels = VERSION | {"label": "eel"}
    assert families.registry.get_sample_value("convoy_predicted_class_total", labels) == 0
    assert families.registry.get_sample_value("convoy_top1_confidence_count", VERSION) == 0


def test_classes_of_one_label_are_counted_together(families):
    prediction_families = PredictionFamilies()
    families.adopt(prediction_families)
    predictions = prediction_families.predictions("birds", "1", ("crane", "owl", "crane"))
    predictions.add(np.eye(3, dtype=np.float32))
    labels = {"model": "birds", "version": "1", "label": "crane"}
    assert families.registry.get_sample_value("convoy_predicted_class_total", labels) == 2


def test_a_forgotten_version_leaves_nothing(families, predictions):
    predictions.add(scores(4, 0))
    families.forget("pets", 1)
    predictions.add(scores(4, 1))
    assert "pets" not in generate_latest(families.registry).decode()
