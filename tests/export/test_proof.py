"""The gate: what it lets through and what it stops, with artifacts that err in known ways."""

import math
from dataclasses import replace

import numpy as np
import pytest

from convoy.export.errors import ParityError
from convoy.export.formats import Precision
from convoy.export.proof import GATES, Gate, prove
from convoy.export.reference import Expectation, expect
from convoy.export.samples import MIN_REAL_SAMPLES, Samples
from convoy.export.servable import Images, Outputs, Run
from convoy.export.source import ModelSource
from convoy.training.data import load_data

FP32_GATE = GATES[Precision.FP32]


@pytest.fixture(scope="module")
def expected(source: ModelSource, samples: Samples) -> Expectation:
    return expect(source, samples)


def answering(expected: Expectation) -> Run:
    """An artifact that knows every sample's answer by heart."""
    answers = {image.tobytes(): row for row, image in reversed(list(enumerate(expected.images)))}

    def run(images: Images) -> Outputs:
        rows = [answers[image.tobytes()] for image in images]
        return Outputs(*(output[rows].copy() for output in expected.outputs))

    return run


def test_proof_sees_enough_real_samples_and_the_extremes(expected: Expectation) -> None:
    assert expected.real_count >= MIN_REAL_SAMPLES == 256
    edge_cases = expected.images[expected.real_count :].reshape(-1, 32 * 32 * 3)
    assert {(int(image.min()), int(image.max())) for image in edge_cases} >= {
        (0, 0),
        (255, 255),
        (0, 255),
    }


def test_a_perfect_artifact_passes_with_no_difference(expected: Expectation) -> None:
    parity = prove("model.x", answering(expected), expected, FP32_GATE)
    assert parity.max_logit_difference == 0
    assert parity.argmax_agreement == 1
    assert parity.batch_sizes == (1, 2, 7, 32, 64)
    assert parity.accuracy == parity.reference_accuracy


def test_the_largest_difference_is_reported(expected: Expectation) -> None:
    honest = answering(expected)

    def run(images: Images) -> Outputs:
        outputs = honest(images)
        outputs.logits[-1] += 3e-5
        return outputs

    parity = prove("model.x", run, expected, FP32_GATE)
    assert parity.max_logit_difference == pytest.approx(3e-5, rel=0.05)


def test_one_wrong_sample_is_named_with_its_batch_size(expected: Expectation) -> None:
    honest = answering(expected)
    victim = expected.images[17]

    def run(images: Images) -> Outputs:
        outputs = honest(images)
        for row, image in enumerate(images):
            if len(images) == 7 and np.array_equal(image, victim):
                outputs.logits[row] += 0.5
        return outputs

    with pytest.raises(ParityError, match=r"model.x, batch size 7, real sample 17 .*logits"):
        prove("model.x", run, expected, FP32_GATE)


def test_an_artifact_that_mixes_up_rows_is_caught(expected: Expectation) -> None:
    honest = answering(expected)

    def run(images: Images) -> Outputs:
        return Outputs(*(np.roll(output, 1, axis=0) for output in honest(images)))

    with pytest.raises(ParityError, match="batch size 2"):
        prove("model.x", run, expected, FP32_GATE)


@pytest.mark.parametrize("name", ["all 0", "all 255"])
def test_a_nan_on_an_edge_case_sample_is_caught(expected: Expectation, name: str) -> None:
    honest = answering(expected)
    victim = expected.images[expected.names.index(f"edge-case sample {name!r}")]

    def run(images: Images) -> Outputs:
        outputs = honest(images)
        outputs.logits[[np.array_equal(image, victim) for image in images]] = np.nan
        return outputs

    with pytest.raises(ParityError, match=f"edge-case sample '{name}'"):
        prove("model.x", run, expected, FP32_GATE)


def test_wrong_probabilities_are_caught_though_the_logits_are_right(expected: Expectation) -> None:
    def run(images: Images) -> Outputs:
        outputs = answering(expected)(images)
        return Outputs(outputs.logits, np.full_like(outputs.probabilities, 0.1))

    with pytest.raises(ParityError, match="probabilities"):
        prove("model.x", run, expected, FP32_GATE)


