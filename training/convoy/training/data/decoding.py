"""Listed images to pixels: all at once into memory, or from their files whenever they are read."""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convoy.training.cpus import usable_cpus
from convoy.training.data.cache import Cache, identity
from convoy.training.data.images import (
    Look,
    Preprocessing,
    read_and_look,
    read_image,
    read_original,
)
from convoy.training.data.imageset import ImageSet, channel_sums, check_classes
from convoy.training.data.listing import Listing
from convoy.training.errors import DataError

_log = logging.getLogger(__name__)

_LISTED = 5


@dataclass(frozen=True, slots=True)
class Looks:
    """The properties of a split's readable images, and its unreadable files.

    Attributes:
        formats: `[N]`, as "JPEG".
        sizes_px: Width and height `[N, 2]`.
        sizes_bytes: `[N]`.
        digests: Of the content, `[N, 16]`.
        faults: A line for each unreadable file.
    """

    formats: NDArray[np.str_]
    sizes_px: NDArray[np.int32]
    sizes_bytes: NDArray[np.int64]
    digests: NDArray[np.uint8]
    faults: tuple[str, ...] = ()

    def arrays(self) -> dict[str, Any]:
        """Return the content of a cache entry."""
        kept = asdict(self)
        del kept["faults"]
        return kept


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """N images that are decoded at each read."""

    listing: Listing
    steps: Preprocessing
    sums: NDArray[np.int64]  # [N, 2, 3]: see channel_sums

    def __len__(self) -> int:
        return len(self.listing.refs)

    @property
    def labels(self) -> NDArray[np.int64]:
        """See `Images`."""
        return self.listing.labels

    def take(self, indices: NDArray[np.int64]) -> "ImageFiles":
        """See `Images`."""
        return ImageFiles(self.listing.take(indices), self.steps, self.sums[indices])

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """See `Images`.

        Raises:
            DataError: A file became unreadable; the message names split and class.
        """
        pixels = np.empty((len(indices), self.steps.height_px, self.steps.width_px, 3), np.uint8)
        for row, index in enumerate(indices):
            pixels[row] = self._read_one(index)
        return pixels

    def _read_one(self, index: int) -> NDArray[np.uint8]:
        with self._naming(index):
            return read_image(self.listing.refs[index], self.steps)

    def original(self, index: int) -> Image.Image:
        """See `Images`.

        Raises:
            DataError: As `read`.
        """
        with self._naming(index):
            return read_original(self.listing.refs[index])[0]

    @contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            raise DataError(f"{self.listing.where(index)}: {error}") from error

    def measure(self) -> NDArray[np.int64]:
        """See `Images`."""
        total: NDArray[np.int64] = self.sums.sum(0)
        return total


def decode(
    listing: Listing, steps: Preprocessing, cache: Cache | None, skip_bad: bool = False
) -> tuple[ImageSet, Looks]:
    """Decode every image, or take the result of an earlier call from the cache.

    Args:
        listing: The files to decode.
        steps: Size and filter of the result.
        cache: None caches nothing.
        skip_bad: Leave unreadable images out, with a warning, instead of raising.

    Raises:
        DataError: Images are unreadable, or none is left of a class.
    """
    entry = _entry(cache, listing, steps, "decoded")
    if cache and entry and (stored := cache.load(entry, _read_arrays)):
        return ImageSet(stored.pop("images"), stored.pop("labels")), Looks(**stored)
    images = np.empty((len(listing.refs), steps.height_px, steps.width_px, 3), np.uint8)

    def keep(index: int, pixels: NDArray[np.uint8]) -> None:
        images[index] = pixels

    good, looks = _look_at_all(listing, steps, skip_bad, keep)
    decoded = ImageSet(images, listing.labels)
    if looks.faults:
        return decoded.take(good), looks
    if cache and entry:
        content: dict[str, Any] = {"images": images, "labels": listing.labels, **looks.arrays()}
        cache.store(entry, lambda file: np.savez(file, **content))
    return decoded, looks


def open_files(
    listing: Listing, steps: Preprocessing, cache: Cache | None, skip_bad: bool = False
) -> tuple[ImageFiles, Looks]:
    """Decode every image once, to find the unreadable ones and to sum up the pixels.

    The result is cached like decoded sets, so an unchanged folder is read only once.

    Raises:
        DataError: Images are unreadable, or none is left of a class.
    """
    entry = _entry(cache, listing, steps, "summed")
    if cache and entry and (stored := cache.load(entry, _read_arrays)):
        return ImageFiles(listing, steps, stored.pop("sums")), Looks(**stored)
    sums = np.empty((len(listing.refs), 2, 3), np.int64)

    def keep(index: int, pixels: NDArray[np.uint8]) -> None:
        sums[index] = channel_sums(pixels)

    good, looks = _look_at_all(listing, steps, skip_bad, keep)
    if looks.faults:
        return ImageFiles(listing.take(good), steps, sums[good]), looks
    if cache and entry:
        content = {"sums": sums, **looks.arrays()}
        cache.store(entry, lambda file: np.savez(file, **content))
    return ImageFiles(listing, steps, sums), looks


def _look_at_all(
    listing: Listing,
    steps: Preprocessing,
    skip_bad: bool,
    keep: Callable[[int, NDArray[np.uint8]], None],
) -> tuple[NDArray[np.int64], Looks]:
    """Decode every image; return the indices of the readable ones, and their properties."""

    def look(index: int) -> Look | str:
        try:
            pixels, found = read_and_look(listing.refs[index], steps)
        except DataError as error:
            return f"{listing.where(index)}: {error}"
        keep(index, pixels)
        return found

    # Pillow decodes and resizes outside the interpreter lock.
    with ThreadPoolExecutor(usable_cpus()) as pool:
        found = list(pool.map(look, range(len(listing.refs))))
    faults = tuple(each for each in found if isinstance(each, str))
    good = np.array([i for i, each in enumerate(found) if not isinstance(each, str)], np.int64)
    if faults:
        _report_unreadable(faults, skip_bad)
        where = f"data: split {listing.split}, without the unreadable images"
        check_classes(listing.labels[good], listing.classes, where)
    looks = [each for each in found if not isinstance(each, str)]
    return good, Looks(
        formats=np.array([each.format for each in looks], np.str_),
        sizes_px=np.array([(each.width_px, each.height_px) for each in looks], np.int32),
        sizes_bytes=np.array([each.size_bytes for each in looks], np.int64),
        digests=np.frombuffer(b"".join(each.digest for each in looks), np.uint8).reshape(-1, 16),
        faults=faults,
    )


def _report_unreadable(faults: Sequence[str], skip_bad: bool) -> None:
    """Warn of unreadable images, or raise.

    Raises:
        DataError: `skip_bad` is false.
    """
    shown = "; ".join(faults[:_LISTED]) + ("; ..." if len(faults) > _LISTED else "")
    if not skip_bad:
        raise DataError(f"data: {len(faults)} unreadable images (--skip-bad skips them): {shown}")
    _log.warning("data: left out %d unreadable images: %s", len(faults), shown)


def _entry(cache: Cache | None, listing: Listing, steps: Preprocessing, kind: str) -> Path | None:
    if cache is None:
        return None
    parts = (kind, identity(listing.refs), listing.labels.tobytes(), sorted(asdict(steps).items()))
    return cache.entry(*parts, suffix="npz")


def _read_arrays(entry: Path) -> dict[str, Any]:
    # Opened here, since NumPy leaves a damaged file open.
    with entry.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        return dict(stored.items())
