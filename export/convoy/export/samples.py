"""The images of the proof: real ones of the model's data, and edge cases.

Real images come from a labeled data set or from a folder; without either, they are generated.
Accuracy is measured only on labeled ones.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convoy.export.errors import InputError, one_line
from convoy.export.servable import Images
from convoy.training.data import ImageFiles, ImageSet, Preprocessing, Shares, open_data
from convoy.training.data.images import SUFFIXES, decode_file, preprocess, read_image
from convoy.training.errors import TrainingError

MIN_REAL_SAMPLES = 256
MAX_REAL_SAMPLES = 512
CALIBRATION_SAMPLES = 512
PICTURES = 16
UNKNOWN_LABEL = -1
_GENERATED_SAMPLES = 64
"""Enough for the largest batch of the proof."""
_SEED = 0


@dataclass(frozen=True, slots=True)
class Samples:
    """Images of the model's kind; a label of -1 is unknown.

    Attributes:
        real: Images for the proof: validation images; if those are too few, then training or
            generated images; last, the decoded pictures.
        validation_count: How many of real are validation images.
        calibration: Images that are not in `real`, for the ranges of int8; none without real
            images.
        pictures: Image files, one per validation image.
    """

    real: ImageSet
    validation_count: int
    calibration: ImageSet
    pictures: tuple[bytes, ...]

    @property
    def validation(self) -> ImageSet:
        """The images for which accuracy is measured."""
        return self.real.take(np.arange(self.validation_count))


def load_samples(
    spec: str,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    limit: int = MAX_REAL_SAMPLES,
    shares: Shares | None = None,
) -> Samples:
    """Load labeled images for the proof.

    Args:
        spec: The data, as `training` names it. Its classes are found among the model's by name, in
            any order; some may be missing.
        classes: The model's.
        preprocessing: The model's.
        limit: How many images to prove on at most.
        shares: What the training held out of data that has no such splits.

    Raises:
        InputError: The data cannot be loaded, or has a class that the model does not have.
    """
    try:
        # An unreadable image is a warning: the proof does not need all of them.
        dataset = open_data(spec, preprocessing, skip_bad=True, shares=shares)
    except (TrainingError, OSError) as error:
        raise InputError(f"data {spec!r}: {one_line(error)}") from error
    labels = match_classes(f"data {spec!r}", dataset.classes, classes)
    valid, train = dataset.valid, dataset.train

    def taken(part: ImageSet | ImageFiles, rows: NDArray[np.int64]) -> ImageSet:
        chosen = part.take(rows)
        return ImageSet(chosen.read(range(len(chosen))), labels[chosen.labels])

    try:
        validation = taken(valid, _spread(len(valid), limit))
        more = _spread(len(train), max(0, min(MIN_REAL_SAMPLES, limit) - len(validation)))
        rest = np.delete(np.arange(len(train)), more)
        calibration = taken(train, rest[_spread(len(rest), CALIBRATION_SAMPLES)])
        further = taken(train, more)
    except TrainingError as error:
        raise InputError(f"data {spec!r}: {one_line(error)}") from error
    return _with_pictures(validation, further, calibration, preprocessing)


def read_images(
    folder: Path,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    limit: int = MAX_REAL_SAMPLES,
) -> Samples:
    """Read a folder of image files for the proof.

    Files in a subfolder named like a class have this label; other files have none.

    Raises:
        InputError: The folder has no image, or an unreadable one.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"images {folder}: expected image files, found none")
    chosen = [files[row] for row in _spread(len(files), limit)]
    by_name = {name: index for index, name in enumerate(classes)}
    try:
        images = np.stack([read_image(path, preprocessing) for path in chosen])
    except TrainingError as error:
        raise InputError(f"images {one_line(error)}") from error
    labels = [by_name.get(path.relative_to(folder).parts[0], UNKNOWN_LABEL) for path in chosen]
    real = ImageSet(images, np.array(labels, np.int64))
    missing = max(0, _GENERATED_SAMPLES - len(real))
    # If the proof needs every image, calibration shares them.
    rest = sorted(set(files) - set(chosen))[:CALIBRATION_SAMPLES]
    calibration = real
    if rest:
        pixels = np.stack([read_image(path, preprocessing) for path in rest])
        calibration = ImageSet(pixels, np.full(len(rest), UNKNOWN_LABEL, np.int64))
    return _with_pictures(real, _generated(preprocessing, missing), calibration, preprocessing)


