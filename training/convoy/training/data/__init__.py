"""Data sets by specification: digits, cifar10, imagefolder:PATH, table:FILE or shards:PATTERN."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from convoy.training.data import decoding, folder, shards, table
from convoy.training.data.cache import DEFAULT_MAX_BYTES, Cache
from convoy.training.data.decoding import ImageFiles, Looks
from convoy.training.data.digits import load_digits
from convoy.training.data.images import Preprocessing
from convoy.training.data.imageset import (
    Dataset,
    Images,
    ImageSet,
    Kept,
    check_classes,
    stratified_split,
)
from convoy.training.data.inventory import Inventory
from convoy.training.data.listing import Found, Listing
from convoy.training.errors import DataError

__all__ = [
    "DEFAULT_MAX_BYTES",
    "Cache",
    "Dataset",
    "ImageFiles",
    "ImageSet",
    "Images",
    "Preprocessing",
    "Shares",
    "default_cache",
    "load_data",
    "open_data",
    "save_images",
]

STREAM_OVER_BYTES = 4 * 2**30
_SPLIT_SEED = 0


@dataclass(frozen=True, slots=True)
class Shares:
    """The shares of the training images to hold out if the data has no such split, 0 to 1.

    At least one image of every class is held out, chosen with a fixed seed: the same images every
    time. The validation share is a share of the images that remain after the test share.
    """

    valid: float = 0.1
    test: float = 0.1

    def __post_init__(self) -> None:
        for name in ("valid", "test"):
            if not 0 < getattr(self, name) < 1:
                raise DataError(f"{name}_share: expected 0 < x < 1, got {getattr(self, name)}")


def load_data(
    spec: str,
    preprocessing: Preprocessing | None = None,
    *,
    cache: Path | Cache | None = None,
    skip_bad: bool = False,
    shares: Shares | None = None,
) -> Dataset[ImageSet]:
    """Load a data set into memory, at one size.

    Where it has no validation or no test images, a share of every training class is held out
    (stratified, with a fixed seed). CIFAR-10's test set holds near-duplicates of 3.25 % of its
    images (Barz and Denzler, 2020, "Do We Train on Test Data?").

    Args:
        spec: `digits`, `cifar10` (downloaded once), `imagefolder:PATH`, `table:FILE` (CSV or
            Parquet) or `shards:PATTERN` (tar or Parquet files, local or by URL).
        preprocessing: Size and filter; by default 32 x 32 px, bilinear.
        cache: For decoded images and downloads; by default in the user's cache folder.
        skip_bad: Leave unreadable files out instead of raising.
        shares: What to hold out.

    Raises:
        DataError: The specification is unknown, or the data is missing, unreadable or unsuitable.
    """
    steps = preprocessing or Preprocessing()
    store, held_out = _cache(cache), shares or Shares()
    if spec == "digits":
        return load_digits(steps)
    if spec == "cifar10":
        return _load_cifar10(store.folder, steps, held_out)
    found = _find(spec, store)
    return _read(
        spec, found, steps, held_out, lambda part: decoding.decode(part, steps, store, skip_bad)
    )


def open_data(
    spec: str,
    preprocessing: Preprocessing,
    *,
    stream: bool | None = None,
    cache: Path | Cache | None = None,
    skip_bad: bool = False,
    shares: Shares | None = None,
) -> Dataset[ImageSet] | Dataset[ImageFiles]:
    """Load a data set, or open it for streaming if it is large.

    Args:
        spec: As for `load_data`.
        preprocessing: Size and filter.
        stream: Decode the images from their files at each read; None does so if the decoded
            training images would take more than 4 GiB. Digits and CIFAR-10 are always loaded.
        cache: As for `load_data`.
        skip_bad: As for `load_data`.
        shares: As for `load_data`.

    Raises:
        DataError: As `load_data`.
    """
    if spec in ("digits", "cifar10"):
        return load_data(spec, preprocessing, cache=cache, shares=shares)
    store, held_out = _cache(cache), shares or Shares()
    found = _find(spec, store)
    if stream is None:
        count = len(found.splits["train"].refs)
        size_bytes = 3 * preprocessing.height_px * preprocessing.width_px * count
        stream = size_bytes > STREAM_OVER_BYTES
    if stream:
        return _read(
            spec,
            found,
            preprocessing,
            held_out,
            lambda part: decoding.open_files(part, preprocessing, store, skip_bad),
        )
    return _read(
        spec,
        found,
        preprocessing,
        held_out,
        lambda part: decoding.decode(part, preprocessing, store, skip_bad),
    )


def save_images(dataset: Dataset[ImageSet], folder: Path) -> dict[str, int]:
    """Write every image as FOLDER/SPLIT/CLASS/NUMBER.png; numbers count within a split.

    Returns:
        The number of images by split: train, valid, test.

    Raises:
        DataError: The folder exists already or cannot be written.
    """
    splits = {"train": dataset.train, "valid": dataset.valid, "test": dataset.test}
    try:
        folder.mkdir(parents=True)
        for split, images in splits.items():
            for name in dataset.classes:
                (folder / split / name).mkdir(parents=True)
            digits = len(str(len(images) - 1))
            for number, (pixels, label) in enumerate(
                zip(images.images, images.labels, strict=True)
            ):
                path = folder / split / dataset.classes[label] / f"{number:0{digits}}.png"
                Image.fromarray(pixels).save(path)
    except FileExistsError as error:
        raise DataError(f"folder: expected one that does not exist, got {str(folder)!r}") from error
    except OSError as error:
        raise DataError(f"folder {str(folder)!r}: {error.strerror or error}") from error
    return {split: len(images) for split, images in splits.items()}


def default_cache() -> Path:
    """Return the folder for decoded images: `$XDG_CACHE_HOME/convoy` or `~/.cache/convoy`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convoy"


