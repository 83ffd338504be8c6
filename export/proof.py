"""Proves that an artefact computes what the eager float32 net computes.

N samples, K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from export.errors import ParityError
from export.formats import Precision
from export.samples import Samples, hostile
from export.servable import Images, Outputs, Run
from export.source import ModelSource

BATCH_SIZES = (1, 2, 7, 32, 64)
_REFERENCE_BATCH = 64
_SHUFFLED_BATCH = 32
_TIE_MARGIN = 1e-5
"""Two logits of the reference closer than this have no order that could be wrong."""
_SEED = 0


@dataclass(frozen=True, slots=True)
class Gate:
    """What an artefact must keep to be published.

    Attributes:
        atol: Largest difference of a logit, for logits up to scale; beyond, it grows with them.
        scale: Size of the logits that atol was measured on.
        min_agreement: Share of samples whose most probable class must be the same, 0 to 1.
        max_accuracy_drop: How much accuracy may be lost on validation images, 0 to 1.
        quantile: Share of all differences that atol holds for; 1 for every single one.
        binds_hostile: Whether hostile samples must agree too; else they must only give numbers.
    """

    atol: float
    scale: float
    min_agreement: float
    max_accuracy_drop: float
    quantile: float = 1.0
    binds_hostile: bool = True

    def tolerance(self, logits: NDArray[np.float32]) -> float:
        """Returns the largest difference allowed beside these logits of the eager net."""
        return self.atol * max(1.0, float(np.abs(logits).max()) / self.scale)


GATES = {
    Precision.FP32: Gate(atol=1e-4, scale=10.0, min_agreement=1.0, max_accuracy_drop=0.0),
    Precision.FP16: Gate(atol=0.05, scale=10.0, min_agreement=0.999, max_accuracy_drop=0.003),
    Precision.BF16: Gate(atol=0.5, scale=10.0, min_agreement=0.99, max_accuracy_drop=0.003),
    # Ranges are calibrated on real images, so what lies beyond them may be clipped.
    Precision.INT8: Gate(
        atol=0.5,
        scale=10.0,
        min_agreement=0.98,
        max_accuracy_drop=0.005,
        quantile=0.999,
        binds_hostile=False,
    ),
}
"""Measured differences of trained nets with room: 3e-6, 0.012, 0.21 and 0.27 in this order."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """Samples and what the eager float32 net says about them.

    Attributes:
        images: The real samples first, then the hostile ones, `[N, H, W, 3]`.
        names: How messages call each sample.
        labels: True classes of the real samples.
        outputs: Of the eager net.
        validation_count: How many of the samples, from the first, accuracy is measured on. The real
            ones behind them were trained on.
    """

    images: Images
    names: tuple[str, ...]
    labels: NDArray[np.int64]
    outputs: Outputs
    validation_count: int

    @property
    def real_count(self) -> int:
        """How many of the samples are real."""
        return len(self.labels)

    def correct(self, logits: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Returns for each validation image whether logits `[N, K]` classify it rightly."""
        predicted = logits[: self.validation_count].argmax(axis=1)
        right: NDArray[np.bool_] = predicted == self.labels[: self.validation_count]
        return right

    def class_accuracy(self, correct: NDArray[np.bool_]) -> tuple[float, ...]:
        """Returns the share of each class's validation images that are; NaN for a class of none."""
        labels = self.labels[: self.validation_count]
        classes = range(self.outputs.logits.shape[1])
        return tuple(
            float(correct[chosen].mean()) if (chosen := labels == label).any() else math.nan
            for label in classes
        )


@dataclass(frozen=True, slots=True)
class Parity:
    """How an artefact compared with the eager net; see the message of this name in the manifest.

    Attributes:
        class_accuracy: As accuracy, of each class's images; NaN for a class of none.
    """

    samples: int
    validation_samples: int
    batch_sizes: tuple[int, ...]
    max_logit_difference: float
    logit_difference_p999: float
    tolerance: float
    argmax_agreement: float
    reference_accuracy: float
    accuracy: float
    class_accuracy: tuple[float, ...]


def expect(source: ModelSource, samples: Samples) -> Expectation:
    """Runs the eager net on real and hostile samples, normalised as the paper formula says.

    The reference shares no code with the servable: (pixel / 255 - mean) / std, step by step.
    """
    real, size = samples.real, source.data.preprocessing
    strange = hostile(size.height_px, size.width_px)
    images = np.concatenate([real.images, *strange.values()])
    names = [
        f"real sample {index} (class {source.data.classes[label]!r})"
        for index, label in enumerate(real.labels)
    ]
    names += [f"hostile sample {name!r}" for name in strange]
    logits = np.concatenate(
        [
            _eager_logits(source, images[start : start + _REFERENCE_BATCH])
            for start in range(0, len(images), _REFERENCE_BATCH)
        ]
    )
    probabilities = torch.softmax(torch.from_numpy(logits) / source.temperature, dim=1).numpy()
    outputs = Outputs(logits, probabilities)
    return Expectation(images, tuple(names), real.labels, outputs, samples.validation_count)


