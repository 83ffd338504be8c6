"""The images that a model is proved on: real ones of its own data, and hostile ones."""

from collections.abc import Sequence

import numpy as np

from export.errors import InputError, one_line
from export.servable import Images
from training.data import ImageSet, Preprocessing, load_data
from training.errors import TrainingError

MIN_REAL_SAMPLES = 256
MAX_REAL_SAMPLES = 512
_SEED = 0


def load_real(spec: str, classes: Sequence[str], preprocessing: Preprocessing) -> ImageSet:
    """Loads validation images, with training images where those are fewer than the proof needs.

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
    real = _spread(dataset.valid, MAX_REAL_SAMPLES)
    if missing := max(0, MIN_REAL_SAMPLES - len(real)):
        more = _spread(dataset.train, missing)
        real = ImageSet(
            np.concatenate([real.images, more.images]), np.concatenate([real.labels, more.labels])
        )
    return real


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


def _spread(images: ImageSet, count: int) -> ImageSet:
    """Returns at most count of the images, evenly spaced over the order they are in."""
    rows = np.linspace(0, len(images) - 1, num=min(count, len(images)), dtype=np.int64)
    return images.take(rows)
