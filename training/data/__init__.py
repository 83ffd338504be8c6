"""Data sets by specification: `digits`, `cifar10` or `imagefolder:PATH`."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from training.data import files, folder
from training.data.digits import load_digits
from training.data.files import ImageFiles
from training.data.images import Preprocessing
from training.data.imageset import (
    Dataset,
    Images,
    ImageSet,
    Kept,
    check_classes,
    stratified_split,
)
from training.errors import DataError

__all__ = [
    "Dataset",
    "ImageFiles",
    "ImageSet",
    "Images",
    "Preprocessing",
    "folder_path",
    "load_data",
    "open_data",
]

VALID_SHARE = 0.1
STREAM_OVER_BYTES = 4 * 2**30
_SPLIT_SEED = 0


def load_data(
    spec: str,
    preprocessing: Preprocessing | None = None,
    *,
    cache: Path | None = None,
    skip_bad: bool = False,
) -> Dataset[ImageSet]:
    """Loads a data set into memory, at one size.

    Where it has no validation images, a tenth of every training class is held out (stratified, with
    a fixed seed). CIFAR-10's test set holds near-duplicates of 3.25 % of its images (Barz and
    Denzler, 2020, "Do We Train on Test Data?").

    Args:
        spec: `digits`, `cifar10` (downloaded once) or `imagefolder:PATH`.
        preprocessing: Size and filter; 32 x 32 bilinear where it is left out.
        cache: Folder for decoded images and downloads; by default the user's cache folder.
        skip_bad: Leave unreadable files out instead of refusing the set.

    Raises:
        DataError: The specification is unknown, or the data is missing, unreadable or unfit.
    """
    steps = preprocessing or Preprocessing()
    store = cache or default_cache()
    if spec == "digits":
        return load_digits(steps)
    if spec == "cifar10":
        return _load_cifar10(store, steps)
    root = folder_path(spec)
    return _with_splits(root, lambda part: folder.decode(part, steps, store, skip_bad))


def open_data(
    spec: str,
    preprocessing: Preprocessing,
    *,
    stream: bool | None = None,
    cache: Path | None = None,
    skip_bad: bool = False,
) -> Dataset[ImageSet] | Dataset[ImageFiles]:
    """Loads a data set, or leaves the images of a large folder in their files.

    Args:
        spec: As for `load_data`.
        preprocessing: Size and filter.
        stream: Leave a folder's images in their files; None does so where all of them decoded would
            take more than 4 GiB.
        cache: As for `load_data`.
        skip_bad: As for `load_data`.

    Raises:
        DataError: As `load_data`.
    """
    if not spec.startswith("imagefolder:"):
        return load_data(spec, preprocessing, cache=cache, skip_bad=skip_bad)
    root, store = folder_path(spec), cache or default_cache()
    if stream is None:
        count = len(folder.list_images(root / "train").paths)
        size_bytes = 3 * preprocessing.height_px * preprocessing.width_px * count
        stream = size_bytes > STREAM_OVER_BYTES
    if not stream:
        return load_data(spec, preprocessing, cache=cache, skip_bad=skip_bad)
    return _with_splits(root, lambda part: files.open_files(part, preprocessing, store, skip_bad))


def default_cache() -> Path:
    """Where decoded images are kept: `$XDG_CACHE_HOME/convoy`, by default `~/.cache/convoy`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convoy"


def folder_path(spec: str) -> Path:
    """The path in `imagefolder:PATH`.

    Raises:
        DataError: It is another specification.
    """
    kind, _, path = spec.partition(":")
    if kind != "imagefolder" or not path:
        raise DataError(f"data: expected digits, cifar10 or imagefolder:PATH, got {spec!r}")
    return Path(path)


def _with_splits(root: Path, read: Callable[[folder.Listing], Kept]) -> Dataset[Kept]:
    listing = folder.list_images(root / "train")
    train = read(listing)
    others = {
        name: read(folder.list_images(root / name, listing.classes))
        for name in ("valid", "test")
        if name == "test" or (root / name).is_dir()
    }
    if "valid" in others:
        return Dataset(train, others["valid"], others["test"], listing.classes)
    return _with_valid(train, others["test"], listing.classes)


def _load_cifar10(cache: Path, steps: Preprocessing) -> Dataset[ImageSet]:
    from torchvision.datasets import CIFAR10

    if (steps.height_px, steps.width_px) != (32, 32):
        raise DataError(f"data cifar10: expected image size 32 px, got {steps.height_px}")
    try:
        train, test = (CIFAR10(cache, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise DataError(f"data cifar10: cannot be downloaded: {error}") from error
    sets = [ImageSet(part.data, np.array(part.targets, np.int64)) for part in (train, test)]
    return _with_valid(sets[0], sets[1], tuple(train.classes))


def _with_valid(train: Kept, test: Kept, classes: tuple[str, ...]) -> Dataset[Kept]:
    check_classes(train.labels, classes)
    kept, held_out = stratified_split(train.labels, VALID_SHARE, _SPLIT_SEED)
    return Dataset(train.take(kept), train.take(held_out), test, classes)