def prove(
    artefact: str,
    run: Run,
    expected: Expectation,
    gate: Gate,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> Parity:
    """Runs an artefact at each batch size, and once more with the rows in another order.

    Args:
        artefact: Its file name, for the message.
        run: The artefact as loaded from its file.
        expected: Samples with the answers of the eager net.
        gate: What the artefact must keep.
        batch_sizes: How many samples go into one call; the last call of each takes what is left.

    Raises:
        ParityError: The gate was failed; the message names the worst sample.
    """
    count = len(expected.images)
    in_order, shuffled = np.arange(count), np.random.default_rng(_SEED).permutation(count)
    rounds = [(size, in_order) for size in batch_sizes] + [(_SHUFFLED_BATCH, shuffled)]
    bound = count if gate.binds_hostile else expected.real_count
    reference = expected.correct(expected.outputs.logits)
    correct = np.ones_like(reference)
    largest, p999, agreement = 0.0, 0.0, 1.0
    for batch_size, rows in rounds:
        where = f"{artefact}, batch size {batch_size}"
        found = _run_in_batches(where, run, expected, rows, batch_size)
        _check_difference(where, found, expected, gate, bound)
        agreement = min(agreement, _check_agreement(where, found, expected, gate, bound))
        differences = np.abs(found.logits - expected.outputs.logits)[:bound]
        largest = max(largest, float(differences.max()))
        p999 = max(p999, float(np.quantile(differences, 0.999)))
        correct &= expected.correct(found.logits)
    _check_accuracy(artefact, reference, correct, gate)
    tolerance = gate.tolerance(expected.outputs.logits)
    return Parity(
        samples=count,
        validation_samples=expected.validation_count,
        batch_sizes=tuple(batch_sizes),
        max_logit_difference=largest,
        logit_difference_p999=p999,
        # Where the gate does not bind every difference, another processor may round otherwise by as
        # much again.
        tolerance=tolerance if gate.quantile == 1 else largest + tolerance,
        argmax_agreement=agreement,
        reference_accuracy=float(reference.mean()),
        accuracy=float(correct.mean()),
        class_accuracy=expected.class_accuracy(correct),
    )


def _eager_logits(source: ModelSource, images: Images) -> NDArray[np.float32]:
    mean, std = (
        torch.tensor(values).reshape(1, 3, 1, 1) for values in (source.data.mean, source.data.std)
    )
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float()  # [N, 3, H, W]
    with torch.inference_mode():
        logits: NDArray[np.float32] = source.net((pixels / 255 - mean) / std).numpy()
    return logits


def _run_in_batches(
    where: str, run: Run, expected: Expectation, rows: NDArray[np.int64], batch_size: int
) -> Outputs:
    """Runs the samples in the order of rows and returns the outputs in the samples' own order."""
    found = Outputs(*(np.empty_like(output) for output in expected.outputs))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        for whole, part in zip(found, run(expected.images[batch]), strict=True):
            if part.shape != whole[batch].shape or part.dtype != np.float32:
                raise ParityError(
                    f"{where}: expected outputs float32 {list(whole[batch].shape)} for "
                    f"{len(batch)} images, got {part.dtype} {list(part.shape)}"
                )
            whole[batch] = part
    return found


def _check_difference(
    where: str, found: Outputs, expected: Expectation, gate: Gate, bound: int
) -> None:
    """Holds the first bound samples to the gate, and all of them to giving numbers."""
    tolerance = gate.tolerance(expected.outputs.logits)
    for name, ours, theirs in zip(Outputs._fields, found, expected.outputs, strict=True):
        differences = np.abs(ours - theirs)  # [N, K]
        # A NaN is the worst difference there is, but compares as none.
        broken = ~np.isfinite(differences)
        differences[bound:] = 0.0
        differences[broken] = np.inf
        worst = int(differences.max(axis=1).argmax())
        kept = np.quantile(differences[:bound], gate.quantile, method="lower")
        if kept > tolerance or broken.any():
            share = "" if gate.quantile == 1 else f" for {gate.quantile:.1%} of all values"
            raise ParityError(
                f"{where}, {expected.names[worst]}: {name}: expected a difference of at most "
                f"{tolerance:.2e} from the eager net{share}, got {differences[worst].max():.2e}"
            )


def _check_agreement(
    where: str, found: Outputs, expected: Expectation, gate: Gate, bound: int
) -> float:
    """Returns the share of the first bound samples that get the eager net's class."""
    reference = expected.outputs.logits[:bound]
    chosen = reference[np.arange(bound), found.logits[:bound].argmax(axis=1)]
    agrees = reference.max(axis=1) - chosen <= _TIE_MARGIN
    agreement = float(agrees.mean())
    if agreement < gate.min_agreement:
        worst = int((~agrees).argmax())
        raise ParityError(
            f"{where}, {expected.names[worst]}: expected the eager net's class for at least "
            f"{gate.min_agreement:.1%} of {bound} samples, got {agreement:.1%}"
        )
    return agreement


def _check_accuracy(
    artefact: str, reference: NDArray[np.bool_], correct: NDArray[np.bool_], gate: Gate
) -> None:
    before, after = float(reference.mean()), float(correct.mean())
    if before - after > gate.max_accuracy_drop:
        lost = int((reference & ~correct).argmax())
        raise ParityError(
            f"{artefact}: accuracy on {len(reference)} validation images: expected a drop of at "
            f"most {gate.max_accuracy_drop:.4f} from {before:.4f}, got {after:.4f}; "
            f"real sample {lost} is lost"
        )
