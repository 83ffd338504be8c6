"""What the proof runs on: labeled data, a folder of images, or generated ones."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor, nn

from convoy.export.errors import InputError
from convoy.export.formats import Precision
from convoy.export.proof import GATES, prove
from convoy.export.reference import Expectation, chance_warning, doubts, expect
from convoy.export.samples import (
    Samples,
    generate_samples,
    load_samples,
    match_classes,
    read_images,
)
from convoy.export.servable import Images, Outputs
from convoy.export.source import ModelSource
from convoy.training.data import Preprocessing

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STEPS = Preprocessing(16, 16)


def write_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")


def test_classes_are_matched_by_name_in_any_order_with_some_missing() -> None:
    np.testing.assert_array_equal(match_classes("data", ("eight", "one"), WORDS), [8, 1])
    with pytest.raises(InputError, match=r"expected classes among .*'zero', .*got also 'ten'"):
        match_classes("data", ("one", "ten"), WORDS)
    with pytest.raises(InputError, match="class 'crane': the model has two labels"):
        match_classes("data", ("crane",), ("crane", "heron", "crane"))


def test_labels_of_a_folder_are_those_of_the_net(tmp_path: Path) -> None:
    # Alphabetical folders, while the net's order is that of the numbers.
    for name in ("eight", "five", "two"):
        for split in ("train", "test"):
            write_images(tmp_path / split / name, 12)
    samples = load_samples(f"imagefolder:{tmp_path}", WORDS, STEPS)
    assert set(samples.validation.labels.tolist()) == {8, 5, 2}


def test_digits_by_name(samples: Samples) -> None:
    turned = load_samples("digits", tuple("9876543210"), Preprocessing())
    np.testing.assert_array_equal(turned.validation.labels, 9 - samples.validation.labels)


def test_a_few_unlabeled_pictures_are_enough(tmp_path: Path) -> None:
    write_images(tmp_path, 5)
    samples = read_images(tmp_path, WORDS, STEPS)
    assert samples.validation_count == 5
    assert (samples.real.labels == -1).all()
    # Generated ones fill up the largest batch; the pictures stand last.
    assert len(samples.real) == 64 + 5
    assert len(samples.pictures) == 5
    assert len(samples.calibration) == 5


def test_folders_named_like_labels_are_labels(tmp_path: Path) -> None:
    write_images(tmp_path / "three", 2)
    write_images(tmp_path / "holiday", 2)
    samples = read_images(tmp_path, WORDS, STEPS)
    assert samples.validation.labels.tolist() == [-1, -1, 3, 3]


def test_a_folder_without_or_with_a_damaged_image_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected image files, found none"):
        read_images(tmp_path, WORDS, STEPS)
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"bad\.png"):
        read_images(tmp_path, WORDS, STEPS)


def test_the_number_of_samples_can_be_limited(tmp_path: Path) -> None:
    samples = load_samples("digits", tuple("0123456789"), Preprocessing(), limit=20)
    assert samples.validation_count == 20
    write_images(tmp_path, 30)
    limited = read_images(tmp_path, WORDS, STEPS, limit=10)
    assert limited.validation_count == 10
    proof = {image.tobytes() for image in limited.real.images[:10]}
    assert len(limited.calibration) == 20
    assert not proof & {image.tobytes() for image in limited.calibration.images}


def test_generated_images_are_many_and_different() -> None:
    samples = generate_samples(STEPS)
    assert len({image.tobytes() for image in samples.validation.images}) == 64
    assert len(samples.calibration) == 0
    again = generate_samples(STEPS)
    np.testing.assert_array_equal(samples.real.images, again.real.images)


@pytest.fixture(scope="module")
def unlabeled(source: ModelSource) -> Expectation:
    return expect(source, generate_samples(source.data.preprocessing))


def test_without_labels_parity_is_proved_and_accuracy_is_none(unlabeled: Expectation) -> None:
    answers = {image.tobytes(): row for row, image in enumerate(unlabeled.images)}

    def run(images: Images) -> Outputs:
        rows = [answers[image.tobytes()] for image in images]
        return Outputs(*(output[rows] for output in unlabeled.outputs))

    parity = prove("model.x", run, unlabeled, GATES[Precision.FP32])
    assert (parity.accuracy, parity.reference_accuracy, parity.validation_samples) == (
        None,
        None,
        0,
    )
    assert parity.argmax_agreement == 1


def test_accuracy_at_chance_is_a_warning_that_names_causes(
    source: ModelSource, samples: Samples
) -> None:
    expected = expect(source, samples)
    guessed = chance_warning(expected)
    assert guessed is not None
    for cause in ("order of the labels", "--mean and --std", "--channel-order", "size and crop"):
        assert cause in guessed
    right = replace(expected, labels=expected.outputs.logits[: expected.real_count].argmax(axis=1))
    assert chance_warning(right) is None


def test_a_zero_head_is_a_warning(source: ModelSource, unlabeled: Expectation) -> None:
    class ZeroHead(nn.Module):
        """A net whose last layer was never trained."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = source.net, nn.Linear(10, 10)
            nn.init.zeros_(self.head.weight)

        def forward(self, pixels: Tensor) -> Tensor:
            logits: Tensor = self.head(self.net(pixels))
            return logits

    samples = generate_samples(source.data.preprocessing)
    (found,) = doubts(expect(replace(source, net=ZeroHead().eval()), samples))
    assert "the proof shows nothing" in found
    assert "last layer" in found
    assert not doubts(unlabeled)


def test_it_says_nothing_of_a_handful(
    source: ModelSource, unlabeled: Expectation, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert chance_warning(unlabeled) is None
    assert not caplog.records
