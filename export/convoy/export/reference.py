"""The outputs of the eager net: the reference for every artifact.

N samples, K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from convoy.export.errors import InputError, runtime_reason
from convoy.export.formats import LUMA, ChannelOrder, OutputKind
from convoy.export.samples import Samples, edge_cases
from convoy.export.servable import LEAST_PROBABILITY, Images, Outputs
from convoy.export.source import ModelSource

_REFERENCE_BATCH = 64
_SUM_TOLERANCE = 1e-3
_FEWEST_FOR_ACCURACY = 30
_LEAST_SPREAD = 1e-4
"""Of a logit over all samples, relative to the largest logit: what float32 may differ by."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """Samples and the outputs of the eager float32 net for them.

    Attributes:
        images: The real samples first, then the edge-case ones, `[N, H, W, 3]`.
        names: Name of each sample in messages.
        labels: True classes of the real samples; -1: unknown.
        outputs: Of the eager net.
        validation_count: Number of validation images, which come first. The other real samples
            may be training images, so they do not count for the accuracy.
    """

    images: Images
    names: tuple[str, ...]
    labels: NDArray[np.int64]
    outputs: Outputs
    validation_count: int

    @property
    def real_count(self) -> int:
        """Number of real samples."""
        return len(self.labels)

    @property
    def labeled(self) -> NDArray[np.int64]:
        """Rows `[M]` of the validation images with known labels."""
        return np.flatnonzero(self.labels[: self.validation_count] >= 0)

    def correct(self, logits: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Return for each labeled validation image `[M]` whether logits `[N, K]` are right."""
        rows = self.labeled
        right: NDArray[np.bool_] = logits[rows].argmax(axis=1) == self.labels[rows]
        return right

    def class_accuracy(self, correct: NDArray[np.bool_]) -> tuple[float, ...]:
        """Return the share of `correct` `[M]` per class; NaN for a class without images."""
        labels = self.labels[self.labeled]
        classes = range(self.outputs.logits.shape[1])
        return tuple(
            float(correct[chosen].mean()) if (chosen := labels == label).any() else math.nan
            for label in classes
        )


def expect(source: ModelSource, samples: Samples) -> Expectation:
    """Run the eager net on real and edge-case samples.

    The reference shares no code with the servable: (pixel / 255 - mean) / std, step by step.

    Raises:
        InputError: The net fails, or its output is not of the kind that the source states.
    """
    real, size = samples.real, source.data.preprocessing
    strange = edge_cases(size.height_px, size.width_px)
    images = np.concatenate([real.images, *strange.values()])
    names = [
        f"sample {index} (no label)"
        if label < 0
        else f"real sample {index} (class {source.data.classes[label]!r})"
        for index, label in enumerate(real.labels)
    ]
    names += [f"edge-case sample {name!r}" for name in strange]
    scores = np.concatenate(
        [
            _eager_scores(source, images[start : start + _REFERENCE_BATCH])
            for start in range(0, len(images), _REFERENCE_BATCH)
        ]
    )
    outputs = _reference_outputs(source, scores)
    return Expectation(images, tuple(names), real.labels, outputs, samples.validation_count)


def _eager_scores(source: ModelSource, images: Images) -> NDArray[np.float32]:
    """Return the net's output `[N, K]`."""
    mean, std = (
        torch.tensor(values).reshape(1, 3, 1, 1) for values in (source.data.mean, source.data.std)
    )
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float()  # [N, 3, H, W]
    if source.channel_order is ChannelOrder.GRAY:
        pixels = torch.einsum("nchw,c->nhw", pixels, torch.tensor(LUMA))[:, None]
        mean, std = mean[:, :1], std[:, :1]
    normalized = (pixels / 255 - mean) / std
    if source.channel_order is ChannelOrder.BGR:
        normalized = normalized[:, [2, 1, 0]]
    classes = len(source.data.classes)
    try:
        with torch.inference_mode():
            scores = source.net(normalized)
        if scores.shape[:2] != (len(images), classes) or scores.numel() != len(images) * classes:
            raise InputError(
                f"{source.architecture}: expected output [{len(images)}, {classes}] for "
                f"{len(images)} images and {classes} labels, got {list(scores.shape)}"
                + _class_count_hint(scores.shape, classes)
            )
    except InputError:
        raise
    # The exception depends on the net's code.
    except Exception as error:
        raise InputError(
            f"{source.architecture}: the net fails on a batch of {len(images)}: "
            f"{runtime_reason(error)}"
        ) from error
    found: NDArray[np.float32] = scores.float().reshape(len(images), classes).numpy()
    return found