def generate_samples(preprocessing: Preprocessing) -> Samples:
    """Generate images for the proof of a model without real ones."""
    images = _generated(preprocessing, _GENERATED_SAMPLES)
    return _with_pictures(images, images.take(_NONE), images.take(_NONE), preprocessing)


def match_classes(where: str, found: Sequence[str], classes: Sequence[str]) -> NDArray[np.int64]:
    """Return for each class of a data set `[M]` its index among a model's classes.

    Raises:
        InputError: The model does not have a class, or has two with its name.
    """
    unknown = [name for name in found if name not in classes]
    if unknown:
        raise InputError(
            f"{where}: expected classes among the model's {len(classes)} ({_listed(classes)}), "
            f"got also {_listed(unknown)}"
        )
    doubled = [name for name in found if list(classes).count(name) > 1]
    if doubled:
        raise InputError(f"{where}: class {doubled[0]!r}: the model has two labels of this name")
    return np.array([list(classes).index(name) for name in found], np.int64)


def encode_picture(image: Images) -> bytes:
    """Encode `[H, W, 3]` as a PNG of another size, so that the decoder has to resize it."""
    height_px, width_px = image.shape[:2]
    larger_px = (width_px * 5 // 4 + 1, height_px * 4 // 3 + 1)
    buffer = io.BytesIO()
    Image.fromarray(image).resize(larger_px, Image.Resampling.BICUBIC).save(buffer, format="PNG")
    return buffer.getvalue()


def edge_cases(height_px: int, width_px: int) -> dict[str, Images]:
    """Return edge-case images `[1, H, W, 3]` by name: extremes of the range, and noise."""
    shape = (1, height_px, width_px, 3)
    random = np.random.default_rng(_SEED)
    checkers = np.indices(shape).sum(axis=0) % 2
    return {
        "all 0": np.zeros(shape, np.uint8),
        "all 255": np.full(shape, 255, np.uint8),
        "checkers of 0 and 255": (255 * checkers).astype(np.uint8),
        "uniform noise": random.integers(0, 256, shape, dtype=np.uint8),
        "noise of 0 and 255": 255 * random.integers(0, 2, shape, dtype=np.uint8),
    }


_NONE = np.array([], np.int64)


def _generated(preprocessing: Preprocessing, count: int) -> ImageSet:
    """Return smooth colored noise, from few large patches to many small ones."""
    size_px = (preprocessing.width_px, preprocessing.height_px)
    random = np.random.default_rng(_SEED)
    images = np.empty((count, size_px[1], size_px[0], 3), np.uint8)
    for index in range(count):
        cells = 2 + index % 15
        coarse = random.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize(size_px, Image.Resampling.BICUBIC)
        images[index] = np.asarray(smooth)
    return ImageSet(images, np.full(count, UNKNOWN_LABEL, np.int64))


def _with_pictures(
    validation: ImageSet, more: ImageSet, calibration: ImageSet, preprocessing: Preprocessing
) -> Samples:
    chosen = validation.take(_spread(len(validation), PICTURES))
    pictures = tuple(map(encode_picture, chosen.images))
    decoded = ImageSet(_decode(pictures, preprocessing), chosen.labels)
    return Samples(_join(validation, more, decoded), len(validation), calibration, pictures)


def _decode(pictures: Sequence[bytes], preprocessing: Preprocessing) -> Images:
    scaled_for = preprocessing if preprocessing.decode == "scaled" else None
    return np.stack([preprocess(decode_file(file, scaled_for), preprocessing) for file in pictures])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (", …" if len(names) > 5 else "")


def _spread(length: int, count: int) -> NDArray[np.int64]:
    """Return at most count of the rows 0 to length - 1, evenly spaced."""
    return np.linspace(0, length - 1, num=min(count, length), dtype=np.int64)


def _join(*parts: ImageSet) -> ImageSet:
    return ImageSet(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.labels for part in parts]),
    )
