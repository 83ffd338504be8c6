"""Pictures of a finished run: curves, confusion matrix, first filters, what was got wrong."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from training.evaluate import Evaluation, evaluation_mode

_NUMBERED_CLASSES = 20
_SHOWN = 25


def write_report(folder: Path, classes: Sequence[str], tested: Evaluation) -> Figure:
    """Draws `report.png` from the folder's metrics.jsonl and the evaluation on test images."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    epochs = [json.loads(line) for line in lines]
    figure = Figure(figsize=(15, 5), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, matrix = figure.subplots(1, 3)
    _draw_curves(loss, epochs, "loss", "mean loss of a sample, nats")
    _draw_curves(accuracy, epochs, "accuracy", "accuracy")
    accuracy.set_title(f"test accuracy {tested.accuracy:.4f} ({len(tested.labels)} images)")
    _fill_confusion(matrix, confusion_matrix(tested, len(classes)), classes)
    figure.savefig(folder / "report.png", dpi=80)
    return figure


def draw_confusion(tested: Evaluation, classes: Sequence[str]) -> Figure:
    """Draws the confusion matrix alone."""
    figure = Figure(figsize=(8, 8), layout="constrained")
    FigureCanvasAgg(figure)
    _fill_confusion(figure.subplots(), confusion_matrix(tested, len(classes)), classes)
    return figure


def confusion_matrix(tested: Evaluation, n_classes: int) -> Tensor:
    """Counts `[K, K]` int64: rows are true classes, columns predicted ones."""
    pairs = tested.labels * n_classes + tested.logits.argmax(1)
    return torch.bincount(pairs, minlength=n_classes**2).view(n_classes, n_classes)


def misclassified(tested: Evaluation) -> Tensor:
    """Positions of the wrong answers, the most confident first, at most 25."""
    confidence, predicted = torch.softmax(tested.logits, 1).max(1)
    wrong = (predicted != tested.labels).nonzero()[:, 0]
    return wrong[confidence[wrong].argsort(descending=True)][:_SHOWN]


def first_filters(net: nn.Module) -> Tensor | None:
    """The first convolution's kernels `[F, 3, k, k]` scaled to 0..1; None where it sees no RGB."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            kernels = module.weight.detach().cpu()
            return _to_unit_range(kernels) if kernels.shape[1] == 3 else None
    return None


def feature_maps(net: nn.Module, image: Tensor) -> Tensor:
    """What the first convolution makes of one image `[1, 3, H, W]`: `[F, 1, H, W]` in 0..1."""
    first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
    with evaluation_mode(net):
        maps = first(image).float().cpu()[0][:, None]
    return _to_unit_range(maps).clone()


def _to_unit_range(images: Tensor) -> Tensor:
    """Scales each of `[F, C, H, W]` to 0..1."""
    low, high = images.amin((1, 2, 3), True), images.amax((1, 2, 3), True)
    return torch.div(images - low, (high - low).clamp_min(1e-12))


def _draw_curves(axes: Axes, epochs: Sequence[dict[str, float]], name: str, unit: str) -> None:
    numbers = [line["epoch"] for line in epochs]
    for split in ("train", "valid"):
        axes.plot(numbers, [line[f"{split}_{name}"] for line in epochs], label=split, marker=".")
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
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=7)
