"""The images that a model is proved on: real ones of its own data, and hostile ones."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from export.errors import InputError, one_line
from export.servable import Images
from training.data import ImageSet, Preprocessing, load_data
from training.data.images import preprocess
from training.errors import TrainingError

MIN_REAL_SAMPLES = 256
MAX_REAL_SAMPLES = 512
CALIBRATION_SAMPLES = 512
PICTURES = 16
_SEED = 0


@dataclass(frozen=True, slots=True)
class Samples:
    """Real images of a model's own data.

    Attributes:
        real: Images for the proof: validation images; where those are too few, training images
            behind them; last those that the pictures decode to.
        validation_count: How many of real are validation images.
        calibration: Training images that are not in real.
        pictures: Image files, of a validation image each.
    """

    real: ImageSet
    validation_count: int
    calibration: ImageSet
    pictures: tuple[bytes, ...]

    @property
    def validation(self) -> ImageSet:
        """The images that say something about accuracy."""
        return self.real.take(np.arange(self.validation_count))


def load_samples(spec: str, classes: Sequence[str], preprocessing: Preprocessing) -> Samples:
    """Loads the images to prove a model on.

    Args:
        spec: The data, as `training` names it.
        classes: The model's, which must be those of the data.
        preprocessing: The model's.

    Raises:
        InputError: The data cannot be loaded, or its classes are not the model's.
    """
    try:
        dataset = load_data(spec, preprocessing)
    except (TrainingError, OSError) as error:
        raise InputError(f"data {spec!r}: {one_line(error)}") from error
    if tuple(dataset.classes) != tuple(classes):
        raise InputError(
            f"data {spec!r}: expected the model's {len(classes)} classes, "
            f"found {len(dataset.classes)}, of other names or in another order"
        )
    validation = dataset.valid.take(_spread(len(dataset.valid), MAX_REAL_SAMPLES))
    training_rows = np.arange(len(dataset.train))
    more = _spread(len(training_rows), max(0, MIN_REAL_SAMPLES - len(validation)))
    rest = np.delete(training_rows, more)
    chosen = validation.take(_spread(len(validation), PICTURES))
    pictures = tuple(map(encode_picture, chosen.images))
    return Samples(
        real=_join(
            validation,
            dataset.train.take(more),
            ImageSet(_decode(pictures, preprocessing), chosen.labels),
        ),
        validation_count=len(validation),
        calibration=dataset.train.take(rest[_spread(len(rest), CALIBRATION_SAMPLES)]),
        pictures=pictures,
    )


def encode_picture(image: Images) -> bytes:
    """Makes an image file of `[H, W, 3]`, of another size: who decodes it has to resize it."""
    height_px, width_px = image.shape[:2]
    larger_px = (width_px * 5 // 4 + 1, height_px * 4 // 3 + 1)
    buffer = io.BytesIO()
    Image.fromarray(image).resize(larger_px, Image.Resampling.BICUBIC).save(buffer, format="PNG")
    return buffer.getvalue()


def _decode(pictures: Sequence[bytes], preprocessing: Preprocessing) -> Images:
    decoded = []
    for file in pictures:
        with Image.open(io.BytesIO(file)) as picture:
            decoded.append(preprocess(picture, preprocessing))
    return np.stack(decoded)


def hostile(height_px: int, width_px: int) -> dict[str, Images]:
    """Returns images `[1, H, W, 3]` that no camera takes, by name: extremes and noise."""
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


def _spread(length: int, count: int) -> NDArray[np.int64]:
    """Returns at most count of the rows 0 to length - 1, evenly spaced."""
    return np.linspace(0, length - 1, num=min(count, length), dtype=np.int64)


def _join(*parts: ImageSet) -> ImageSet:
    return ImageSet(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.labels for part in parts]),
    )
