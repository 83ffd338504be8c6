"""Folders of images: one per class, below train, valid and test or directly in the folder."""

import os
from collections.abc import Iterator
from pathlib import Path

from convoy.training.data.image_file import FORMATS
from convoy.training.data.images import (
    HEADER_BYTES,
    OTHER_SUFFIXES,
    SUFFIXES,
    ImageRef,
    format_of,
    printable,
)
from convoy.training.data.listing import (
    Found,
    LeftOut,
    Listing,
    check_name,
    make_found,
    split_of,
)
from convoy.training.errors import DataError

# Files that systems and tools put beside the user's files.
_HIDDEN_STARTS = (".", "@", "~$")
_HIDDEN_NAMES = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN"})


def find(root: Path) -> Found:
    """List `root/SPLIT/CLASS/**`, or `root/CLASS/**` where there is no folder of a split.

    A validation folder may be called valid, val or validation. A class is a folder with an image in
    it. Linked folders are followed, once each.

    Raises:
        DataError: A folder is missing, a split has a class of its own or none, or a name is not
            UTF-8.
    """
    if not root.is_dir():
        raise DataError(
            f"data: expected a folder {printable(root)} with one subfolder per class, or with "
            "train/ and test/ of such, got none"
        )
    walk = _Walk()
    children = walk.folders(root)
    splits: dict[str, Path] = {}
    for child in children:
        split = split_of(child.name)
        if split and split in splits:
            raise DataError(
                f"data: expected one folder for the split {split}, got {splits[split]} and {child}"
            )
        if split:
            splits[split] = child
    if splits and "train" not in splits:
        raise DataError(
            f"data: expected a folder {printable(root / 'train')} beside {', '.join(splits)}"
        )
    if not splits:
        return make_found(f"data {printable(root)}", walk.samples(root, "train"), walk.left_out)
    walk.leave_out((each for each in children if each not in splits.values()), "is not a split")
    samples = [each for split, path in splits.items() for each in walk.samples(path, split)]
    for split, path in splits.items():
        if not any(of == split for _, _, of in samples):
            raise DataError(f"data: expected class folders with images in {printable(path)}")
    return make_found(f"data {printable(root)}", samples, walk.left_out)


def list_images(folder: Path) -> Listing:
    """List `folder/CLASS/**`.

    Raises:
        DataError: The folder is missing, or has fewer than two classes.
    """
    if not folder.is_dir():
        raise DataError(f"data: expected a folder {printable(folder)}, got none")
    samples = _Walk().samples(folder, "train")
    return make_found(f"data {printable(folder)}", samples).splits["train"]


class _Walk:
    """Lists folders, and remembers the files that it left out."""

    def __init__(self) -> None:
        self.left_out: list[LeftOut] = []
        self._seen: set[tuple[int, int]] = set()

    def leave_out(self, paths: Iterator[Path], reason: str) -> None:
        self.left_out += [LeftOut(printable(path), reason) for path in paths]

    def folders(self, folder: Path) -> list[Path]:
        """Return the sub-folders, and leave out the files beside them."""
        entries = list(self._entries(folder))
        self.leave_out((p for p in entries if not p.is_dir()), "is outside the class folders")
        return [path for path in entries if path.is_dir()]

    def samples(self, folder: Path, split: str) -> list[tuple[ImageRef, str, str]]:
        """Return the images below each sub-folder, which is a class."""
        found = []
        for child in self.folders(folder):
            paths = sorted(self._images(child))
            if not paths:
                self.leave_out(iter([child]), "is a folder without images")
                continue
            name = check_name(f"{printable(folder)}: class folder", child.name)
            found += [(ImageRef(path), name, split) for path in paths]
        return found

    def _images(self, folder: Path) -> Iterator[Path]:
        if not self._enter(folder):
            return
        for path in self._entries(folder):
            if path.is_dir():
                yield from self._images(path)
            elif reason := _why_not(path):
                self.leave_out(iter([path]), reason)
            else:
                yield path

    def _enter(self, folder: Path) -> bool:
        """Return whether a folder is new; a link may lead to one already read, or to a parent."""
        status = folder.stat()
        key = (status.st_dev, status.st_ino)
        if key in self._seen:
            self.leave_out(iter([folder]), "is a link to a folder that was already read")
            return False
        self._seen.add(key)
        return True

    def _entries(self, folder: Path) -> Iterator[Path]:
        """Yield the visible entries of a folder, sorted by name."""
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            self.leave_out(iter([folder]), f"cannot be opened: {error.strerror}")
            return
        for name in names:
            path = folder / name
            if name.startswith(_HIDDEN_STARTS) or name in _HIDDEN_NAMES:
                self.leave_out(iter([path]), "is hidden")
            elif not path.exists():
                self.leave_out(iter([path]), "is a broken link")
            else:
                yield path


def _why_not(path: Path) -> str | None:
    """Return why a file is not a candidate for an image; None if it is."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return None
    if suffix not in OTHER_SUFFIXES:
        return f"has the suffix {printable(suffix)}" if suffix else "has no suffix"
    try:
        with path.open("rb") as file:
            kind = format_of(file.read(HEADER_BYTES))
    except OSError:
        # The decoding reports its fault.
        return None
    if kind in FORMATS:
        return None
    return f"is {kind or suffix[1:].upper()}, which is not supported; convert it to JPEG or PNG"
