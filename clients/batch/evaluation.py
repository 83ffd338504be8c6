"""How right a job was, where the folder an image lies in is the name of its class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clients.batch.extras import needs_extra
from clients.batch.parts import replacing

# More names would overlap, and nobody could read more numbers.
_NAMED_CLASSES = 60
_NUMBERED_CLASSES = 20


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Accuracies, 0 to 1, over the classified images whose folder is a class of the model.

    Attributes:
        images: So many.
        left_out: Classified images in folders that are no class.
        per_class: Accuracy over the images of each class that has any.
        classes: Names of rows and columns of the matrix, in the model's order.
        confusion: Images, `[true, predicted]`.
    """

    images: int
    left_out: int
    accuracy: float
    per_class: Mapping[str, float]
    classes: tuple[str, ...]
    confusion: NDArray[np.int64]


def evaluate(pairs: Mapping[tuple[str, str], int], classes: Sequence[str]) -> Evaluation | None:
    """Counts hits; None where no folder is a class.

    Args:
        pairs: Images by the folder they lie in and the label they were given.
        classes: What the model can say.
    """
    position = {name: number for number, name in enumerate(classes)}
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    left_out = 0
    for (truth, label), count in pairs.items():
        if truth in position and label in position:
            confusion[position[truth], position[label]] += count
        else:
            left_out += count
    hits, totals = confusion.diagonal(), confusion.sum(axis=1)
    images = int(totals.sum())
    if not images:
        return None
    return Evaluation(
        images=images,
        left_out=left_out,
        accuracy=float(hits.sum() / images),
        per_class={
            name: float(hit / total)
            for name, hit, total in zip(classes, hits, totals, strict=True)
            if total
        },
        classes=tuple(classes),
        confusion=confusion,
    )


def draw_confusion(evaluation: Evaluation, path: Path) -> None:
    """Draws the confusion matrix as a PNG; colours are shares of the true class.

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
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