def test_outputs_of_another_shape_are_rejected(expected: Expectation) -> None:
    def run(images: Images) -> Outputs:
        outputs = answering(expected)(images)
        return Outputs(outputs.logits[:1], outputs.probabilities[:1])

    with pytest.raises(ParityError, match=r"batch size 2: expected outputs float32 \[2, 10\]"):
        prove("model.x", run, expected, FP32_GATE)


def test_other_classes_fail_even_a_wide_gate(expected: Expectation) -> None:
    wide = Gate(atol=100.0, scale=10.0, min_agreement=0.98, max_accuracy_drop=1.0)

    def run(images: Images) -> Outputs:
        outputs = answering(expected)(images)
        return Outputs(-outputs.logits, outputs.probabilities)

    with pytest.raises(ParityError, match=r"eager net's class for at least 98.0%"):
        prove("model.x", run, expected, wide)


@pytest.fixture(scope="module")
def always_right(expected: Expectation) -> Expectation:
    """The eager net as if it knew every real sample."""
    return replace(expected, labels=expected.outputs.logits[: expected.real_count].argmax(axis=1))


def wrong_about(expected: Expectation, rows: set[int]) -> Run:
    """An artifact that gives some samples another class, by a hair."""
    victims = {expected.images[row].tobytes() for row in rows}
    honest = answering(expected)

    def run(images: Images) -> Outputs:
        outputs = honest(images)
        for row, image in enumerate(images):
            if image.tobytes() in victims:
                outputs.logits[row] = np.roll(outputs.logits[row], 1)
        return outputs

    return run


LAX = Gate(atol=100.0, scale=10.0, min_agreement=0.0, max_accuracy_drop=0.0)


def test_lost_accuracy_fails_even_a_wide_gate(always_right: Expectation) -> None:
    with pytest.raises(ParityError, match=r"249 validation images: .* 1.0000, .* sample 5 is lost"):
        prove("model.x", wrong_about(always_right, {5}), always_right, LAX)


def test_accuracy_is_measured_on_validation_images_only(
    always_right: Expectation, samples: Samples
) -> None:
    validation = load_data("digits").valid
    assert samples.validation_count == len(validation) == 249 < always_right.real_count
    np.testing.assert_array_equal(samples.validation.images, validation.images)
    parity = prove("model.x", wrong_about(always_right, {250, 251}), always_right, LAX)
    assert parity.argmax_agreement < 1
    assert parity.accuracy == 1
    assert parity.validation_samples == 249


def test_accuracy_of_each_class_is_reported(always_right: Expectation) -> None:
    gate = replace(LAX, max_accuracy_drop=0.1)
    parity = prove("model.x", wrong_about(always_right, {5}), always_right, gate)
    lost = always_right.labels[5]
    members = int((always_right.labels[:249] == lost).sum())
    assert parity.accuracy == pytest.approx(248 / 249)
    assert parity.class_accuracy[lost] == pytest.approx(1 - 1 / members)
    others = [accuracy for label, accuracy in enumerate(parity.class_accuracy) if label != lost]
    assert all(math.isnan(accuracy) or accuracy == 1 for accuracy in others)


@pytest.mark.parametrize(("rows", "passes"), [(1, True), (20, False)])
def test_int8_may_miss_one_value_in_a_thousand_by_more(
    expected: Expectation, rows: int, passes: bool
) -> None:
    honest = answering(expected)
    victims = {image.tobytes() for image in expected.images[:rows]}

    def run(images: Images) -> Outputs:
        outputs = honest(images)
        for row, image in enumerate(images):
            if image.tobytes() in victims:
                outputs.logits[row, outputs.logits[row].argmin()] -= 3.0
        return outputs

    if passes:
        parity = prove("model.x", run, expected, GATES[Precision.INT8])
        assert parity.max_logit_difference == pytest.approx(3.0, rel=1e-3)
        assert parity.logit_difference_p999 < 0.5
        assert parity.tolerance >= 3.5
    else:
        with pytest.raises(ParityError, match=r"at most 5.00e-01 .* for 99.9% of all values, got"):
            prove("model.x", run, expected, GATES[Precision.INT8])


def test_the_tolerance_grows_with_large_logits_only() -> None:
    assert FP32_GATE.tolerance(np.float32([[6.0, -1.0]])) == 1e-4
    assert FP32_GATE.tolerance(np.float32([[50.0, -100.0]])) == pytest.approx(1e-3)
