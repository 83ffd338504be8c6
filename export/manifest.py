"""manifest.json: what a version says about itself (proto/convoy/v1/model_manifest.proto)."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from google.protobuf import json_format

from convoy.v1 import model_manifest_pb2 as pb
from export.cost import BatchLatency, count_multiply_adds
from export.formats import WIRE_FORMATS, WIRE_PRECISIONS, Variant
from export.proof import Parity
from export.servable import INPUT_NAME, Outputs
from export.source import ModelSource, producer
from training.data.images import Interpolation, Preprocessing

MANIFEST_NAME = "manifest.json"
SAMPLES_NAME = "samples.npz"
REPORT_NAME = "report.png"
SCHEMA_VERSION = 1
_INTERPOLATIONS: dict[Interpolation, pb.Interpolation.ValueType] = {
    "bilinear": pb.INTERPOLATION_BILINEAR,
    "bicubic": pb.INTERPOLATION_BICUBIC,
}


@dataclass(frozen=True, slots=True)
class ProvedArtefact:
    """A file that passed its gate."""

    variant: Variant
    path: Path
    parity: Parity
    latencies: Sequence[BatchLatency]


def build(
    source: ModelSource,
    artefacts: Sequence[ProvedArtefact],
    *,
    samples: Path,
    samples_count: int,
    report: Path,
    created_at: datetime,
) -> pb.ModelManifest:
    """Describes a version whose name and number are not yet decided; the files must be complete."""
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
        ),
        normalization=pb.Normalization(mean=source.data.mean, std=source.data.std),
        temperature=source.temperature,
        artefacts=[_artefact(artefact) for artefact in artefacts],
        samples=pb.GoldenSamples(file=_file(samples), count=samples_count),
        report=_file(report),
        provenance=pb.Provenance(
            checkpoint_sha256=source.checkpoint_sha256,
            architecture=source.architecture,
            architecture_arguments_json=json.dumps(dict(source.architecture_arguments)),
            data=source.data.spec,
            parameters=source.parameters,
            multiply_adds=count_multiply_adds(source.net, size.height_px, size.width_px),
            accuracy=source.accuracy,
        ),
    )


def preprocessing_of(manifest: pb.ModelManifest) -> Preprocessing:
    """Returns how a version's images are prepared, as `training` loads them."""
    steps = manifest.preprocessing
    names = {wire: name for name, wire in _INTERPOLATIONS.items()}
    return Preprocessing(
        steps.height_px, steps.width_px, steps.resize_shorter_px, names[steps.interpolation]
    )


def to_json(manifest: pb.ModelManifest) -> bytes:
    """Returns the manifest as readable JSON, fields named as in the .proto."""
    text = json_format.MessageToJson(manifest, preserving_proto_field_name=True, indent=2)
    return text.encode() + b"\n"


def _artefact(artefact: ProvedArtefact) -> pb.Artefact:
    parity = artefact.parity
    return pb.Artefact(
        format=WIRE_FORMATS[artefact.variant.format],
        precision=WIRE_PRECISIONS[artefact.variant.precision],
        file=_file(artefact.path),
        parity=pb.Parity(
            samples=parity.samples,
            validation_samples=parity.validation_samples,
            batch_sizes=parity.batch_sizes,
            max_logit_difference=parity.max_logit_difference,
            logit_difference_p999=parity.logit_difference_p999,
            tolerance=parity.tolerance,
            argmax_agreement=parity.argmax_agreement,
            reference_accuracy=parity.reference_accuracy,
            accuracy=parity.accuracy,
        ),
        latencies=[
            pb.BatchLatency(batch_size=latency.batch_size, median_s=latency.median_s)
            for latency in artefact.latencies
        ],
    )


def _file(path: Path) -> pb.File:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return pb.File(name=path.name, size_bytes=path.stat().st_size, sha256=digest)
