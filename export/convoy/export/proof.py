"""The proof that an artifact gives the outputs of the eager float32 net.

N samples, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convoy.export.errors import ParityError, runtime_reason
from convoy.export.formats import Precision
from convoy.export.reference import Expectation
from convoy.export.servable import Outputs, Run

BATCH_SIZES = (1, 2, 7, 32, 64)
_SHUFFLED_BATCH = 32
_TIE_MARGIN = 1e-5
"""Two logits of the reference that are closer than this count as equal."""
_SEED = 0


@dataclass(frozen=True, slots=True)
class Gate:
    """Requirements for publishing an artifact.

    Attributes:
        atol: Largest difference of a logit, for logits up to scale; above, it grows in proportion.
        scale: Size of the logits for which atol was measured.
        min_agreement: Share of samples whose most probable class must be the same, 0 to 1.
        max_accuracy_drop: Largest loss of accuracy on validation images, 0 to 1.
        quantile: Share of all differences that must be within atol; 1 for all.
        binds_edge_cases: Apply the tolerance to edge-case samples too; otherwise their outputs
            only have to be finite.
    """

    atol: float
    scale: float
    min_agreement: float
    max_accuracy_drop: float
    quantile: float = 1.0
    binds_edge_cases: bool = True

    def tolerance(self, logits: NDArray[np.float32]) -> float:
        """Return the largest allowed difference from these logits of the eager net."""
        return self.atol * max(1.0, float(np.abs(logits).max()) / self.scale)


GATES = {
    Precision.FP32: Gate(atol=1e-4, scale=10.0, min_agreement=1.0, max_accuracy_drop=0.0),
    Precision.FP16: Gate(atol=0.05, scale=10.0, min_agreement=0.999, max_accuracy_drop=0.003),
    Precision.TF32: Gate(atol=0.02, scale=10.0, min_agreement=0.999, max_accuracy_drop=0.003),
    Precision.BF16: Gate(atol=0.5, scale=10.0, min_agreement=0.99, max_accuracy_drop=0.003),
    # Ranges are calibrated on real images, so values beyond them may be clipped.
    Precision.INT8: Gate(
        atol=0.5,
        scale=10.0,
        min_agreement=0.98,
        max_accuracy_drop=0.005,
        quantile=0.999,
        binds_edge_cases=False,
    ),
}
"""Measured differences of trained nets (3e-6, 0.012, 0.21, 0.27 in this order) with a margin."""


@dataclass(frozen=True, slots=True)
class Parity:
    """The comparison of an artifact with the eager net; see the message Parity in the manifest.

    Attributes:
        validation_samples: Labeled validation images.
        reference_accuracy: Of the eager net; None without labeled images.
        accuracy: Of the artifact; None without labeled images.
        class_accuracy: The same per class; NaN for a class without images.
    """

    samples: int
    validation_samples: int
    batch_sizes: tuple[int, ...]
    max_logit_difference: float
    logit_difference_p999: float
    tolerance: float
    argmax_agreement: float
    reference_accuracy: float | None
    accuracy: float | None
    class_accuracy: tuple[float, ...]


def prove(
    artifact: str,
    run: Run,
    expected: Expectation,
    gate: Gate,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    rows_per_size: int | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Parity:
    """Run an artifact at each batch size, and once with the rows in another order.

    Args:
        artifact: Its file name, for the message.
        run: The artifact as loaded from its file.
        expected: Samples with the outputs of the eager net.
        gate: Requirements.
        batch_sizes: Samples per call; the last call of each size takes the remaining ones.
        rows_per_size: Samples per batch size, for slow nets; by default all. The shuffled round
            always uses all.
        progress: Called with each step.

    Raises:
        ParityError: The artifact failed the gate; the message names the worst sample.
    """
    count = len(expected.images)
    in_order, shuffled = np.arange(count), np.random.default_rng(_SEED).permutation(count)
    some = in_order if rows_per_size is None else _spread_rows(expected, rows_per_size)
    rounds = [(size, some) for size in batch_sizes] + [(_SHUFFLED_BATCH, shuffled)]
    bound = count if gate.binds_edge_cases else expected.real_count
    reference = expected.correct(expected.outputs.logits)
    correct = np.ones_like(reference)
    largest, p999, agreement = 0.0, 0.0, 1.0
    for batch_size, rows in rounds:
        where = f"{artifact}, batch size {batch_size}"
        progress(f"proving {where}")
        found = _run_in_batches(where, run, expected, rows, batch_size)
        _check_difference(where, found, expected, gate, bound)
        agreement = min(agreement, _check_agreement(where, found, expected, gate, bound))
        differences = np.abs(found.logits - expected.outputs.logits)[:bound]
        largest = max(largest, float(differences.max()))
        p999 = max(p999, float(np.quantile(differences, 0.999)))
        ran = np.isin(expected.labeled, rows)
        correct[ran] &= expected.correct(found.logits)[ran]
    _check_accuracy(artifact, reference, correct, gate)
    tolerance = gate.tolerance(expected.outputs.logits)
    return Parity(
        samples=count,
        validation_samples=len(reference),
        batch_sizes=tuple(batch_sizes),
        max_logit_difference=largest,
        logit_difference_p999=p999,
        # If the gate does not bind every difference, rounding on another processor may add as
        # much.
        tolerance=tolerance if gate.quantile == 1 else largest + tolerance,
        argmax_agreement=agreement,
        reference_accuracy=float(reference.mean()) if len(reference) else None,
        accuracy=float(correct.mean()) if len(reference) else None,
        class_accuracy=expected.class_accuracy(correct),
    )


def _spread_rows(expected: Expectation, count: int) -> NDArray[np.int64]:
    """Return evenly spaced rows of real samples, and the rows of all edge cases."""
    real = np.linspace(0, expected.real_count - 1, min(count, expected.real_count), dtype=np.int64)
    return np.concatenate([real, np.arange(expected.real_count, len(expected.images))])


def _run_in_batches(
    where: str, run: Run, expected: Expectation, rows: NDArray[np.int64], batch_size: int
) -> Outputs:
    """Run the samples in the order of rows and return the outputs in the samples' own order.

    Samples that are not among the rows keep the eager net's outputs.
    """
    found = Outputs(*(output.copy() for output in expected.outputs))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        try:
            answer = run(expected.images[batch])
        # The runtimes' exceptions have no common base.
        except Exception as error:
            raise ParityError(
                f"{where}: the runtime fails on {len(batch)} images: {runtime_reason(error)}"
            ) from error
        for whole, part in zip(found, answer, strict=True):
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
    """Check the first `bound` samples against the gate, and that all outputs are numbers."""
    tolerance = gate.tolerance(expected.outputs.logits)
    for name, ours, theirs in zip(Outputs._fields, found, expected.outputs, strict=True):
        differences = np.abs(ours - theirs)  # [N, K]
        # A NaN is the worst difference, but any comparison with it is false.
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
    """Return the share of the first `bound` samples with the eager net's class."""
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
    artifact: str, reference: NDArray[np.bool_], correct: NDArray[np.bool_], gate: Gate
) -> None:
    if not len(reference):
        return
    before, after = float(reference.mean()), float(correct.mean())
    if before - after > gate.max_accuracy_drop:
        lost = int((reference & ~correct).argmax())
        raise ParityError(
            f"{artifact}: accuracy on {len(reference)} validation images: expected a drop of at "
            f"most {gate.max_accuracy_drop:.4f} from {before:.4f}, got {after:.4f}; "
            f"real sample {lost} is lost"
        )
