"""Pictures and a page of a finished run: curves, confusions, calibration, wrong answers."""

import base64
import html
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from convoy.training.evaluate import Evaluation, evaluation_mode

_NUMBERED_CLASSES = 20
_SHOWN = 25
_PAIRS = 20
_BINS = 10
_COLUMNS = 5


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """The content of a report.

    Attributes:
        name: Title of the report.
        classes: Names by label.
        tested: On the test images, before the temperature.
        temperature: The divisor of the logits.
        best_epoch: The epoch of the saved weights.
        recipe: Its settings.
        data_lines: The data report.
        wrong: Pixels of misclassified test images `[M, H, W, 3]` uint8, in the order of
            `misclassified`.
    """

    name: str
    classes: Sequence[str]
    tested: Evaluation
    temperature: float
    best_epoch: int
    recipe: Mapping[str, object]
    data_lines: Sequence[str]
    wrong: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Calibration:
    """How often predictions of each confidence are right.

    Attributes:
        confidence: Mean of each bin's largest probabilities `[B]`; NaN of an empty bin.
        accuracy: Share of right answers `[B]`, likewise.
        counts: Images `[B]`.
        error: Expected calibration error: the mean difference, weighted by counts.
    """

    confidence: Tensor
    accuracy: Tensor
    counts: Tensor
    error: float


def write_report(folder: Path, finished: FinishedRun) -> Figure:
    """Write `report.png` and `report.html` from the folder's metrics.jsonl and the evaluation."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    epochs = [json.loads(line) for line in lines]
    tested, classes = finished.tested, finished.classes
    figure = Figure(figsize=(15, 5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(finished.name)
    loss, accuracy, matrix = figure.subplots(1, 3)
    for axes, name, unit in (
        (loss, "loss", "mean loss per sample, nats"),
        (accuracy, "accuracy", "accuracy"),
    ):
        _draw_curves(axes, epochs, name, unit, finished.best_epoch)
    accuracy.set_title(f"test accuracy {tested.accuracy:.4f} ({len(tested.labels)} images)")
    _fill_confusion(matrix, confusion_matrix(tested, len(classes)), classes)
    png = to_png(figure)
    (folder / "report.png").write_bytes(png)
    page = "\n".join(_page(finished, png))
    (folder / "report.html").write_text(page, encoding="utf-8")
    return figure


def draw_confusion(tested: Evaluation, classes: Sequence[str]) -> Figure:
    """Draw the confusion matrix alone."""
    figure = Figure(figsize=(8, 8), layout="constrained")
    FigureCanvasAgg(figure)
    _fill_confusion(figure.subplots(), confusion_matrix(tested, len(classes)), classes)
    return figure


def draw_calibration(tested: Evaluation, temperature: float) -> Figure:
    """Draw accuracy over confidence, with the temperature and without it."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="gray", linestyle=":", label="calibrated")
    for divisor, label in ((1.0, "before"), (temperature, f"temperature {temperature:.2f}")):
        found = calibration(tested, divisor)
        filled = found.counts > 0
        axes.plot(
            found.confidence[filled].numpy(),
            found.accuracy[filled].numpy(),
            marker=".",
            label=f"{label}: error {found.error:.3f}",
        )
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.set_title("calibration on test images")
    axes.legend()
    return figure


