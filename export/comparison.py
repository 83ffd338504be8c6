"""Two published versions side by side on the same real samples."""

from dataclasses import dataclass

import numpy as np

from export.errors import InputError
from export.formats import Variant
from export.versions import Version
from training.data import ImageSet

_BATCH = 64


@dataclass(frozen=True, slots=True)
class Change:
    """A sample that the two versions classify differently; the names are class names."""

    index: int
    truth: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """What became of a model from one version to the next, by one artefact of each.

    Attributes:
        variant: The artefact compared, the first that both versions have.
        accuracy: On the samples, 0 to 1, before and after.
        size_bytes: Of the artefact, before and after.
        single_image_s: Recorded time of a batch of one, before and after; 0 where none was.
        changes: Samples whose most probable class differs.
    """

    variant: Variant
    samples: int
    accuracy: tuple[float, float]
    size_bytes: tuple[int, int]
    single_image_s: tuple[float, float]
    changes: tuple[Change, ...]

    @property
    def agreement(self) -> float:
        """Share of the samples that get the same class, 0 to 1."""
        return 1 - len(self.changes) / self.samples


def compare(before: Version, after: Version, images: ImageSet) -> Comparison:
    """Runs both versions on the same samples.

    Raises:
        InputError: The versions differ in classes or input, or share no kind of artefact.
    """
    _check_comparable(before, after)
    labels = before.manifest.labels
    shared = [variant for variant in after.artefacts() if variant in before.artefacts()]
    if not shared:
        raise InputError("versions: expected an artefact of one kind in both, found none")
    old, new = (_predict(version, shared[0], images) for version in (before, after))
    artefacts = [version.artefacts()[shared[0]] for version in (before, after)]
    first, second = (artefact.file.size_bytes for artefact in artefacts)
    return Comparison(
        variant=shared[0],
        samples=len(images),
        accuracy=(float((old == images.labels).mean()), float((new == images.labels).mean())),
        size_bytes=(first, second),
        single_image_s=(
            next((latency.median_s for latency in artefacts[0].latencies), 0.0),
            next((latency.median_s for latency in artefacts[1].latencies), 0.0),
        ),
        changes=tuple(
            Change(int(row), labels[images.labels[row]], labels[old[row]], labels[new[row]])
            for row in np.flatnonzero(old != new)
        ),
    )


def _check_comparable(before: Version, after: Version) -> None:
    for field in ("labels", "input", "preprocessing"):
        old, new = (getattr(version.manifest, field) for version in (before, after))
        if old != new:
            raise InputError(f"versions: expected the same {field} in both, found a difference")


def _predict(version: Version, variant: Variant, images: ImageSet) -> np.ndarray:
    run = version.load(variant)
    starts = range(0, len(images), _BATCH)
    found = [run(images.images[start : start + _BATCH]).logits.argmax(axis=1) for start in starts]
    return np.concatenate(found)
