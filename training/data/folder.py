"""A folder of images, `train/<class>/*` and `test/<class>/*`, and the cache of its pixels."""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from training.data.images import SUFFIXES, Preprocessing, read_image
from training.data.imageset import ImageSet, check_classes
from training.errors import DataError

_log = logging.getLogger(__name__)

_LISTED = 5


@dataclass(frozen=True, slots=True)
class Listing:
    """The image files of one split, in the order of their paths."""

    paths: tuple[Path, ...]
    labels: NDArray[np.int64]  # [N]
    classes: tuple[str, ...]

    def take(self, indices: Iterable[int]) -> "Listing":
        """The files at `indices`, in that order."""
        chosen = list(indices)
        return Listing(tuple(self.paths[i] for i in chosen), self.labels[chosen], self.classes)

    def fingerprint(self) -> str:
        """Changes whenever a file is added, removed, renamed, resized or rewritten."""
        digest = hashlib.sha256()
        for path in self.paths:
            status = path.stat()
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def list_images(folder: Path, classes: tuple[str, ...] | None = None) -> Listing:
    """Lists `folder/<class>/**` for the given classes, or for every sub-folder.

    Raises:
        DataError: The folder is missing, has an unknown class, one class only, or an empty class.
    """
    if not folder.is_dir():
        raise DataError(f"data: expected a folder {folder} with one sub-folder a class, got none")
    found = tuple(sorted(child.name for child in folder.iterdir() if child.is_dir()))
    unknown = sorted(set(found) - set(classes)) if classes else []
    if unknown:
        raise DataError(f"data {folder}: expected the classes of train, got also {unknown}")
    classes = classes or found
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES)
        paths += files
        labels += [label] * len(files)
    listing = Listing(tuple(paths), np.array(labels, dtype=np.int64), classes)
    check_classes(listing.labels, classes)
    return listing


def decode(
    listing: Listing, steps: Preprocessing, cache: Path | None, skip_bad: bool = False
) -> ImageSet:
    """Decodes every file, or takes the result of an earlier call from `cache`.

    Args:
        listing: What to decode.
        steps: Size and filter of the result.
        cache: Folder for decoded sets; None caches nothing. An entry is valid for the same files
            (path, size, modification time) and the same steps only.
        skip_bad: Leave unreadable files out, with a warning, instead of refusing the set.

    Raises:
        DataError: Files are unreadable, or none is left of a class.
    """
    entry = cache_entry(cache, listing, steps, "npz")
    if entry and entry.is_file():
        with np.load(entry, allow_pickle=False) as stored:
            return ImageSet(stored["images"], stored["labels"])
    images = np.empty((len(listing.paths), steps.height_px, steps.width_px, 3), np.uint8)

    def fill(index: int) -> str | None:
        try:
            images[index] = read_image(listing.paths[index], steps)
        except DataError as error:
            return str(error)
        return None

    # Pillow decodes and resizes outside the interpreter lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = list(pool.map(fill, range(len(images)), chunksize=64))
    bad = [fault for fault in faults if fault]
    decoded = ImageSet(images, listing.labels)
    if bad:
        report_unreadable(bad, skip_bad)
        decoded = decoded.take(np.array([i for i, f in enumerate(faults) if f is None], np.int64))
        check_classes(decoded.labels, listing.classes)
    elif entry:
        store(entry, lambda file: np.savez(file, images=decoded.images, labels=decoded.labels))
    return decoded


def report_unreadable(faults: list[str], skip_bad: bool) -> None:
    """Warns of unreadable files or refuses them.

    Raises:
        DataError: `skip_bad` is false.
    """
    shown = "; ".join(faults[:_LISTED]) + ("; ..." if len(faults) > _LISTED else "")
    if not skip_bad:
        raise DataError(f"data: {len(faults)} unreadable images (--skip-bad leaves out): {shown}")
    _log.warning("data: left out %d unreadable images: %s", len(faults), shown)


def cache_entry(
    cache: Path | None, listing: Listing, steps: Preprocessing, suffix: str
) -> Path | None:
    """Where `cache` keeps what was found out about these files at this size."""
    if cache is None:
        return None
    text = f"{listing.fingerprint()} {sorted(asdict(steps).items())}"
    return cache / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.{suffix}"


def store(entry: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Writes a cache entry atomically; where that fails, warns and leaves none."""
    temporary = None
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=entry.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            write(file)
        temporary.replace(entry)
    except OSError as error:
        _log.warning("data: cannot cache decoded images in %s: %s", entry.parent, error)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
