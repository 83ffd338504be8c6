"""The content of a data set before decoding: images by split, and the files left out."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from convoy.training.data.images import ImageRef, printable
from convoy.training.data.imageset import check_classes
from convoy.training.errors import DataError

SPLITS = ("train", "valid", "test")
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "valid",
    "valid": "valid",
    "validation": "valid",
    "dev": "valid",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file or folder that is not used, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Listing:
    """The images of one split, in a fixed order.

    Attributes:
        refs: Where each image is.
        labels: `[N]`.
        classes: Names by label.
        split: For messages.
    """

    refs: tuple[ImageRef, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    split: str = "train"

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files; an archive comes once for each image in it."""
        return tuple(ref.path for ref in self.refs)

    def take(self, indices: Iterable[int]) -> "Listing":
        """Return the images at `indices`, in that order."""
        chosen = list(indices)
        refs = tuple(self.refs[i] for i in chosen)
        return Listing(refs, self.labels[chosen], self.classes, self.split)

    def where(self, index: int) -> str:
        """Name the split and the class of an image."""
        return f"{self.split}, class {self.classes[self.labels[index]]!r}"


@dataclass(frozen=True, slots=True)
class Found:
    """A whole data set.

    Attributes:
        splits: Listings by name; there is "train", and there may be "valid" and "test".
        left_out: The files in none of them.
    """

    splits: Mapping[str, Listing]
    left_out: tuple[LeftOut, ...] = field(default=())

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by label."""
        return self.splits["train"].classes


def split_of(name: str) -> str | None:
    """Return the split that a word in a folder's name or a column means; None if there is none."""
    return _SPLIT_NAMES.get(name.lower())


def split_in(name: str) -> str | None:
    """Return the split that a file's name holds as a word, as train-00001-of-00009.parquet."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for word in words if (split := split_of(word))), None)


def make_found(
    where: str,
    samples: Sequence[tuple[ImageRef, str, str]],
    left_out: Sequence[LeftOut] = (),
    names: Sequence[str] = (),
) -> Found:
    """Put samples of (image, class name, split) together.

    Args:
        where: Names the data in messages.
        samples: In their order within each split.
        left_out: The files that are not used.
        names: Classes in their order; by default those of "train", sorted, numbers by value.

    Raises:
        DataError: A split has no image of a class, or a class of its own.
    """
    in_train = {label for _, label, split in samples if split == "train"}
    if not in_train:
        raise DataError(f"{where}: expected images of the split train, found none")
    classes = tuple(names) or tuple(sorted(in_train, key=_by_number_or_name))
    numbers = {name: index for index, name in enumerate(classes)}
    splits = {}
    for split in SPLITS:
        chosen = [(ref, label) for ref, label, of in samples if of == split]
        if not chosen:
            continue
        unknown = sorted({label for _, label in chosen} - numbers.keys())
        if unknown:
            raise DataError(
                f"{where}: split {split}: expected the classes of train, got also {unknown}"
            )
        labels = np.array([numbers[label] for _, label in chosen], np.int64)
        check_classes(labels, classes, f"{where}: split {split}")
        splits[split] = Listing(tuple(ref for ref, _ in chosen), labels, classes, split)
    return Found(splits, tuple(left_out))


def _by_number_or_name(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def check_name(kind: str, name: str) -> str:
    """Return a class's name, which the manifest holds as UTF-8.

    Raises:
        DataError: It is not UTF-8.
    """
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{kind} '{printable(name)}': expected a name in UTF-8") from None
    return name
