"""Images that stay in their files, for sets too large for memory, and one look at each of them."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.data import folder
from training.data.folder import Listing
from training.data.images import Preprocessing, read_image
from training.data.imageset import channel_sums, check_classes
from training.errors import DataError


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """N images, decoded whenever they are read."""

    listing: Listing
    steps: Preprocessing
    sums: NDArray[np.int64]  # [N, 2, 3]: see channel_sums

    def __len__(self) -> int:
        return len(self.listing.paths)

    @property
    def labels(self) -> NDArray[np.int64]:
        """See `Images`."""
        return self.listing.labels

    def take(self, indices: NDArray[np.int64]) -> "ImageFiles":
        """See `Images`."""
        return ImageFiles(self.listing.take(indices), self.steps, self.sums[indices])

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """See `Images`."""
        return np.stack([read_image(self.listing.paths[index], self.steps) for index in indices])

    def measure(self) -> NDArray[np.int64]:
        """See `Images`."""
        total: NDArray[np.int64] = self.sums.sum(0)
        return total


def open_files(
    listing: Listing, steps: Preprocessing, cache: Path | None, skip_bad: bool = False
) -> ImageFiles:
    """Decodes every file once, to find the unreadable ones and to sum up the pixels.

    The outcome is cached like decoded sets are, so an unchanged folder is looked at once.

    Raises:
        DataError: Files are unreadable, or none is left of a class.
    """
    entry = folder.cache_entry(cache, listing, steps, "npy")
    if entry and entry.is_file():
        return ImageFiles(listing, steps, np.load(entry, allow_pickle=False))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        looks = list(pool.map(lambda path: _look(path, steps), listing.paths))
    faults = [look for look in looks if isinstance(look, str)]
    if faults:
        folder.report_unreadable(faults, skip_bad)
        listing = listing.take(i for i, look in enumerate(looks) if not isinstance(look, str))
        check_classes(listing.labels, listing.classes)
    sums = np.stack([look for look in looks if not isinstance(look, str)])
    if entry and not faults:
        folder.store(entry, lambda file: np.save(file, sums))
    return ImageFiles(listing, steps, sums)


def _look(path: Path, steps: Preprocessing) -> NDArray[np.int64] | str:
    try:
        return channel_sums(read_image(path, steps))
    except DataError as error:
        return str(error)