def draw_misclassified(finished: FinishedRun) -> Figure | None:
    """Draw wrong answers with their true and predicted class; None if there are none."""
    rows = list(_wrong_answers(finished))
    if not rows:
        return None
    height = -(-len(rows) // _COLUMNS)
    figure = Figure(figsize=(2.2 * _COLUMNS, 2.5 * height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(height, _COLUMNS, squeeze=False).flatten()
    for axes in grid:
        axes.axis("off")
    for axes, (pixels, caption) in zip(grid, rows, strict=False):
        axes.imshow(pixels)
        axes.set_title(caption, fontsize=8)
    return figure


def confusion_matrix(tested: Evaluation, n_classes: int) -> Tensor:
    """Return counts `[K, K]` int64: rows are true classes, columns predicted ones."""
    pairs = tested.labels * n_classes + tested.logits.argmax(1)
    return torch.bincount(pairs, minlength=n_classes**2).view(n_classes, n_classes)


def confused_pairs(counts: Tensor) -> list[tuple[int, int, int]]:
    """Return the most frequent confusions, at most 20: true class, predicted class, how many."""
    wrong = counts.clone()
    wrong.fill_diagonal_(0)
    values, places = wrong.flatten().sort(descending=True, stable=True)
    chosen = zip(places[:_PAIRS].tolist(), values[:_PAIRS].tolist(), strict=True)
    return [(*divmod(place, len(counts)), count) for place, count in chosen if count]


def class_accuracy(counts: Tensor) -> Tensor:
    """Share of each class's images that are right `[K]`; NaN of a class without any."""
    return counts.diagonal() / counts.sum(1)


def calibration(tested: Evaluation, temperature: float = 1.0) -> Calibration:
    """Sort predictions into ten bins by their confidence.

    Source: Guo et al. (2017), "On Calibration of Modern Neural Networks".
    """
    confidence, predicted = torch.softmax(tested.logits.double() / temperature, 1).max(1)
    right = (predicted == tested.labels).double()
    bins = (confidence * _BINS).long().clamp(max=_BINS - 1)
    counts = torch.bincount(bins, minlength=_BINS)
    means = torch.bincount(bins, confidence, _BINS) / counts
    shares = torch.bincount(bins, right, _BINS) / counts
    error = (counts * (means - shares).abs()).nansum() / len(right)
    return Calibration(means, shares, counts, float(error))


def misclassified(tested: Evaluation) -> Tensor:
    """Return the indices of wrong answers, the most confident first, at most 25."""
    confidence, predicted = torch.softmax(tested.logits, 1).max(1)
    wrong = (predicted != tested.labels).nonzero()[:, 0]
    return wrong[confidence[wrong].argsort(descending=True)][:_SHOWN]


def first_filters(net: nn.Module) -> Tensor | None:
    """Return the first convolution's kernels `[F, 3, k, k]` in 0..1; None if it takes no RGB."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            kernels = module.weight.detach().cpu()
            return _to_unit_range(kernels) if kernels.shape[1] == 3 else None
    return None


def feature_maps(net: nn.Module, image: Tensor) -> Tensor:
    """Return the first convolution's output `[F, 1, H, W]` in 0..1 for an image `[1, 3, H, W]`."""
    first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
    with evaluation_mode(net):
        maps = first(image).float().cpu()[0][:, None]
    return _to_unit_range(maps).clone()


def to_png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


def _to_unit_range(images: Tensor) -> Tensor:
    """Scale each of `[F, C, H, W]` to 0..1."""
    low, high = images.amin((1, 2, 3), True), images.amax((1, 2, 3), True)
    return torch.div(images - low, (high - low).clamp_min(1e-12))


def _draw_curves(
    axes: Axes, epochs: Sequence[dict[str, float]], name: str, unit: str, best_epoch: int
) -> None:
    numbers = [line["epoch"] for line in epochs]
    for split in ("train", "valid"):
        axes.plot(numbers, [line[f"{split}_{name}"] for line in epochs], label=split, marker=".")
    axes.axvline(best_epoch, color="gray", linestyle=":", label=f"kept: epoch {best_epoch}")
    axes.set_xlabel("epoch")
    axes.set_ylabel(unit)
    axes.legend()


def _fill_confusion(axes: Axes, counts: Tensor, classes: Sequence[str]) -> None:
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title("test images")
    if len(classes) > _NUMBERED_CLASSES:
        return
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    for (row, column), count in zip(
        torch.cartesian_prod(*2 * (torch.arange(len(classes)),)).tolist(),
        counts.flatten().tolist(),
        strict=True,
    ):
        if count:
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=7)


def _wrong_answers(finished: FinishedRun) -> Iterator[tuple[NDArray[np.uint8], str]]:
    """Yield pixels `[H, W, 3]` and a caption of each misclassified image that is shown."""
    tested, classes = finished.tested, finished.classes
    confidence, predicted = torch.softmax(tested.logits / finished.temperature, 1).max(1)
    for pixels, place in zip(finished.wrong, misclassified(tested).tolist(), strict=True):
        truth, answer = classes[int(tested.labels[place])], classes[int(predicted[place])]
        yield pixels, f"{truth} → {answer}, {confidence[place]:.0%}"


def _page(finished: FinishedRun, curves: bytes) -> Iterator[str]:
    """Yield the lines of report.html, which refers to no other file; `curves` is a PNG file."""
    tested, classes = finished.tested, finished.classes
    counts = confusion_matrix(tested, len(classes))
    title = html.escape(finished.name)
    yield f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    yield "<style>body{font:15px sans-serif;margin:2em;max-width:80em}img{max-width:100%}"
    yield "table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right}"
    yield "td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:#f2f2f2}"
    yield "figure{display:inline-block;margin:.5em;width:10em;font-size:.8em}"
    yield "figure img{width:100%;image-rendering:pixelated}</style></head><body>"
    yield f"<h1>{title}</h1>"
    yield (
        f"<p>Test accuracy {tested.accuracy:.4f} on {len(tested.labels)} images, loss "
        f"{tested.loss:.4f}; best epoch {finished.best_epoch}, temperature "
        f"{finished.temperature:.3f}.</p>"
    )
    yield _embedded(curves, "loss and accuracy per epoch, confusion matrix")
    yield "<h2>Classes</h2>"
    shares = class_accuracy(counts)
    # Classes without test images come last.
    cells = [
        (classes[row], f"{shares[row]:.2%}", int(counts[row].sum()))
        for row in shares.argsort().tolist()
    ]
    yield _table(("class", "accuracy", "test images"), cells)
    yield "<h2>Most confused</h2>"
    pairs = [(classes[a], classes[b], count) for a, b, count in confused_pairs(counts)]
    yield _table(("true", "predicted", "images"), pairs)
    yield "<h2>Calibration</h2>"
    drawn = to_png(draw_calibration(tested, finished.temperature))
    yield _embedded(drawn, "accuracy over confidence")
    yield "<h2>Misclassified</h2>"
    for pixels, caption in _wrong_answers(finished):
        yield f"<figure>{_image(pixels)}<figcaption>{html.escape(caption)}</figcaption></figure>"
    if finished.data_lines:
        yield "<h2>Data</h2><pre>"
        yield html.escape("\n".join(finished.data_lines))
        yield "</pre>"
    yield "<h2>Recipe</h2>"
    yield _table(("setting", "value"), list(finished.recipe.items()))
    yield "</body></html>"


def _table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def line(cells: Sequence[object], tag: str) -> str:
        inside = "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)
        return f"<tr>{inside}</tr>"

    return "\n".join(["<table>", line(headings, "th"), *(line(r, "td") for r in rows), "</table>"])


def _image(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return _embedded(buffer.getvalue(), "")


def _embedded(png: bytes, text: str) -> str:
    source = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{source}">'
