"""Published versions: checked against their manifest, verified again, and compared."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from google.protobuf import json_format

from convoy.export import int8
from convoy.export.cost import run_threads
from convoy.export.errors import InputError, one_line
from convoy.export.formats import Precision, Variant, variant_of
from convoy.export.manifest import SCHEMA_VERSION
from convoy.export.pipeline import load_artifact
from convoy.export.proof import GATES, Gate, Parity, prove
from convoy.export.reference import Expectation
from convoy.export.repository import MANIFEST_NAME
from convoy.export.servable import Outputs, Run
from convoy.export.source import ModelSource
from convoy.training.data import ImageSet
from convoy.v1 import model_manifest_pb2 as pb

_BATCH_SIZE = 64


@dataclass(frozen=True, slots=True)
class Version:
    """A folder REPOSITORY/NAME/VERSION whose files match its manifest.

    Attributes:
        path: The folder.
        manifest: Its manifest.
        manifest_sha256: The digest of the file that the manifest was read from.
    """

    path: Path
    manifest: pb.ModelManifest
    manifest_sha256: str

    def artifacts(self) -> dict[Variant, pb.Artefact]:
        """Return the artifacts by variant."""
        return {variant_of(artifact): artifact for artifact in self.manifest.artefacts}

    def int8_layers(self) -> tuple[int, int] | None:
        """Return how many layers of the int8 ONNX file are in int8, and how many it has."""
        artifact = self.artifacts().get(int8.VARIANT)
        return int8.count_layers(self.path / artifact.file.name) if artifact else None

    def load(self, variant: Variant) -> Run:
        """Return a function that runs an artifact on this process's CPU."""
        return load_artifact(variant, self.path / self.artifacts()[variant].file.name)


def local_folder(version: str) -> Path:
    """Return the folder of a version; one in an object store is copied to this machine first.

    Raises:
        InputError: There is no such version, or the store cannot be read.
    """
    if "://" in version:
        from convoy.export.object_store import copy_version

        return copy_version(version)
    folder = Path(version).absolute()
    if not folder.is_dir():
        raise InputError(f"version {version}: expected a folder, as models/digits/3")
    return folder


def read_version(path: Path) -> Version:
    """Read a version's manifest and compare every file with it.

    Raises:
        InputError: The version is missing, its manifest is malformed, or a file was changed.
    """
    try:
        content = (path / MANIFEST_NAME).read_bytes()
        manifest = json_format.Parse(content, pb.ModelManifest())
    except (OSError, UnicodeDecodeError, json_format.ParseError) as error:
        raise InputError(f"version {path}: {MANIFEST_NAME}: {one_line(error)}") from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise InputError(
            f"version {path}: schema_version: expected {SCHEMA_VERSION}, "
            f"got {manifest.schema_version}"
        )
    records = [*(artifact.file for artifact in manifest.artefacts), manifest.samples.file]
    if manifest.HasField("report"):
        records.append(manifest.report)
    for record in records:
        _check_file(path, record)
    return Version(path, manifest, hashlib.sha256(content).hexdigest())


def golden_expectation(version: Version) -> Expectation:
    """Return a version's golden samples as the reference of a proof."""
    with np.load(version.path / version.manifest.samples.file.name, allow_pickle=False) as samples:
        images, logits, labels = samples["images"], samples["logits"], samples["labels"]
        # Older versions without this array all end in a softmax.
        probabilities = samples.get("probabilities")
    if probabilities is None:
        scaled = torch.from_numpy(logits) / version.manifest.temperature
        probabilities = torch.softmax(scaled, dim=1).numpy()
    outputs = Outputs(logits, probabilities)
    names = tuple(f"golden sample {index}" for index in range(len(images)))
    return Expectation(images, names, labels, outputs, len(labels))


