"""Images with labels, and their split."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convoy.training.errors import DataError

if TYPE_CHECKING:
    from convoy.training.data.inventory import Inventory


class Images(Protocol):
    """N images of one size, in memory or in files."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class indices `[N]`."""
        ...

    def __len__(self) -> int: ...

    def take(self, indices: NDArray[np.int64]) -> Self:
        """Return the images at `indices`, in that order."""
        ...

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Return the pixels `[M, H, W, 3]` of the images at `indices`."""
        ...

    def original(self, index: int) -> Image.Image:
        """Return one image, RGB, in its stored size."""
        ...

    def measure(self) -> NDArray[np.int64]:
        """Return the sums `[2, 3]` over all images: see `channel_sums`."""
        ...


Kept = TypeVar("Kept", bound=Images)


@dataclass(frozen=True, slots=True)
class ImageSet:
    """N images of one size in memory."""

    images: NDArray[np.uint8]  # [N, H, W, 3]
    labels: NDArray[np.int64]  # [N]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> "ImageSet":
        """See `Images`."""
        return ImageSet(self.images[indices], self.labels[indices])

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """See `Images`."""
        return self.images[list(indices)]

    def original(self, index: int) -> Image.Image:
        """See `Images`."""
        return Image.fromarray(self.images[index])

    def measure(self) -> NDArray[np.int64]:
        """See `Images`."""
        total: NDArray[np.int64] = sum(map(channel_sums, self.images), np.zeros((2, 3), np.int64))
        return total


@dataclass(frozen=True, slots=True)
class Dataset(Generic[Kept]):
    """Three sets without a common image; `test` must not influence any choice.

    Attributes:
        classes: Names by label.
        inventory: The report on the files; None for data that a package bundles.
    """

    train: Kept
    valid: Kept
    test: Kept
    classes: tuple[str, ...]
    inventory: "Inventory | None" = None


def channel_sums(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the exact sum and sum of squares `[2, 3]` of each channel of an image `[H, W, 3]`."""
    values = pixels.reshape(-1, 3).astype(np.int64)
    return np.stack((values.sum(0), np.einsum("nc,nc->c", values, values)))


def stratified_split(
    labels: NDArray[np.int64], share: float, seed: int, names: Sequence[str] = ()
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split indices so that `share` of every class, at least one, goes to the second part.

    Args:
        labels: Class indices `[N]`.
        share: From 0 to 1.
        seed: Chooses which images.
        names: Of the classes, for messages.

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
            name = names[label] if len(names) else label
            raise DataError(f"class {name!r}: expected at least 2 images to split, got 1")
        count = max(1, round(share * len(members)))
        held_out.append(members[:count])
        kept.append(members[count:])
    return np.sort(np.concatenate(kept)), np.sort(np.concatenate(held_out))


def check_classes(labels: NDArray[np.int64], classes: Sequence[str], where: str = "data") -> None:
    """Raise for data that cannot train a classifier.

    Raises:
        DataError: There are fewer than two classes, or one has no image.
    """
    if len(classes) < 2:
        raise DataError(
            f"{where}: expected at least 2 classes, got {len(classes)}: {list(classes)}"
        )
    counts = np.bincount(labels, minlength=len(classes))
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if empty:
        raise DataError(f"{where}: expected images in every class, got none for {', '.join(empty)}")
