"""The accuracy of a job: predicted classes against true ones."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from convoy.client.batch.errors import InputError, needs_extra
from convoy.client.batch.items import Source
from convoy.client.batch.parts import replacing

# More names would overlap, and nobody could read more numbers.
_NAMED_CLASSES = 60
_NUMBERED_CLASSES = 20
_SHOWN_LABELS = 5


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Accuracies, 0 to 1, over the images whose true label is a class of the model.

    Attributes:
        images: The number of these images, those that failed included.
        errors: Those that failed; they count as wrong.
        left_out: Other images, by their true label.
        accuracy: Correct answers over all these images.
        accuracy_of_classified: Correct answers over those that did not fail.
        per_class: Accuracy over all images of each class that has any.
        images_per_class: The number of images of each class, by their true label.
        classes: The names of rows and columns of the matrix, in the model's order.
        confusion: Images `[true, predicted]`, without those that failed.
    """

    images: int
    errors: int
    left_out: Mapping[str, int]
    accuracy: float
    accuracy_of_classified: float
    per_class: Mapping[str, float]
    images_per_class: Mapping[str, int]
    classes: tuple[str, ...]
    confusion: NDArray[np.int64]


def evaluate(
    pairs: Mapping[tuple[str, str | None], int], classes: Sequence[str]
) -> Evaluation | None:
    """Count correct answers; None if no true label is a class.

    Args:
        pairs: Images by their true label and the predicted one, None for an error.
        classes: The model's classes.
    """
    position = {name: number for number, name in enumerate(classes)}
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    failed = np.zeros(len(classes), np.int64)
    left_out: Counter[str] = Counter()
    for (truth, label), count in pairs.items():
        if truth not in position:
            left_out[truth] += count
        elif label is None:
            failed[position[truth]] += count
        elif label in position:
            confusion[position[truth], position[label]] += count
        else:  # a class of another version of the model
            failed[position[truth]] += count
    hits, totals = confusion.diagonal(), confusion.sum(axis=1) + failed
    images, classified = int(totals.sum()), int(confusion.sum())
    if not images:
        return None
    return Evaluation(
        images=images,
        errors=int(failed.sum()),
        left_out=left_out,
        accuracy=float(hits.sum() / images),
        accuracy_of_classified=float(hits.sum() / classified) if classified else 0.0,
        per_class={
            name: float(hit / total)
            for name, hit, total in zip(classes, hits, totals, strict=True)
            if total
        },
        images_per_class={
            name: int(total) for name, total in zip(classes, totals, strict=True) if total
        },
        classes=tuple(classes),
        confusion=confusion,
    )


def true_labels(source: Source, start: int, column: str) -> Iterator[str]:
    """Yield the true label of each item of a source.

    Args:
        source: The input.
        start: The number of the first item.
        column: The column of labels; empty for the folder that an image lies in.
    """
    if column:
        return (str(row[column]) for row in source.columns(start, (column,)))
    return map(folder_of, source.keys(start))


def folder_of(key: str) -> str:
    """Return the name of the folder that a path lies in; empty if it has none."""
    return key.rpartition("/")[0].rpartition("/")[2]


def check_labels(source: Source, column: str, classes: Sequence[str]) -> Mapping[str, int]:
    """Compare the true labels with the model's classes, before any image is classified.

    Returns:
        Images whose label is not a class, by label.

    Raises:
        InputError: No label is a class.
    """
    found = Counter(true_labels(source, 0, column))
    unknown = {label: count for label, count in found.items() if label not in set(classes)}
    if len(unknown) == len(found):
        where = f"the column {column!r}" if column else "folders"
        raise InputError(
            f"--evaluate: no image has a label that is a class of the model: {where} "
            f"{_some(found)}; classes {_some(classes)}"
        )
    return unknown


def draw_confusion(evaluation: Evaluation, path: Path) -> None:
    """Draw the confusion matrix as a PNG; colors are shares of the true class.

    Raises:
        BatchError: matplotlib is not installed.
    """
    with needs_extra("batch", "the confusion matrix"):
        from matplotlib.figure import Figure
    counts, names = evaluation.confusion, evaluation.classes
    side_inches = min(20.0, 3 + 0.35 * len(names))
    figure = Figure((side_inches, side_inches), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"accuracy {evaluation.accuracy:.4f} over {evaluation.images} images")
    if len(names) <= _NAMED_CLASSES:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(names) <= _NUMBERED_CLASSES:
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _some(labels: Sequence[str] | Mapping[str, int]) -> str:
    shown = [label or "''" for label in list(labels)[:_SHOWN_LABELS]]
    return ", ".join(shown) + (", …" if len(labels) > _SHOWN_LABELS else "")