def _class_count_hint(shape: Sequence[int], classes: int) -> str:
    return "; is a background class missing in the labels?" if shape[1:2] == (classes + 1,) else ""


def _reference_outputs(source: ModelSource, scores: NDArray[np.float32]) -> Outputs:
    """Return the expected outputs of the servable for a net's output `[N, K]`.

    Raises:
        InputError: The output is not of the kind that the source states.
    """
    if not np.isfinite(scores).all():
        row = int((~np.isfinite(scores)).any(axis=1).argmax())
        raise InputError(
            f"{source.architecture}: output: expected finite numbers, got {scores[row].max()} for "
            f"sample {row}"
        )
    bounded = bool((scores >= 0).all() and (scores <= 1 + _SUM_TOLERANCE).all())
    sums_to_1 = bounded and bool((np.abs(scores.sum(axis=1) - 1) < _SUM_TOLERANCE).all())
    lowest, highest = float(scores.min()), float(scores.max())
    where = f"{source.architecture}: output"
    match source.output:
        case OutputKind.LOGITS:
            if sums_to_1:
                raise InputError(
                    f"{where}: expected logits, got values from 0 to 1 that sum to 1 for each "
                    "image, so the net ends in a softmax; publish with --output probabilities"
                )
            scaled = torch.from_numpy(scores) / source.temperature
            return Outputs(scores, torch.softmax(scaled, dim=1).numpy())
        case OutputKind.PROBABILITIES if not sums_to_1:
            raise InputError(
                f"{where}: expected probabilities that sum to 1 for each image, got values from "
                f"{lowest:.3g} to {highest:.3g}; publish with --output logits or sigmoid"
            )
        case OutputKind.SIGMOID if not bounded:
            raise InputError(
                f"{where}: expected values from 0 to 1, got {lowest:.3g} to {highest:.3g}; "
                "publish with --output logits"
            )
    least = np.float32(LEAST_PROBABILITY[source.output])
    return Outputs(np.log(np.maximum(scores, least)), scores)


def doubts(expected: Expectation) -> list[str]:
    """Return a line for each reason to doubt the net or what the proof shows."""
    found = (constant_warning(expected), chance_warning(expected))
    return [warning for warning in found if warning]


def constant_warning(expected: Expectation) -> str | None:
    """Return a warning if the eager net answers all samples alike, else None."""
    logits = expected.outputs.logits
    spread = float(np.ptp(logits, axis=0).max())
    if spread > _LEAST_SPREAD * max(1.0, float(np.abs(logits).max())):
        return None
    return (
        f"the logits of all {len(logits)} samples are equal within {spread:.1e}, so the proof "
        "shows nothing; check that the weights are trained: is the last layer still zero?"
    )


def chance_warning(expected: Expectation) -> str | None:
    """Return a warning if the eager net's accuracy is not above chance, else None."""
    correct = expected.correct(expected.outputs.logits)
    chance = 1 / expected.outputs.logits.shape[1]
    # Three standard deviations above guessing.
    bound = chance + 3 * math.sqrt(chance * (1 - chance) / max(1, len(correct)))
    if len(correct) < _FEWEST_FOR_ACCURACY or correct.mean() > bound:
        return None
    return (
        f"accuracy {correct.mean():.4f} on {len(correct)} labeled images is no better than chance "
        f"({chance:.4f}); check the order of the labels, --mean and --std, --channel-order, the "
        "size and crop, and that the weights are trained"
    )
