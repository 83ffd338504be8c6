"""Images with labels, held in memory, and their split."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.errors import DataError


@dataclass(frozen=True, slots=True)
class ImageSet:
    """N images of one size."""

    images: NDArray[np.uint8]  # [N, H, W, 3]
    labels: NDArray[np.int64]  # [N]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> "ImageSet":
        """The images at `indices`, in that order."""
        return ImageSet(self.images[indices], self.labels[indices])


@dataclass(frozen=True, slots=True)
class Dataset:
    """Three sets without a common image; `test` chooses nothing."""

    train: ImageSet
    valid: ImageSet
    test: ImageSet
    classes: tuple[str, ...]


def stratified_split(
    labels: NDArray[np.int64], share: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Splits indices so that `share` of every class, at least one, goes to the second part.

    Returns:
        Two sorted arrays of indices without a common element.

    Raises:
        DataError: A class has fewer than two images.
    """
    rng = np.random.default_rng(seed)
    kept, held_out = [], []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) < 2:
            raise DataError(f"class {label}: expected at least 2 images to split, got 1")
        count = max(1, round(share * len(members)))
        held_out.append(members[:count])
        kept.append(members[count:])
    return np.sort(np.concatenate(kept)), np.sort(np.concatenate(held_out))


def check_classes(labels: NDArray[np.int64], classes: Sequence[str]) -> None:
    """Refuses data that cannot train a classifier.

    Raises:
        DataError: There are fewer than two classes, or one has no image.
    """
    if len(classes) < 2:
        raise DataError(f"data: expected at least 2 classes, got {len(classes)}: {list(classes)}")
    counts = np.bincount(labels, minlength=len(classes))
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if empty:
        raise DataError(f"data: expected images in every class, got none for {', '.join(empty)}")
