"""manifest.json, the description of a version (proto/convoy/v1/model_manifest.proto)."""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from google.protobuf import json_format

from convoy.export.cost import BatchLatency
from convoy.export.errors import InputError
from convoy.export.formats import WIRE_FORMATS, WIRE_PRECISIONS, OutputKind, Variant
from convoy.export.object_store import secret_of, without_secrets
from convoy.export.proof import Parity
from convoy.export.servable import INPUT_NAME, Outputs
from convoy.export.source import ModelSource, producer
from convoy.training.data.images import Decode, Interpolation, Preprocessing
from convoy.v1 import model_manifest_pb2 as pb

SAMPLES_NAME = "samples.npz"
REPORT_NAME = "report.png"
SCHEMA_VERSION = 1
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
_INTERPOLATIONS: dict[Interpolation, pb.Interpolation.ValueType] = {
    "bilinear": pb.INTERPOLATION_BILINEAR,
    "bicubic": pb.INTERPOLATION_BICUBIC,
}
_DECODINGS: dict[Decode, pb.Decoding.ValueType] = {
    "exact": pb.DECODING_UNSPECIFIED,
    "scaled": pb.DECODING_SCALED,
}


@dataclass(frozen=True, slots=True)
class ProvedArtifact:
    """An artifact that passed its gate."""

    variant: Variant
    path: Path
    parity: Parity
    latencies: Sequence[BatchLatency]


def build(
    source: ModelSource,
    artifacts: Sequence[ProvedArtifact],
    openvino: Mapping[Variant, Parity | str],
    *,
    samples: Path,
    samples_count: int,
    report: Path,
    multiply_adds: int,
    created_at: datetime,
) -> pb.ModelManifest:
    """Describe a version without its name and number; the files must be complete."""
    classes = len(source.data.classes)
    size = source.data.preprocessing
    return pb.ModelManifest(
        schema_version=SCHEMA_VERSION,
        created_at=created_at.astimezone(UTC).isoformat(timespec="seconds"),
        producer=producer(),
        input=pb.TensorSpec(
            name=INPUT_NAME, datatype="UINT8", shape=[-1, size.height_px, size.width_px, 3]
        ),
        outputs=[
            pb.TensorSpec(name=name, datatype="FP32", shape=[-1, classes])
            for name in Outputs._fields
        ],
        labels=source.data.classes,
        preprocessing=pb.ImagePreprocessing(
            height_px=size.height_px,
            width_px=size.width_px,
            resize_shorter_px=size.resize_shorter_px,
            interpolation=_INTERPOLATIONS[size.interpolation],
            without_antialias=not size.antialias,
            decoding=_DECODINGS[size.decode],
        ),
        normalization=pb.Normalization(mean=source.data.mean, std=source.data.std),
        temperature=source.temperature,
        # Omitted for a softmax, so that servers without this field load the version.
        activation=(
            pb.ACTIVATION_SIGMOID
            if source.output is OutputKind.SIGMOID
            else pb.ACTIVATION_UNSPECIFIED
        ),
        artefacts=[_artifact(each, openvino.get(each.variant)) for each in artifacts],
        samples=pb.GoldenSamples(file=_file(samples), count=samples_count),
        report=_file(report),
        provenance=pb.Provenance(
            checkpoint_sha256=source.checkpoint_sha256,
            architecture=source.architecture,
            architecture_arguments_json=json.dumps(dict(source.architecture_arguments)),
            data=_without_secrets(source.data.spec),
            parameters=source.parameters,
            multiply_adds=multiply_adds,
            accuracy=source.accuracy,
        ),
    )


def _without_secrets(spec: str) -> str:
    """Return a specification of data without the password of a URL and the signature after it."""
    kind, _, place = spec.partition(":")
    if place.startswith(("http://", "https://")):
        return f"{kind}:{without_secrets(place)}"
    return spec.replace(secret_of(place), "")


