"""Published versions, read back: their manifest, the digests of their files, their samples."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from google.protobuf import json_format

from convoy.v1 import model_manifest_pb2 as pb
from export.errors import InputError, one_line
from export.formats import Precision, Variant, variant_of
from export.manifest import MANIFEST_NAME, SCHEMA_VERSION
from export.pipeline import LOADERS
from export.proof import GATES, Expectation, Gate, Parity, prove
from export.servable import Outputs, Run
from export.source import ModelSource
from export.threads import one_thread


@dataclass(frozen=True, slots=True)
class Version:
    """A folder REPOSITORY/NAME/VERSION whose files are those that its manifest names."""

    path: Path
    manifest: pb.ModelManifest

    def artefacts(self) -> dict[Variant, pb.Artefact]:
        """Returns the runnable files by what they are."""
        return {variant_of(artefact): artefact for artefact in self.manifest.artefacts}

    def load(self, variant: Variant) -> Run:
        """Returns a function that runs an artefact on this process's CPU."""
        return LOADERS[variant.format](self.path / self.artefacts()[variant].file.name)


def read_version(path: Path) -> Version:
    """Reads a version's manifest and compares every file with it.

    Raises:
        InputError: There is no version, its manifest is malformed, or a file was changed.
    """
    try:
        text = (path / MANIFEST_NAME).read_text(encoding="utf-8")
        manifest = json_format.Parse(text, pb.ModelManifest())
    except (OSError, UnicodeDecodeError, json_format.ParseError) as error:
        raise InputError(f"version {path}: {MANIFEST_NAME}: {one_line(error)}") from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise InputError(
            f"version {path}: schema_version: expected {SCHEMA_VERSION}, "
            f"got {manifest.schema_version}"
        )
    records = [*(artefact.file for artefact in manifest.artefacts), manifest.samples.file]
    if manifest.HasField("report"):
        records.append(manifest.report)
    for record in records:
        _check_file(path, record)
    return Version(path, manifest)


def golden_expectation(version: Version) -> Expectation:
    """Returns a version's golden samples as something to prove its artefacts on."""
    with np.load(version.path / version.manifest.samples.file.name, allow_pickle=False) as samples:
        images, logits, labels = samples["images"], samples["logits"], samples["labels"]
    scaled = torch.from_numpy(logits) / version.manifest.temperature
    outputs = Outputs(logits, torch.softmax(scaled, dim=1).numpy())
    names = tuple(f"golden sample {index}" for index in range(len(images)))
    return Expectation(images, names, labels, outputs, len(labels))


def check_origin(version: Version, source: ModelSource) -> None:
    """Checks that a version was exported from a source's checkpoint.

    Raises:
        InputError: It was exported from another one.
    """
    expected = version.manifest.provenance.checkpoint_sha256
    if source.checkpoint_sha256 != expected:
        raise InputError(
            f"checkpoint: expected SHA-256 {expected[:12]}…, from which version "
            f"{version.manifest.version} was made, got {source.checkpoint_sha256[:12]}…"
        )


@one_thread()
def verify(version: Version, expected: Expectation) -> dict[Variant, Parity]:
    """Proves every artefact of a version again, on golden samples or on an eager net's answers.

    Raises:
        ParityError: An artefact fails; the message names the sample.
    """
    return {
        variant: prove(
            artefact.file.name, version.load(variant), expected, _gate(variant, artefact)
        )
        for variant, artefact in version.artefacts().items()
    }


def _gate(variant: Variant, artefact: pb.Artefact) -> Gate:
    """Holds an artefact to the tolerance it was published under."""
    standard = GATES[variant.precision]
    few = 0.0 if variant.precision is Precision.FP32 else 1 / 16
    return Gate(
        atol=artefact.parity.tolerance,
        scale=np.inf,
        min_agreement=min(standard.min_agreement, 1 - few),
        max_accuracy_drop=max(standard.max_accuracy_drop, few),
        binds_hostile=standard.binds_hostile,
    )


def _check_file(folder: Path, record: pb.File) -> None:
    path = folder / record.name
    if path.name != record.name or path.is_symlink():
        raise InputError(f"version {folder}: expected a plain file, got {record.name!r}")
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