def check_origin(version: Version, source: ModelSource) -> None:
    """Check that a version was exported from a source's checkpoint.

    Raises:
        InputError: It was exported from another checkpoint.
    """
    expected = version.manifest.provenance.checkpoint_sha256
    if source.checkpoint_sha256 != expected:
        raise InputError(
            f"checkpoint: expected SHA-256 {expected[:12]}…, from which version "
            f"{version.manifest.version} was made, got {source.checkpoint_sha256[:12]}…"
        )


def verify(version: Version, expected: Expectation) -> dict[Variant, Parity]:
    """Verify every artifact of a version again, with golden samples or an eager net's outputs.

    Raises:
        ParityError: An artifact fails; the message names the sample.
    """
    with run_threads(version.manifest.provenance.multiply_adds):
        return {
            variant: prove(variant.title, version.load(variant), expected, _gate(variant, artifact))
            for variant, artifact in version.artifacts().items()
        }


def _gate(variant: Variant, artifact: pb.Artefact) -> Gate:
    """Return the gate with the tolerance that the artifact was published with."""
    standard = GATES[variant.precision]
    few = 0.0 if variant.precision is Precision.FP32 else 1 / 16
    return Gate(
        atol=artifact.parity.tolerance,
        scale=np.inf,
        min_agreement=min(standard.min_agreement, 1 - few),
        max_accuracy_drop=max(standard.max_accuracy_drop, few),
        binds_edge_cases=standard.binds_edge_cases,
    )


def _check_file(folder: Path, record: pb.File) -> None:
    path = folder / record.name
    if path.name != record.name:
        raise InputError(f"version {folder}: expected a plain file name, got {record.name!r}")
    # Like in the server, links must not leave the repository.
    inside = [each.resolve() for each in path.absolute().parents[:3]]
    if not any(path.resolve().is_relative_to(each) for each in inside):
        raise InputError(
            f"version {folder}: {record.name}: expected a file of the repository, got a link that "
            "leaves it"
        )
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"version {folder}: {record.name}: {error.strerror}") from error
    if digest != record.sha256:
        raise InputError(
            f"version {folder}: {record.name}: expected SHA-256 {record.sha256[:12]}…, "
            f"got {digest[:12]}…: the file was changed after it was published"
        )


@dataclass(frozen=True, slots=True)
class Change:
    """A sample that the two versions classify differently; the names are class names."""

    index: int
    truth: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """The differences between two versions of a model, by one artifact of each.

    Attributes:
        variant: The artifact compared, the first that both versions have.
        accuracy: On the samples, 0 to 1, before and after.
        size_bytes: Of the artifact, before and after.
        single_image_s: Recorded time of a batch of one, before and after; 0 if there is none.
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
        """Share of the samples with the same class, 0 to 1."""
        return 1 - len(self.changes) / self.samples


def compare(before: Version, after: Version, images: ImageSet) -> Comparison:
    """Run both versions on the same samples.

    Raises:
        InputError: The versions differ in classes or input, or have no variant in common.
    """
    _check_comparable(before, after)
    labels = before.manifest.labels
    shared = [variant for variant in after.artifacts() if variant in before.artifacts()]
    if not shared:
        raise InputError("versions: expected a variant that both have, found none")
    old, new = (_predict(version, shared[0], images) for version in (before, after))
    artifacts = [version.artifacts()[shared[0]] for version in (before, after)]
    first, second = (artifact.file.size_bytes for artifact in artifacts)
    return Comparison(
        variant=shared[0],
        samples=len(images),
        accuracy=(float((old == images.labels).mean()), float((new == images.labels).mean())),
        size_bytes=(first, second),
        single_image_s=(
            next((latency.median_s for latency in artifacts[0].latencies), 0.0),
            next((latency.median_s for latency in artifacts[1].latencies), 0.0),
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
    starts = range(0, len(images), _BATCH_SIZE)
    found = [
        run(images.images[start : start + _BATCH_SIZE]).logits.argmax(axis=1) for start in starts
    ]
    return np.concatenate(found)
