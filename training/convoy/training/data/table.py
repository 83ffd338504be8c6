"""Tables of image files and labels: a CSV or Parquet file with a column of each."""

import csv
from collections.abc import Sequence
from pathlib import Path

from convoy.training.data.images import ImageRef
from convoy.training.data.listing import Found, check_name, make_found, split_of
from convoy.training.errors import DataError

IMAGE_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path", "img")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "target", "category", "cls")
SPLIT_COLUMNS = ("split", "set", "subset")


def find(path: Path) -> Found:
    """List the images that a table names, in its order.

    Relative paths start at the table's folder. A column `split` holds train, valid or test; without
    it all images belong to train.

    Raises:
        DataError: The table cannot be read, or lacks a column; the message names those it has.
    """
    columns = _read(path)
    names = list(columns)
    images = columns[choose_column(f"data {path}", names, IMAGE_COLUMNS)]
    labels = columns[choose_column(f"data {path}", names, LABEL_COLUMNS)]
    split_column = next((name for name in names if name.lower() in SPLIT_COLUMNS), None)
    splits: Sequence[object] = columns[split_column] if split_column else ["train"] * len(images)
    samples = []
    for row, (image, label, split) in enumerate(zip(images, labels, splits, strict=True), 2):
        where = f"data {path}: row {row}"
        if image in (None, "") or label in (None, ""):
            raise DataError(f"{where}: expected a path and a label, got {image!r} and {label!r}")
        meant = split_of(str(split))
        if meant is None:
            raise DataError(
                f"{where}: {split_column}: expected train, valid or test, got {split!r}"
            )
        name = check_name(f"{where}: label", str(label))
        samples.append((ImageRef(path.parent / str(image)), name, meant))
    return make_found(f"data {path}", samples)


def choose_column(where: str, names: Sequence[str], known: Sequence[str]) -> str:
    """Return the first of the known names that is a column.

    Raises:
        DataError: There is none.
    """
    for wanted in known:
        for name in names:
            if name.lower() == wanted:
                return name
    raise DataError(f"{where}: expected a column {' or '.join(known)}, found {', '.join(names)}")


def _read(path: Path) -> dict[str, Sequence[object]]:
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet

            return dict(pyarrow.parquet.read_table(path).to_pydict())
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"data {path}: {error}") from error
    # pyarrow's errors are ValueErrors.
    except ValueError as error:
        raise DataError(f"data {path}: expected a Parquet file: {error}") from error
    if len(rows) < 2:
        raise DataError(
            f"data {path}: expected a line of column names and rows, got {len(rows)} lines"
        )
    width = len(rows[0])
    for number, row in enumerate(rows, 1):
        if len(row) != width:
            raise DataError(f"data {path}: row {number}: expected {width} fields, got {len(row)}")
    return dict(zip(rows[0], zip(*rows[1:], strict=True), strict=True))