def preprocessing_of(manifest: pb.ModelManifest) -> Preprocessing:
    """Return a version's preprocessing as `training` expresses it."""
    steps = manifest.preprocessing
    names = {wire: name for name, wire in _INTERPOLATIONS.items()}
    decodings = {wire: name for name, wire in _DECODINGS.items()}
    return Preprocessing(
        steps.height_px,
        steps.width_px,
        steps.resize_shorter_px,
        names[steps.interpolation],
        not steps.without_antialias,
        decodings[steps.decoding],
    )


def check(manifest: pb.ModelManifest) -> None:
    """Check a complete manifest by the rules of the server.

    model_manifest.proto states the rules; a test compares the server's with these.

    Raises:
        InputError: A server would reject the version; the message names the field.
    """
    size = manifest.preprocessing
    if not size.height_px or not size.width_px:
        raise InputError("preprocessing: expected a height and width above 0")
    if 0 < size.resize_shorter_px < max(size.height_px, size.width_px):
        raise InputError(
            "resize_shorter_px: expected 0 or at least the crop's larger side "
            f"({max(size.height_px, size.width_px)}), got {size.resize_shorter_px}"
        )
    if not 0 <= manifest.abstain_threshold <= 1:
        raise InputError(f"abstain_below: expected 0 to 1, got {manifest.abstain_threshold}")
    if size.interpolation not in _INTERPOLATIONS.values():
        raise InputError("interpolation: expected bilinear or bicubic")
    if size.without_antialias and size.interpolation != pb.INTERPOLATION_BILINEAR:
        raise InputError("antialias: without it, expected interpolation bilinear")
    if size.decoding not in _DECODINGS.values():
        raise InputError("decode: expected exact or scaled")
    if size.without_antialias and size.decoding == pb.DECODING_SCALED:
        raise InputError("antialias: expected with decode scaled")
    if not manifest.labels:
        raise InputError("labels: expected at least one")
    size_bytes = len(to_json(manifest))
    if size_bytes > MAX_MANIFEST_BYTES:
        raise InputError(
            f"labels: expected a manifest of at most {MAX_MANIFEST_BYTES} bytes, got {size_bytes}"
        )


def to_json(manifest: pb.ModelManifest) -> bytes:
    """Return the manifest as readable JSON, with the field names of the .proto."""
    text = json_format.MessageToJson(manifest, preserving_proto_field_name=True, indent=2)
    return text.encode() + b"\n"


def _artifact(artifact: ProvedArtifact, openvino: Parity | str | None) -> pb.Artefact:
    return pb.Artefact(
        format=WIRE_FORMATS[artifact.variant.format],
        precision=WIRE_PRECISIONS[artifact.variant.precision],
        file=_file(artifact.path),
        parity=_parity(artifact.parity),
        latencies=[
            pb.BatchLatency(batch_size=latency.batch_size, median_s=latency.median_s)
            for latency in artifact.latencies
        ],
        openvino=None if openvino is None else _verdict("openvino", openvino),
    )


def _verdict(runtime: str, found: Parity | str) -> pb.RuntimeVerdict:
    name = f"{runtime} {importlib.metadata.version(runtime)}"
    if isinstance(found, str):
        return pb.RuntimeVerdict(runtime=name, failure=found)
    return pb.RuntimeVerdict(runtime=name, parity=_parity(found))


def _parity(parity: Parity) -> pb.Parity:
    return pb.Parity(
        samples=parity.samples,
        validation_samples=parity.validation_samples,
        batch_sizes=parity.batch_sizes,
        max_logit_difference=parity.max_logit_difference,
        logit_difference_p999=parity.logit_difference_p999,
        tolerance=parity.tolerance,
        argmax_agreement=parity.argmax_agreement,
        reference_accuracy=parity.reference_accuracy,
        accuracy=parity.accuracy,
    )


def _file(path: Path) -> pb.File:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return pb.File(name=path.name, size_bytes=path.stat().st_size, sha256=digest)