def _cache(given: Path | Cache | None) -> Cache:
    return given if isinstance(given, Cache) else Cache(given or default_cache())


def _find(spec: str, cache: Cache) -> Found:
    kind, _, place = spec.partition(":")
    if place and kind == "imagefolder":
        return folder.find(Path(place))
    if place and kind == "table":
        return table.find(Path(place))
    if place and kind == "shards":
        return shards.find(place, cache)
    raise DataError(
        "data: expected digits, cifar10, imagefolder:PATH, table:FILE or shards:PATTERN, "
        f"got {spec!r}"
    )


def _read(
    spec: str,
    found: Found,
    steps: Preprocessing,
    shares: Shares,
    read: Callable[[Listing], tuple[Kept, Looks]],
) -> Dataset[Kept]:
    """Read every split, hold out what is missing, and take stock."""
    images, looks = {}, {}
    for split, listing in found.splits.items():
        images[split], looks[split] = read(listing)
    dataset = _held_out(images, shares, found.classes)
    counts = {
        split: np.bincount(part.labels, minlength=len(found.classes)).tolist()
        for split, part in (
            ("train", dataset.train),
            ("valid", dataset.valid),
            ("test", dataset.test),
        )
    }
    inventory = Inventory(spec, found.classes, counts, looks, found.left_out, steps)
    return replace(dataset, inventory=inventory)


def _held_out(images: dict[str, Kept], shares: Shares, classes: tuple[str, ...]) -> Dataset[Kept]:
    train, parts = images["train"], dict(images)
    # A seed of its own, so that the validation images are the same with and without it.
    for split, share, seed in (
        ("test", shares.test, _SPLIT_SEED + 1),
        ("valid", shares.valid, _SPLIT_SEED),
    ):
        if split not in parts:
            kept, held_out = stratified_split(train.labels, share, seed, classes)
            train, parts[split] = train.take(kept), train.take(held_out)
    return Dataset(train, parts["valid"], parts["test"], classes)


def _load_cifar10(cache: Path, steps: Preprocessing, shares: Shares) -> Dataset[ImageSet]:
    from torchvision.datasets import CIFAR10

    if (steps.height_px, steps.width_px) != (32, 32):
        raise DataError(f"data cifar10: expected image size 32 px, got {steps.height_px}")
    try:
        train, test = (CIFAR10(cache, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise DataError(f"data cifar10: cannot be downloaded: {error}") from error
    sets = [ImageSet(part.data, np.array(part.targets, np.int64)) for part in (train, test)]
    classes = tuple(train.classes)
    check_classes(sets[0].labels, classes)
    return _held_out({"train": sets[0], "test": sets[1]}, shares, classes)
